"""The command line against a stand-in for `autocomp.api`: flags, exit status, and what is printed where."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import autocomp
from autocomp.budget import parse_budgets
from autocomp.cli import main
from autocomp.config import SearchConfig
from autocomp.errors import AutocompError, EngineError, InfeasibleError, ModelError
from autocomp.outcome import Contender, Note, Phase, SearchResult, Step
from autocomp.policy import Policy
from autocomp.results import Interval, LatencyEstimate
from autocomp.study.sensitivity import Sensitivity, SensitivityRow

ROOT = Path(__file__).parents[1]


def estimate(ratio: float) -> LatencyEstimate:
    def around(value: float) -> Interval:
        return Interval(value, 0.99 * value, 1.01 * value)

    return LatencyEstimate("p50", around(20 * ratio), around(20), around(ratio), 100)


def finished(budget: tuple[str, ...] = ("15ms",), *, verified: bool = True) -> SearchResult:
    def row(role: str, ratio: float) -> Contender:
        return Contender(role, Policy(), estimate(ratio), 0.9, 0.9, 0.9, None, 1000, 4000, verified, 5)

    rows = {"reference": row("reference", 1.0), "best": row("best", 0.5)}
    budgets = parse_budgets(budget)
    return SearchResult(verified, budgets, rows, {"search": 5}, (), 12.0, Path("runs/x"), (), {"name": "cpu"})


@dataclass
class FakeApi:
    """Records its calls; ``outcome`` is returned, or raised where it is an exception."""

    outcome: Any = field(default_factory=finished)
    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def _answer(self, *call: Any) -> Any:
        self.calls.append(call)
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome

    def run_search(self, config: SearchConfig, observer: Callable[..., None]) -> Any:
        observer(Phase("trace"))
        observer(Note("a note"))
        print("a library chats")
        os.write(1, b"a native library chats\n")
        return self._answer("run_search", config)

    def resume(self, run: Path, observer: Callable[..., None]) -> Any:
        observer(Phase("search", 4))
        return self._answer("resume", run)

    def load_result(self, run: Path) -> Any:
        return self._answer("load_result", run)

    def apply_policy(self, policy: Path, config: SearchConfig, out: Path) -> Any:
        self._answer("apply_policy", policy, config, out)
        return out

    def run_sensitivity(self, config: SearchConfig, observer: Callable[..., None]) -> Any:
        observer(Phase("sensitivity", 1))
        observer(Step())
        print("a library chats")
        return self._answer("run_sensitivity", config), Path("runs/s")

    def measure(self, onnx: Path, spec: Any, reference: Path | None, statistic: str) -> Any:
        return self._answer("measure", onnx, spec, reference, statistic)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    fake = FakeApi()
    module = ModuleType("autocomp.api")
    for name in ("run_search", "run_sensitivity", "resume", "load_result", "apply_policy", "measure"):
        setattr(module, name, getattr(fake, name))
    monkeypatch.setitem(sys.modules, "autocomp.api", module)
    monkeypatch.setattr(autocomp, "api", module, raising=False)
    yield fake


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    code = left.value.code
    assert isinstance(code, int)
    return code


def test_search_prints_a_table_and_leaves_with_0(api: FakeApi, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("search", "--budget", "15ms") == 0
    out, err = capfd.readouterr()
    assert "best found" in out and "Verified: within 15ms" in out and "note: a note" in out
    assert err == ""


def test_flags_reach_the_search(api: FakeApi) -> None:
    flags = (
        "--model m:f --weights w.pt --data d:f --budget p95:15ms --budget 4MB --engine simulated --hardware board "
        "--threads 2 --batch 8 --space int8 --controller random --trials 5 --baseline-trials 0 --seed 3 "
        "--executor local --finetune-epochs 0 --finalists 2 --wave 6 --metric kl --mean 0.5,0.4 --std 1,0.9 --size 64 "
        "--calibration-images 10 --search-images 20 --selection-images 30 --out here"
    )
    assert run("search", *flags.split()) == 0
    expected = SearchConfig(
        model="m:f", weights="w.pt", data="d:f", budget=("p95:15ms", "4MB"), engine="simulated", hardware="board",
        threads=2, batch=8, space="int8", controller="random", trials=5, baseline_trials=0, seed=3, finalists=2, wave=6,
        mean=(0.5, 0.4), std=(1.0, 0.9), size=64, calibration_images=10, search_images=20, selection_images=30,
        out="here",
    )  # fmt: skip
    assert api.calls == [("run_search", expected)]


def test_a_file_holds_where_a_flag_is_absent(api: FakeApi, folder: Path) -> None:
    (folder / "mine.toml").write_text("trials = 7\nseed = 2\nbudget = '0.5x'\n")
    assert run("search", "--config", "mine.toml", "--trials", "9") == 0
    assert api.calls == [("run_search", SearchConfig(budget=("0.5x",), trials=9, seed=2))]


def test_json_is_the_only_thing_on_standard_output(api: FakeApi, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("search", "--budget", "15ms", "--json") == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == json.loads(json.dumps(finished().to_json()))
    for text in ("a library chats", "a native library chats", "note: a note", "trace: "):
        assert text in err


def test_json_may_be_asked_for_in_the_file_and_taken_back(
    api: FakeApi, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "autocomp.toml").write_text("json = true\n")
    run("search", "--budget", "15ms")
    assert json.loads(capfd.readouterr().out)["verified"] is True
    run("search", "--budget", "15ms", "--no-json")
    assert "best found" in capfd.readouterr().out


@pytest.mark.parametrize("command", [("search", "--budget", "15ms"), ("resume", "runs/x")])
@pytest.mark.parametrize(
    ("outcome", "status", "line"),
    [
        (ModelError("no such\nmodel"), 2, "autocomp: no such model"),
        (InfeasibleError("the floor is 9 ms: relax the budget"), 3, "autocomp: the floor is 9 ms: relax the budget"),
        (EngineError("refused"), 3, "autocomp: refused"),
        (KeyboardInterrupt("stopped; go on with: autocomp resume runs/x"), 130, "autocomp resume runs/x"),
        (KeyboardInterrupt(), 130, "autocomp: interrupted before the run began"),
    ],
)
def test_failures_are_one_line_and_a_status(
    api: FakeApi,
    capfd: pytest.CaptureFixture[str],
    command: tuple[str, ...],
    outcome: BaseException,
    status: int,
    line: str,
) -> None:
    api.outcome = outcome
    assert run(*command) == status
    err = capfd.readouterr().err
    assert line in err and "Traceback" not in err
    assert len([text for text in err.splitlines() if text.startswith("autocomp: ")]) == 1
    assert run(*command, "--json") == status
    out = capfd.readouterr().out
    if status == 3:
        assert json.loads(out) == {"verified": False, "error": str(outcome)}
    else:
        assert out == ""


def test_nothing_verified_is_status_3_with_its_table(api: FakeApi, capfd: pytest.CaptureFixture[str]) -> None:
    api.outcome = finished(verified=False)
    assert run("search", "--budget", "15ms") == 3
    assert "Not verified: for 15ms" in capfd.readouterr().out
    assert run("resume", "runs/x", "--json") == 3
    assert json.loads(capfd.readouterr().out)["verified"] is False


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("search", "no budget was given"),
        ("search --budget 2x", "at most 1x"),
        ("search --budget 15ms --trials 0", "trials must be at least 1"),
        ("search --budget 15ms --finetune-epochs 3", "leave --finetune-epochs at 0"),
        ("search --budget 15ms --mean a,b", "mean in the flags must be a list of numbers"),
        ("search --budget 15ms --config gone.toml", "cannot read gone.toml"),
        ("search --budget 15ms --trails 3", "No such option: --trails"),
        ("search --budget 15ms --trials many", "--trials"),
        ("sensitivity --threads 0", "threads must be at least 1"),
        ("sensitivity a b", "unexpected extra argument"),
        ("measure x.onnx --statistic p90", "use p50, p95 or p99"),
        ("measure x.onnx --threads 0", "threads must be at least 1"),
        ("spaces show nope", "unknown search space 'nope'"),
        ("profile show nope", "unknown hardware profile 'nope'"),
        ("nonsense", "No such command 'nonsense'"),
    ],
)
def test_bad_input_is_told_before_any_work(
    api: FakeApi, folder: Path, capfd: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    assert run(*arguments.split()) == 2
    out, err = capfd.readouterr()
    assert said in err and "Traceback" not in err and out == ""
    assert api.calls == [] and list(folder.iterdir()) == []


def test_bugs_are_not_hidden(api: FakeApi) -> None:
    api.outcome = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        main(["search", "--budget", "15ms"])


def test_resume_names_the_run(api: FakeApi) -> None:
    assert run("resume", "runs/x") == 0
    assert api.calls == [("resume", Path("runs/x"))]


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
    assert printed == {**estimate(0.5).to_json(), "predicted": False, "batch": 1, "threads": 1}
    documented = (ROOT / "docs" / "json.md").read_text().split("## `measure`")[1]
    assert all(f"`{name}`" in documented for name in printed)


def sensitivity() -> Sensitivity:
    row = SensitivityRow("channels", "layer1.0.conv1", 8, 0.5, 0.0123, 0.2, 100, 400)
    return Sensitivity("key", "m:f", "d:f", 64, 1000, 4000, (row,))


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


def test_a_users_own_space_and_profile_are_found(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "search_spaces").mkdir()
    (folder / "search_spaces" / "torn.toml").write_text("= nonsense")
    board = folder / "hardware_profiles" / "my-board"
    board.mkdir(parents=True)
    (board / "profile.toml").write_text('description = "a board"\n')
    assert run("spaces", "list") == 0
    assert "torn" in capfd.readouterr().out
    assert run("profile", "list") == 0
    assert re.search(r"^my-board +a board +\[", capfd.readouterr().out, re.MULTILINE)
    assert run("profile", "show", "my-board") == 0
    assert 'description = "a board"' in capfd.readouterr().out


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


def readme_commands() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [line for line in lines if line.startswith("autocomp ")]


def test_readme_has_commands() -> None:
    assert {shlex.split(line)[1] for line in readme_commands()} >= {
        "search",
        "report",
        "apply",
        "measure",
        "sensitivity",
        "spaces",
    }


@pytest.mark.parametrize("line", readme_commands())
def test_commands_of_the_readme_parse(api: FakeApi, monkeypatch: pytest.MonkeyPatch, folder: Path, line: str) -> None:
    (folder / "runs" / "half").mkdir(parents=True)
    if " measure " in line:
        api.outcome = estimate(0.5)
    if " sensitivity" in line:
        api.outcome = sensitivity()
    assert run(*shlex.split(line)[1:]) == 0
