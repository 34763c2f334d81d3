"""Whole searches: the real ONNX Runtime, a kill in the middle, equal seeds, the files left behind."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pandas as pd
import pytest
import torch

import autocomp
from autocomp.api import apply_policy, run_search
from autocomp.budget import Budget
from autocomp.config import SearchConfig
from autocomp.data import load_data
from autocomp.data.splits import DataOptions, Split
from autocomp.errors import InfeasibleError, InputError, RunError
from autocomp.outcome import Event
from autocomp.policy import Policy
from autocomp.study.run import Run, read_manifest
from tests.processes import command

ROOT = Path(__file__).parents[1]
SMALL = {"trials": 6, "baseline_trials": 2, "finalists": 2, "calibration_images": 128, "search_images": 100}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One real search of the default job on ONNX Runtime, through the command line."""
    folder = tmp_path_factory.mktemp("default")
    done = command(
        "search", "--budget", "0.9x", "--trials", "6", "--baseline-trials", "2", "--finalists", "2",
        "--calibration-images", "512", "--finetune-epochs", "0", "--json", "--out", "run", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 1
    return folder / "run", json.loads(done.stdout)


def test_the_default_job_is_verified_and_keeps_its_accuracy(finished: tuple[Path, dict[str, Any]]) -> None:
    _, result = finished
    best, reference = result["best"], result["reference"]
    assert result["verified"] is True and result["budget"] == ["0.9x"]
    assert best["ratio"]["low"] <= best["ratio"]["value"] <= best["ratio"]["high"] <= 0.9
    assert best["accuracy"]["test"] >= reference["accuracy"]["test"] - 0.01
    assert reference["accuracy"]["test"] >= 0.985
    assert best["latency_ms"]["low"] <= best["latency_ms"]["p50"] <= best["latency_ms"]["high"]
    assert result["trials"] >= 8


def test_the_folder_holds_what_the_result_says(finished: tuple[Path, dict[str, Any]]) -> None:
    run, result = finished
    for name in ("manifest.json", "journal.jsonl", "policy.json", "weights.safetensors", "report.md", "pareto.png"):
        assert (run / name).stat().st_size > 0, name
    assert read_manifest(run).status == "verified"
    table = pd.read_csv(run / "results.csv")
    assert len(table) == result["trials"]
    assert set(table.role) == {"search", "uniform", "random"}
    policy = json.loads((run / "policy.json").read_text())
    assert policy["policy"] == result["best"]["policy"]
    assert policy["onnx_sha256"] == hashlib.sha256((run / "model.onnx").read_bytes()).hexdigest()
    (measured,) = [e for e in Run.entries_of(run) if e["kind"] == "verdict" and e["policy"] == best_of(result).digest]
    assert measured["onnx_sha256"] == policy["onnx_sha256"]


def best_of(result: dict[str, Any]) -> Policy:
    return Policy.from_json(result["best"]["policy"])


def test_the_shipped_file_scores_as_reported_without_autocomp(finished: tuple[Path, dict[str, Any]]) -> None:
    run, result = finished
    session = onnxruntime.InferenceSession(run / "model.onnx", providers=["CPUExecutionProvider"])
    correct = total = 0
    for images, labels in load_data("digits", DataOptions()).test.batches(32):
        logits = session.run(None, {session.get_inputs()[0].name: images})[0]
        correct += int((logits.argmax(1) == labels).sum())
        total += len(labels)
    assert correct / total == pytest.approx(result["best"]["accuracy"]["test"], abs=2 / total)


def test_apply_rebuilds_the_measured_file_bit_for_bit(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run, _ = finished
    config = SearchConfig(batch=32, budget=("1x",))
    out = apply_policy(run / "policy.json", config, tmp_path / "again")
    assert (out / "model.onnx").read_bytes() == (run / "model.onnx").read_bytes()
    assert (out / "weights.safetensors").read_bytes() == (run / "weights.safetensors").read_bytes()


def test_apply_refuses_other_weights(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run, _ = finished
    config = SearchConfig(model="zoo:resnet20", data="random:3x32x32", budget=("1x",), batch=32)
    with pytest.raises(InputError, match="differ"):
        apply_policy(run / "policy.json", config, tmp_path / "again")


def test_a_finished_run_is_resumed_as_its_result_and_reported_again(finished: tuple[Path, dict[str, Any]]) -> None:
    run, result = finished
    resumed = command("resume", str(run), "--json", cwd=run.parent)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["best"] == result["best"]
    before = (run / "report.md").read_text()
    (run / "report.md").unlink()
    assert command("report", run.name, cwd=run.parent).returncode == 0
    assert (run / "report.md").read_text() == before


TINY = {"model": "tests.tiny:model", "data": "tests.tiny:data"}


def simulated(out: Path, **changes: Any) -> SearchConfig:
    return SearchConfig(
        **{"engine": "simulated", "budget": ("0.6x",), "out": str(out), "batch": 32, **TINY, **SMALL, **changes}
    )


def stable(run: Path) -> pd.DataFrame:
    return pd.read_csv(run / "results.csv").drop(columns=["seconds", "overhead_s", "cached_timing"])


def test_equal_seeds_give_equal_runs_on_the_simulated_engine(tmp_path: Path) -> None:
    first, second = run_search(simulated(tmp_path / "a")), run_search(simulated(tmp_path / "b"))
    pd.testing.assert_frame_equal(stable(first.run), stable(second.run))
    assert first.contenders == second.contenders
    assert first.predicted and not first.verified
    tight = run_search(simulated(tmp_path / "tight", budget=("0.35x",), baseline_trials=1))
    for role in ("uniform", "random"):  # one that is missing from the table is accounted for
        assert (role in tight.contenders) != any(
            note.startswith(f"{role}: none of its 1 trials") for note in tight.notes
        )
    assert set(tight.contenders) < {"reference", "best", "uniform", "random"}


def test_other_seeds_give_other_runs(tmp_path: Path) -> None:
    first = run_search(simulated(tmp_path / "a", controller="random"))
    second = run_search(simulated(tmp_path / "b", controller="random", seed=5))
    assert list(stable(first.run).policy) != list(stable(second.run).policy)


ARGUMENTS = [
    "--engine", "simulated", "--budget", "0.6x", "--trials", "40", "--baseline-trials", "2", "--batch", "32",
    "--calibration-images", "128", "--search-images", "100", "--model", TINY["model"], "--data", TINY["data"],
]  # fmt: skip


def stop_after_three_trials(run: Path, how: signal.Signals) -> tuple[int, str, list[dict[str, Any]]]:
    """Start a search, signal it once three trials are journaled; its status, standard error and journaled trials."""
    process = subprocess.Popen(
        [sys.executable, "-m", "autocomp", "search", *ARGUMENTS, "--out", str(run)],
        cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells ignore it for what runs behind
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        journal = run / "journal.jsonl"
        if journal.exists() and journal.read_text().count('"kind": "trial"') >= 3:
            break
        time.sleep(0.02)
    process.send_signal(how)
    _, error = process.communicate(timeout=60)
    kept = [entry["result"] for entry in Run.entries_of(run) if entry["kind"] == "trial"]
    assert len(kept) >= 3
    return process.returncode, error, kept


def trials_of(run: Path) -> list[dict[str, Any]]:
    return [entry["result"] for entry in Run.entries_of(run) if entry["kind"] == "trial"]


def test_a_search_killed_in_the_middle_loses_no_finished_trial(tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    status, _, kept = stop_after_three_trials(run, signal.SIGKILL)
    assert status == -signal.SIGKILL, "the search ended before it could be killed"
    resumed = command("resume", str(run), "--json", cwd=ROOT)
    assert resumed.returncode == 3, resumed.stderr  # a simulated engine verifies nothing
    assert trials_of(run)[: len(kept)] == kept
    assert command("search", *ARGUMENTS, "--out", str(whole), cwd=ROOT).returncode == 3
    pd.testing.assert_frame_equal(stable(run), stable(whole))


def test_an_interrupt_ends_cleanly_and_says_how_to_go_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    status, error, kept = stop_after_three_trials(run, signal.SIGINT)
    assert status == 130
    assert "Traceback" not in error and f"autocomp resume {run}" in error
    manifest = read_manifest(run)
    assert manifest.status == "interrupted"
    assert trials_of(run) == kept
    other = replace(manifest, versions={**manifest.versions, "torch": "1.0"})
    (run / "manifest.json").write_text(json.dumps(other.to_json()))
    with pytest.raises(RunError, match=r"started with torch 1\.0, and this is 2.*install that version"):
        autocomp.resume(run)


def test_an_unreachable_budget_ends_with_the_floor_and_a_marked_run(tmp_path: Path) -> None:
    with pytest.raises(InfeasibleError, match=r"below the floor.*most of its time.*relax it to about") as caught:
        run_search(simulated(tmp_path / "run", budget=("0.001ms",)))
    assert read_manifest(tmp_path / "run").status == "infeasible"
    floor = caught.value.floor
    assert floor is not None and floor["ratio"] < 1
    shares = [layer["share"] for layer in floor["layers"]]
    assert floor["layers"][0]["name"] == "conv1" and shares == sorted(shares, reverse=True)
    assert 0.5 < sum(shares) <= 1 and all(share > 0 for share in shares)
    (relaxed,) = (Budget.parse(text) for text in floor["relaxed"])
    assert 0.94 < floor["latency_ms"] / relaxed.limit <= 1  # the floor meets it, and hardly more is given away


def test_where_the_reference_meets_the_budget_the_fastest_within_a_point_is_returned(tmp_path: Path) -> None:
    digits = {"model": "zoo:resnet20", "data": "digits", "finetune_epochs": 0, "baseline_trials": 0, "finalists": 1}
    result = run_search(simulated(tmp_path / "run", budget=("1000ms",), **digits))
    assert any("meets the budget already" in note for note in result.notes)
    assert result.best is not None and result.best.latency is not None
    assert result.best.latency.ratio.value < 1
    assert result.best.selection_accuracy is not None
    reference = result.reference.search_accuracy or 0.0
    assert result.best.search_accuracy is not None and result.best.search_accuracy >= reference - 0.01


class Watched:
    """A split that remembers when it was read."""

    def __init__(self, inner: Split, journal: Path) -> None:
        self.inner, self.journal = inner, journal
        self.read_after: list[list[str]] = []
        self.digest = inner.digest

    def __len__(self) -> int:
        return len(self.inner)

    def batches(self, size: int) -> Iterator[Any]:
        kinds = [entry["kind"] for entry in map(json.loads, self.journal.read_text().splitlines())]
        self.read_after.append(kinds)
        yield from self.inner.batches(size)


def test_the_test_split_is_read_only_after_every_choice_is_journaled(tmp_path: Path) -> None:
    config = simulated(tmp_path / "run")
    splits = load_data(TINY["data"], DataOptions(calibration=128, search=100))
    watched = Watched(splits.test, tmp_path / "run" / "journal.jsonl")
    run_search(config, splits=replace(splits, test=watched))
    assert watched.read_after
    assert all("choice" in kinds for kinds in watched.read_after)
    assert sum(kinds.count("choice") for kinds in watched.read_after[:1]) == 1


def test_live_objects_are_searched_and_the_module_comes_back_unchanged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.BatchNorm2d(16), torch.nn.ReLU(),
        torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 2),
    )  # fmt: skip
    images = torch.randn(400, 3, 8, 8)
    with torch.no_grad():
        logits = model.eval()(images)
        model[-1].bias[1] -= (logits[:, 1] - logits[:, 0]).median()  # so that both classes occur equally often
        labels = model(images).argmax(1)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dataset = torch.utils.data.TensorDataset(images, labels)
    events: list[Event] = []
    result = autocomp.search(
        model, (dataset, dataset), "0.9x", engine="simulated", out=str(tmp_path / "run"), observer=events.append,
        trials=4, baseline_trials=2, batch=4,
    )  # fmt: skip
    assert result.best is not None and events
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(RunError, match="live objects"):
        (tmp_path / "run" / "result.json").unlink()
        autocomp.resume(tmp_path / "run")


def test_search_stays_a_function_whatever_was_imported() -> None:
    code = "import autocomp, autocomp.api; assert callable(autocomp.search) and callable(autocomp.search)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
