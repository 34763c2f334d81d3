"""The smaller commands, and the program as a whole."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from autocomp.config import SearchConfig
from autocomp.errors import AutocompError, ModelError
from autocomp.results import Copies
from tests.cli.fake import ROOT, FakeApi, estimate, run, sensitivity


def test_apply_passes_policy_and_settings_without_a_budget(api: FakeApi, capfd: pytest.CaptureFixture[str]) -> None:
    flags = "--model m:f --weights w.pt --data d:f --seed 4 --out there"
    assert run("apply", "policy.json", *flags.split()) == 0
    config = SearchConfig(model="m:f", weights="w.pt", data="d:f", seed=4)
    assert api.calls == [("apply_policy", Path("policy.json"), config, Path("there"))]
    assert capfd.readouterr().out == "there\n"
    api.outcome = AutocompError("differs")
    assert run("apply", "policy.json") == 3


def test_measure_prints_bounds_or_json(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from autocomp import engines

    @dataclass
    class Backend:
        measures: bool

    monkeypatch.setattr(engines, "make_backend", lambda spec: Backend(spec.name != "simulated"))
    api.outcome = estimate(0.5)
    assert run("measure", "a.onnx", "--batch", "8", "--threads", "2") == 0
    assert capfd.readouterr().out.splitlines()[0] == "latency p50: 10.00 (9.90 to 10.10) ms"
    spec = engines.BackendSpec(name="onnxruntime", batch=8, threads=2)
    assert api.calls[-1] == ("measure", Path("a.onnx"), spec, None, "p50")
    assert run("measure", "a.onnx", "--reference", "b.onnx", "--engine", "simulated", "--statistic", "p95") == 0
    assert "p50 (predicted, an estimate)" in capfd.readouterr().out
    assert api.calls[-1][3:] == (Path("b.onnx"), "p95")
    assert run("measure", "a.onnx", "--json") == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed == {**estimate(0.5).to_json(), "copies": None, "predicted": False, "batch": 1, "threads": 1}
    api.outcome = replace(estimate(0.5), copies=Copies(0.25, 0.125))
    assert run("measure", "a.onnx", "--json") == 0
    assert json.loads(capfd.readouterr().out)["copies"] == {"to_device_ms": 0.25, "from_device_ms": 0.125}
    assert run("measure", "a.onnx") == 0
    assert "beside that, copies to the device 0.250 ms and back 0.125 ms" in capfd.readouterr().out
    documented = (ROOT / "docs" / "json.md").read_text().split("## `measure`")[1]
    assert all(f"`{name}`" in documented for name in printed)


def test_sensitivity_passes_settings_and_prints_a_table(api: FakeApi, capfd: pytest.CaptureFixture[str]) -> None:
    api.outcome = sensitivity()
    flags = "--weights w.pt --data d:f --space prune --engine simulated --batch 8 --threads 2 --seed 4 --out there"
    assert run("sensitivity", "m:f", *flags.split()) == 0
    config = SearchConfig(
        model="m:f", weights="w.pt", data="d:f", space="prune", engine="simulated", batch=8, threads=2, seed=4,
        out="there",
    )  # fmt: skip
    assert api.calls == [("run_sensitivity", config)]
    out = capfd.readouterr().out
    assert re.search(r"layer1\.0\.conv1 +12\.3 +10\.0 %", out) and out.splitlines()[-1] == "folder: runs/s"


def test_sensitivity_as_json_and_interrupted(api: FakeApi, capfd: pytest.CaptureFixture[str]) -> None:
    api.outcome = sensitivity()
    assert run("sensitivity", "--json") == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == {**sensitivity().to_json(), "folder": "runs/s"} and "a library chats" in err
    for flags in ((), ("--json",)):
        api.outcome = KeyboardInterrupt()
        assert run("sensitivity", *flags) == 130
        assert "autocomp: interrupted" in capfd.readouterr().err
        api.outcome = ModelError("no such model")
        assert run("sensitivity", *flags) == 2
        assert "autocomp: no such model" in capfd.readouterr().err


def test_report_writes_the_files_again(api: FakeApi, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "x").mkdir()
    assert run("report", "x") == 0
    assert (folder / "x" / "report.md").exists() and (folder / "x" / "pareto.png").exists()
    assert "best found" in capfd.readouterr().out


def test_spaces_are_listed_and_shown(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("spaces", "list") == 0
    listed = capfd.readouterr().out
    assert re.search(r"^default +\S.*default\.toml\]$", listed, re.MULTILINE)
    assert run("spaces", "show", "default") == 0
    shown = capfd.readouterr().out
    assert (ROOT / "search_spaces" / "default.toml").read_text() in shown


def test_a_users_own_space_is_found(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "search_spaces").mkdir()
    (folder / "search_spaces" / "torn.toml").write_text("= nonsense")
    assert run("spaces", "list") == 0
    assert "torn" in capfd.readouterr().out


@pytest.mark.parametrize("version", [(3, 10, 4), (3, 14, 0)])
def test_other_pythons_are_refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], version: tuple[int, ...]
) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    assert run("search", "--budget", "15ms") == 2
    said = capfd.readouterr().err
    assert said == f"autocomp: Python 3.{version[1]} is not supported: use Python 3.11, 3.12 or 3.13\n"


def test_help_and_bad_input_import_nothing_heavy() -> None:
    code = (
        "import sys\nfrom autocomp.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: print(sorted({'torch', 'onnxruntime', 'optuna', 'matplotlib'} & set(sys.modules)))"
    )
    for arguments in (["search", "--help"], ["search", "--budget", "1 parsec"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "[]"


def test_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "autocomp", "search", "--budget", "2x"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.startswith("autocomp: a relative budget") and done.stderr.count("\n") == 1
