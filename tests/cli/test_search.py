"""`autocomp search` and `resume`: flags, exit status, and what is printed where."""

import json
import re
from pathlib import Path

import pytest

from autocomp.cli import main
from autocomp.config import SearchConfig
from autocomp.errors import EngineError, InfeasibleError, ModelError
from tests.cli.fake import FakeApi, finished, run


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
        "--size 64 --calibration-images 10 --search-images 20 --selection-images 30 --ranges entropy --out here"
    )
    assert run("search", *flags.split()) == 0
    expected = SearchConfig(
        model="m:f", weights="w.pt", data="d:f", budget=("p95:15ms", "4MB"), engine="simulated", hardware="board",
        threads=2, batch=8, space="int8", controller="random", trials=5, baseline_trials=0, seed=3, finalists=2, wave=6,
        mean=(0.5, 0.4), std=(1.0, 0.9), size=64, calibration_images=10, search_images=20, selection_images=30,
        finetune_epochs=4, finetune_finalists=5, ranges="entropy",
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
