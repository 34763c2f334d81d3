"""The command line against a stand-in for `autocomp.api`: flags, exit status, and what is printed where."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import autocomp
from autocomp.budget import parse_budgets
from autocomp.cli import main
from autocomp.config import SearchConfig
from autocomp.engines import BackendSpec, make_backend
from autocomp.errors import AutocompError, EngineError, InfeasibleError, ModelError
from autocomp.hardware import EngineTime, HardwareProfile, Kernel, KernelEstimate, KernelTime, Prediction
from autocomp.outcome import Contender, Note, Phase, SearchResult, Step
from autocomp.policy import Policy
from autocomp.results import Contest, Entrant, Interval, LatencyEstimate, Score
from autocomp.study.build_profile import Built, Job, Progress
from autocomp.study.card import Card, DataCard
from autocomp.study.debug import AccuracyGap
from autocomp.study.finetune import Finetuned
from autocomp.study.profiles import Checked, PolicyLatency, Standing
from autocomp.study.recheck import Verification
from autocomp.study.sensitivity import Sensitivity, SensitivityRow
from autocomp.study.shipped import ShippedVerification
from autocomp.study.sparsify import Sparsified
from autocomp.study.staleness import Drift
from autocomp.study.verify import Verdict
from autocomp.train import TrainingRecipe

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

    def resume(self, run: Path, observer: Callable[..., None], address: str | None) -> Any:
        observer(Phase("search", 4))
        return self._answer("resume", run, *([] if address is None else [address]))

    def retarget(self, run: Path, settings: dict[str, Any], observer: Callable[..., None], out: Path | None) -> Any:
        return self._answer("retarget", run, settings, out)

    def verify(self, run: Path, observer: Callable[..., None]) -> Any:
        observer(Phase("verify"))
        print("a library chats")
        return self._answer("verify", run)

    def verify_shipped(self, folder: Path, data: str | None, observer: Callable[..., None]) -> Any:
        print("a library chats")
        return self._answer("verify_shipped", folder, data)

    def finetune(self, run: Path, settings: dict[str, Any], observer: Callable[..., None], *given: Any) -> Any:
        observer(Phase("finetune", 2))
        observer(Step())
        print("a library chats")
        return self._answer("finetune", run, settings, *(value for value in given if value is not None))

    def sparsify(self, config: SearchConfig, settings: dict[str, Any], out: Path, observer: Callable[..., None]) -> Any:
        observer(Phase("finetune", 2))
        print("a library chats")
        return self._answer("sparsify", config, settings, out)

    def export(self, run: Path, kinds: list[str], out: Path) -> Any:
        print("a library chats")
        return self._answer("export", run, kinds, out)

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

    def check_profile(self, profile: HardwareProfile, config: SearchConfig, observer: Any) -> Any:
        return self._answer("check_profile", profile, config)

    def build_profile(
        self, jobs: Any, seconds: float, root: Path | None, observer: Any, progress: Any, *, fresh: bool
    ) -> Any:
        observer(Note("a note"))
        progress(Progress("m:f", 1, 7, 5, 0.1, 9.0, 9.0))
        print("a library chats")
        return self._answer("build_profile", jobs, seconds, root, *["fresh"] * fresh)

    def predict_policy(self, policy: Policy, config: SearchConfig, profile: Any, observer: Any) -> Any:
        return self._answer("predict_policy", policy, config, profile)

    def debug_accuracy(
        self, target: Path, settings: dict[str, Any], toml: Path | None, file: Path | None, observer: Any
    ) -> Any:
        observer(Note("a note"))
        given = {name: value for name, value in settings.items() if value is not None}
        return self._answer("debug_accuracy", target, given, toml, file)

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
    for name in vars(FakeApi):
        if not name.startswith("_") and callable(getattr(fake, name)):
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


def test_help_names_the_defaults(api: FakeApi, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("search", "--help") == 0
    text = " ".join(re.sub(r"[│|]", " ", capfd.readouterr().out).split())
    for name in ("trials", "finalists", "wave", "threads", "seed", "calibration_images", "search_images"):
        flag = name.replace("_", "-")
        found = re.search(rf" --{flag} <int> [^<]*?\[(\d+)\]", text)
        assert found is not None and int(found[1]) == getattr(SearchConfig(), name), flag


def test_flags_reach_the_search(api: FakeApi) -> None:
    flags = (
        "--model m:f --weights w.pt --data d:f --budget p95:15ms --budget 4MB --engine simulated --hardware board "
        "--threads 2 --batch 8 --space int8 --controller random --trials 5 --baseline-trials 0 --seed 3 "
        "--executor ray --address auto --workers 3 --gpus-per-worker 0.5 --target-resource board "
        "--finetune-epochs 4 --finetune-finalists 5 --finalists 2 --wave 6 --metric kl --mean 0.5,0.4 --std 1,0.9 "
        "--size 64 --calibration-images 10 --search-images 20 --selection-images 30 --out here"
    )
    assert run("search", *flags.split()) == 0
    expected = SearchConfig(
        model="m:f", weights="w.pt", data="d:f", budget=("p95:15ms", "4MB"), engine="simulated", hardware="board",
        threads=2, batch=8, space="int8", controller="random", trials=5, baseline_trials=0, seed=3, finalists=2, wave=6,
        mean=(0.5, 0.4), std=(1.0, 0.9), size=64, calibration_images=10, search_images=20, selection_images=30,
        finetune_epochs=4, finetune_finalists=5,
        out="here", executor="ray", address="auto", workers=3, gpus_per_worker=0.5, target_resource="board",
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
        (
            InfeasibleError("the floor is 9 ms: relax the budget", {"ratio": 0.4}),
            3,
            "autocomp: the floor is 9 ms: relax the budget",
        ),
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
        assert json.loads(out) == {"verified": False, "error": str(outcome), "floor": getattr(outcome, "floor", None)}
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
        ("search --budget 15ms --finetune-epochs -1", "finetune-epochs must be at least 0"),
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
    assert run("resume", "runs/x", "--address", "auto") == 0
    assert api.calls[1:] == [("resume", Path("runs/x"), "auto")]


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


def test_a_users_own_space_is_found(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "search_spaces").mkdir()
    (folder / "search_spaces" / "torn.toml").write_text("= nonsense")
    assert run("spaces", "list") == 0
    assert "torn" in capfd.readouterr().out


@pytest.fixture
def board(folder: Path) -> HardwareProfile:
    """A measured profile in the working directory, of a device that no machine here is."""
    kernels = [
        KernelTime(Kernel("conv", 16, out, (3, 3), (1, 1), 1, (8, 8), 4, precision, context), 0.01 * out, 0.0, count)
        for out in (16, 32, 48, 64, 96, 128)
        for precision, context, count in (("fp32", "f conv2d", 1), ("int8", "q conv2d.q", 2), ("int8", "q conv2d", 1))
    ]
    engines = (
        EngineTime("zoo:resnet8", 4, 10, 1.0, 1.1, "random:3x16x16x10"),
        EngineTime("object:Net", 1, 9, 1.0, 1.0),
    )
    day = date(2026, 1, 31)
    profile = HardwareProfile("board", "tvm 1", 2, day, True, "cpu: Z80", kernels=tuple(kernels), engines=engines)
    profile.save(folder / "hardware_profiles")
    return profile


def test_profiles_are_listed_with_their_standing(
    board: HardwareProfile, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    simulated = HardwareProfile("simulated-1t", "simulated (an estimate)", 1, board.date, True)
    simulated.save(folder / "hardware_profiles")
    replace(simulated, device="simulated-2t", threads=2, details="cpu: 6502").save(folder / "hardware_profiles")
    (folder / "hardware_profiles" / "torn").mkdir()
    (folder / "hardware_profiles" / "torn" / "profile.toml").write_text("format = 1\n")
    assert run("profile", "list") == 0
    listed = {line.split()[0]: line.split()[1] for line in capfd.readouterr().out.splitlines()}
    expected = {
        "board": "measured,", "simulated": "described", "simulated-1t": "measured", "simulated-2t": "stale",
        "torn": "unreadable",
    }  # fmt: skip
    assert listed.items() >= expected.items()  # this machine's own profile may have been built meanwhile
    assert run("profile", "list", "--json") == 0
    found = {row["name"]: row["standing"] for row in json.loads(capfd.readouterr().out)}
    assert found["board"] == "foreign" and found["simulated-2t"] == "stale"
    assert run("profile", "show", "simulated-2t") == 0
    out = capfd.readouterr().out
    command = "autocomp profile build --fresh --engine simulated --threads 2 --hardware simulated"
    assert f"stale on this machine: device was cpu: 6502, is unknown; build it again with '{command}'" in out
    assert run("profile", "show", "simulated-2t", "--json") == 0
    assert json.loads(capfd.readouterr().out)["rebuild"] == command


@pytest.mark.parametrize(("measured_ms", "status"), [(11.1, 3), (8.9, 3), (10.5, 0)])
def test_a_check_says_what_is_stale_and_leaves_with_3(
    board: HardwareProfile, api: FakeApi, capfd: pytest.CaptureFixture[str], measured_ms: float, status: int
) -> None:
    drift = Drift("zoo:resnet8", 4, 10.0, measured_ms)
    api.outcome = Checked(Standing("measured"), (drift,), "autocomp profile build --fresh" if drift.stale else "")
    assert run("profile", "check", "board") == status
    out = capfd.readouterr().out
    assert f"takes {measured_ms:.3g} ms, the profile says 10 ms" in out
    assert ("build it again with 'autocomp profile build --fresh'" in out) == bool(status)
    assert run("profile", "check", "board", "--json") == status
    printed = json.loads(capfd.readouterr().out)
    assert printed["standing"] == ("stale" if status else "measured") and printed["drifts"][0]["stale"] == bool(status)
    documented = (ROOT / "docs" / "json.md").read_text().split("## `profile check`")[1]
    assert all(f"`{name}`" in documented for name in (*printed, *printed["drifts"][0]))


def test_a_profile_is_shown(board: HardwareProfile, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("profile", "show", "board") == 0
    out = capfd.readouterr().out
    for text in (
        "engine: tvm 1",
        "cpu: Z80",
        "date: 2026-01-31",
        "note: of another device",
        "1 engine of zoo:resnet8",
    ):
        assert text in out
    assert re.search(r"conv +int8 +4 +12$", out, re.MULTILINE)
    assert run("profile", "show", "board", "--json") == 0
    assert {"op": "conv", "precision": "fp32", "batch": 4, "kernels": 6} in json.loads(capfd.readouterr().out)[
        "kernels"
    ]


ASKED = "profile lookup --hardware board --op conv --in 16 --kernel 3 --size 8 --batch 4"


@pytest.mark.parametrize(
    ("more", "source", "context"),
    [
        ("--out 32 --precision int8", "measured", "q conv2d.q (measured most often"),
        ("--out 32 --precision int8 --context conv2d", "measured", "q conv2d.q"),
        ("--out 32 --precision int8 --context", "measured", "q conv2d"),
        ("--out 40", "interpolated", "f conv2d"),
        ("--out 999", "extrapolated", "f conv2d"),
    ],
)
def test_a_kernel_is_looked_up(
    board: HardwareProfile, capfd: pytest.CaptureFixture[str], more: str, source: str, context: str
) -> None:
    words = [*ASKED.split(), *more.split()] + ["q conv2d"] * more.endswith("--context")
    assert run(*words) == 0
    out, err = capfd.readouterr()
    assert f", {source}\n" in out and f"context: {context}" in out
    assert err == "note: the profile board is of another device than this one\n"
    assert run(*words, "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert found["source"] == source and found["low_ms"] < found["ms"] < found["high_ms"]
    if source == "measured":
        assert found["ms"] == 0.32


def test_profiles_are_compared(board: HardwareProfile, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("profile", "diff", "board", "board") == 0
    assert "0 of 18 kernels differ" in capfd.readouterr().out
    slower = tuple(KernelTime(e.kernel, 2 * e.median_ms, 0.0, e.samples) for e in board.kernels[1:])
    replace(board, device="late", engine="tvm 2", kernels=slower).save(folder / "hardware_profiles")
    assert run("profile", "diff", "board", "late") == 0
    out = capfd.readouterr().out
    assert "engine was tvm 1, is tvm 2" in out and "17 of 17 kernels differ" in out and "only in the first: 1" in out
    assert run("profile", "diff", "board", "late", "--json") == 0
    assert [row["ratio"] for row in json.loads(capfd.readouterr().out)["ratios"]] == pytest.approx([2.0, 2.0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("build --batch 0", "whole numbers from 1"),
        ("build --batch 1,x", "whole numbers from 1"),
        ("build --like gone", "unknown hardware profile 'gone'"),
        ("build --like simulated", "names no model that can be built here"),
        ("build --like board --model zoo:resnet8", "leave out --model"),
        ("build --threads 0", "threads must be at least 1"),
        ("lookup --hardware board", "give --op, --in and --out"),
        ("lookup --hardware board --op conv --in 16 --out 16", "give --kernel and --size"),
        ("lookup --hardware board --op linear --in 16 --out 16", "it has conv in fp32, conv in int8"),
        ("lookup --hardware board --op conv --in 16 --out 16 --precision bf16", "it has conv in fp32, conv in int8"),
        ("lookup --hardware simulated --op conv --in 16 --out 16", "no measured kernels"),
        (
            "lookup --engine simulated --threads 77 --op conv --in 1 --out 1",
            "this device (simulated-77t) has no profile",
        ),
        (f"{ASKED[8:]} --out 16 --context add", "most often 'f conv2d'"),
        (f"{ASKED[8:]} --out 16 --groups 3", "3 groups do not divide"),
        (f"{ASKED[8:]} --out 16 --stride 2y2", "write 3 or 3x3"),
        (f"{ASKED[8:]} --out 0", "1 or more"),
        ("lookup --hardware board --policy gone.json", "no policy file gone.json"),
        ("lookup --policy gone.json --op conv", "leave out --op"),
        ("lookup --policy gone.json --size wide", "the side of the images"),
        ("check gone", "unknown hardware profile 'gone'"),
        ("diff board gone", "unknown hardware profile 'gone'"),
        ("show torn", "threads, date, measured missing"),
        ("show newer", "its format is not 1"),
    ],
)
def test_bad_input_about_profiles_is_one_line(
    board: HardwareProfile, api: FakeApi, folder: Path, capfd: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    for name, text in (("torn", 'format = 1\ndevice = "torn"\nengine = "x"\n'), ("newer", "format = 2\n")):
        (folder / "hardware_profiles" / name).mkdir()
        (folder / "hardware_profiles" / name / "profile.toml").write_text(text)
    assert run("profile", *arguments.split()) == 2
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert said in err and len(lines) == 1 and out == "" and api.calls == []


def test_build_passes_its_jobs_and_prints_what_it_made(
    board: HardwareProfile, api: FakeApi, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    api.outcome = Built(board, Path("x/board"), 7, 0, 5, 9.0)
    flags = "--model m:f --data random:3x8x8 --engine simulated --space int8 --batch 1,8 --seed 4 --seconds 9"
    assert run("profile", "build", *flags.split(), "--out", "there") == 0
    config = SearchConfig(model="m:f", data="random:3x8x8", engine="simulated", space="int8", seed=4)
    assert api.calls == [("build_profile", (Job(config, (1, 8)),), 9.0, Path("there"))]
    out, err = capfd.readouterr()
    assert out.splitlines()[-1] == "7 engines measured, 5 kernels added; profile: x/board" and "7 engines" in err
    assert run("profile", "build", "--like", "board", "--json") == 0
    (job,) = api.calls[-1][1]
    assert (job.config.model, job.config.data, job.batches) == ("zoo:resnet8", "random:3x16x16x10", (4,))
    printed = json.loads(capfd.readouterr().out)
    assert printed == api.outcome.to_json()
    documented = (ROOT / "docs" / "json.md").read_text().split("## `profile build`")[1]
    assert all(f"`{name}`" in documented for name in printed)
    api.outcome = KeyboardInterrupt()
    assert run("profile", "build") == 130
    assert "the same command goes on" in capfd.readouterr().err
    assert run("profile", "build", "--fresh") == 130
    assert "the same command without --fresh goes on" in capfd.readouterr().err and api.calls[-1][-1] == "fresh"


def test_a_policy_is_looked_up(
    board: HardwareProfile, api: FakeApi, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kernel = board.kernels[0].kernel
    table = {"stem": (kernel, KernelEstimate(1.0, 0.1, "measured"))}
    api.outcome = PolicyLatency(Prediction(1.5, 0.1, 1.0), 4, table, 0.5)
    (folder / "policy.json").write_text(json.dumps(Policy().to_json()))
    words = "profile lookup --hardware board --policy policy.json --model zoo:resnet8 --data random:3x8x8x10 --size 8"
    assert run(*words.split()) == 0
    config = SearchConfig(model="zoo:resnet8", data="random:3x8x8x10", size=8)
    assert [call[:3] for call in api.calls] == [("predict_policy", Policy(), config)]
    assert api.calls[0][3].device == "board"
    out = capfd.readouterr().out
    assert "predicted: 1.500 ms (95 %: 1.304 to 1.696) at batch 4; 100 %" in out and "stem" in out
    assert run(*words.split(), "--json") == 0
    assert json.loads(capfd.readouterr().out) == {"device": "board", **api.outcome.to_json()}


def verification(reason: str | None = None) -> Verification:
    return Verification(
        Verdict(reason is None, estimate(0.5), 4000, reason), 0.95, {"name": "cpu", "engine": "e 1"}, finished(), True
    )


def test_retarget_passes_what_differs(api: FakeApi, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("retarget", "runs/x", "--engine", "openvino", "--threads", "2", "--budget", "9ms", "--out", "y") == 0
    given = {"engine": "openvino", "hardware": None, "reference": None, "threads": 2, "budget": ("9ms",)}
    assert api.calls == [("retarget", Path("runs/x"), given, Path("y"))]
    assert "best found" in capfd.readouterr().out


@pytest.mark.parametrize(("reason", "status"), [(None, 0), ("p50 0.6x is over 0.5x", 3)])
def test_verify_prints_its_verdict_and_leaves_with_it(
    api: FakeApi, capfd: pytest.CaptureFixture[str], reason: str | None, status: int
) -> None:
    api.outcome = verification(reason)
    assert run("verify", "runs/x") == status
    assert api.calls == [("verify", Path("runs/x"))]
    out = capfd.readouterr().out
    assert (reason or "Verified: within 15ms, on cpu with e 1, bounds at 95 %") in out and "ratio: 0.500" in out
    assert run("verify", "runs/x", "--json") == status
    printed = json.loads(capfd.readouterr().out)
    assert printed["verified"] is (status == 0) and printed["reason"] == reason
    documented = (ROOT / "docs" / "json.md").read_text().split("## `verify`")[1]
    assert all(f"`{name}`" in documented for name in printed)


CONTEST = Contest((1,), tuple(Entrant(number, 0.1, (0.9,)) for number in range(3)), 0.33, 0.5, 1.0)


def finetuned(reason: str | None = None) -> Finetuned:
    change = Interval(0.02, 0.01, 0.03) if reason is None else None
    return Finetuned(finished(), reason is None, reason, (0.8, 0.82), change, (1.5, 0.5), TrainingRecipe(), CONTEST)


@pytest.mark.parametrize("reason", [None, "p50 0.6x is over 0.5x"])
def test_finetune_passes_what_is_given(api: FakeApi, capfd: pytest.CaptureFixture[str], reason: str | None) -> None:
    api.outcome = finetuned(reason)
    assert run("finetune", "runs/x", "--epochs", "3", "--lr", "0.02", "--distillation", "0", "--finalists", "4") == 0
    assert api.calls == [("finetune", Path("runs/x"), {"epochs": 3, "lr": 0.02, "distillation": 0.0}, 4)]
    out = capfd.readouterr().out
    assert "80.00 % before, 82.00 % after" in out and "1.5, 0.5" in out and str(CONTEST) in out
    assert (f"the run stays as it was: {reason}" if reason else "+2.00 points (+1.00 to +3.00)") in out
    assert run("finetune", "runs/x", "--json", "--address", "auto") == 0
    assert api.calls[-1] == ("finetune", Path("runs/x"), {}, "auto")
    printed = json.loads(capfd.readouterr().out)
    assert printed["replaced"] is (reason is None) and printed["losses"] == [1.5, 0.5]
    documented = (ROOT / "docs" / "json.md").read_text().split("## `finetune`")[1].split("\n## ")[0]
    assert all(f"`{name}`" in documented for name in printed)


def sparsified() -> Sparsified:
    counts = (32, 0, 7), (16, 1, 5)
    return Sparsified(Path("w.safetensors"), (0.8, 0.79), *counts, (1.5, 0.5), TrainingRecipe(slimming=1e-4))


def test_sparsify_passes_what_is_given(api: FakeApi, capfd: pytest.CaptureFixture[str]) -> None:
    api.outcome = sparsified()
    flags = "--model m:f --data d:f --seed 3 --slimming 0.001 --epochs 2 --out w.safetensors"
    assert run("sparsify", *flags.split()) == 0
    expected = SearchConfig(model="m:f", data="d:f", seed=3)
    assert api.calls == [("sparsify", expected, {"slimming": 0.001, "epochs": 2}, Path("w.safetensors"))]
    out = capfd.readouterr().out
    assert "80.00 % before, 79.00 % after" in out and "small batch-norm factors: 0 before, 7 after, of 32" in out
    assert run("sparsify", "--soft-pruning", "0.3", "--json") == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed["zero_filters"] == {"all": 16, "before": 1, "after": 5} and printed["losses"] == [1.5, 0.5]
    documented = (ROOT / "docs" / "json.md").read_text().split("## `sparsify`")[1].split("\n## ")[0]
    assert all(f"`{name}`" in documented for name in printed)


def card() -> Card:
    rows = finished().contenders
    data = DataCard("digits", "d" * 64, 500, (0.3,), (0.3,))
    return Card(
        parse_budgets(["0.5x"]), True, False, rows["best"], rows["reference"], data, {"name": "cpu", "engine": "e 1"},
        SearchConfig().to_json(), {}, {}, ["autocomp"], (), {"model.onnx": "0" * 64},
    )  # fmt: skip


def test_export_passes_its_kinds(api: FakeApi, capfd: pytest.CaptureFixture[str]) -> None:
    api.outcome = card()
    assert run("export", "runs/x", "--to", "onnx, policy", "--out", "there") == 0
    assert api.calls == [("export", Path("runs/x"), ["onnx", "policy"], Path("there"))]
    assert capfd.readouterr().out == "there: model.onnx, card.json\n"
    assert run("export", "runs/x", "--json") == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed == {**card().to_json(), "folder": "exported"}
    documented = (ROOT / "docs" / "json.md").read_text().split("## `export`")[1].split("\n## ")[0]
    assert all(f"`{name}`" in documented for name in (*printed, *printed["data"]))


@pytest.mark.parametrize(("broken", "status"), [((), 0), (("model.onnx was changed after it was shipped",), 1)])
def test_verify_of_an_exported_folder_leaves_with_1_where_a_claim_is_untrue(
    api: FakeApi, folder: Path, capfd: pytest.CaptureFixture[str], broken: tuple[str, ...], status: int
) -> None:
    (folder / "shipped").mkdir()
    (folder / "shipped" / "card.json").touch()
    seen = (verification().device, verification().verdict, 0.9) if not broken else ()
    api.outcome = ShippedVerification(Path("shipped"), card(), broken, *seen)
    assert run("verify", "shipped", "--data", "npz:x.npz") == status
    assert api.calls == [("verify_shipped", Path("shipped"), "npz:x.npz")]
    out = capfd.readouterr().out
    assert f"no longer true: {broken[0]}" in out if broken else "all that the card claims holds" in out
    assert run("verify", "shipped", "--json") == status
    printed = json.loads(capfd.readouterr().out)
    assert printed["holds"] is (status == 0) and printed["broken"] == list(broken)
    documented = (ROOT / "docs" / "json.md").read_text().split("Of an exported folder")[1].split("\n## ")[0]
    assert all(f"`{name}`" in documented for name in printed)
    assert run("verify", "runs/x", "--data", "digits") == 2
    assert "a run is verified without data" in capfd.readouterr().err


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
def test_commands_of_the_readme_parse(api: FakeApi, board: HardwareProfile, folder: Path, line: str) -> None:
    (folder / "runs" / "half").mkdir(parents=True)
    if " measure " in line:
        api.outcome = estimate(0.5)
    if " verify " in line:
        api.outcome = verification()
    if " finetune " in line:
        api.outcome = finetuned()
    if " debug-accuracy " in line:
        api.outcome = AccuracyGap({"engine": "e 1"}, Score(0.0, 0.9, 10, 1.0), Score(0.1, 0.9, 10, 0.9), 0.0)
    if " sparsify " in line:
        api.outcome = sparsified()
    if " export " in line:
        api.outcome = card()
    if " sensitivity" in line:
        api.outcome = sensitivity()
    if " profile " in line:
        own = replace(board, device=make_backend(BackendSpec()).device.name)
        own.save(folder / "hardware_profiles")
        (folder / "runs" / "half" / "policy.json").write_text(json.dumps(Policy().to_json()))
        api.outcome = Built(board, Path("x"), 7, 0, 5, 9.0)
        if "profile check" in line:
            api.outcome = Checked(Standing("measured"), (), "")
        if "--policy" in line:
            api.outcome = PolicyLatency(Prediction(1.5, 0.1, 1.0), 4, {}, 0.5)
    assert run(*shlex.split(line)[1:]) == 0
