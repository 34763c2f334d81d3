"""The GPU benchmark without a GPU: every part to its end on the simulated engine and a small network, and what is said
of what cannot run, has no time, or was stopped."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
import torch

from autocomp.compress import Traced
from autocomp.config import SearchConfig
from autocomp.engines import BackendSpec, load_template, make_backend
from autocomp.engines.tensorrt.backend import NUMERICS
from autocomp.errors import EngineError
from autocomp.policy import INT8, Policy
from autocomp.results import TimingProtocol
from autocomp.study.workbench import Workbench, prepare
from autocomp.train import TrainingRecipe
from benchmarks.gpu import __main__ as whole
from benchmarks.gpu import engines, profile, search, training
from benchmarks.gpu.job import CannotRunError, Job
from benchmarks.gpu.networks import Network, variants
from tests.engines.nets import resnet
from tests.study import tiny

FEW = {"calibration_images": 32, "search_images": 32, "selection_images": 32}
FLAGS = tuple(word for key, value in FEW.items() for word in (f"--{key.replace('_', '-')}", str(value)))
TINY = ("--model", "tests.tiny:model", "--data", "tests.tiny:data", "--batch", "4")


@pytest.fixture(scope="module")
def made() -> Network:
    net = resnet(depth=8, width=8, size=8)
    return Network(net.graph, load_template(net.onnx, net.graph), net.tensors)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path / "gpu.json", tmp_path, "simulated", monotonic() + 600)


@pytest.fixture
def small(made: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part with small networks."""
    short = TimingProtocol(warmup_ms=1, blocks=2, block_ms=1)
    for name, value in {"NETWORKS": ("small",), "BATCHES": (8, 1), "PROTOCOL": short, "PROCESSES": 1}.items():
        monkeypatch.setattr(engines, name, value)
    monkeypatch.setattr(engines, "GOALS", (("small", 8, "int8", 1.0), ("other", 8, "int8", 1.0)))
    monkeypatch.setattr(engines, "network", lambda name, size: made)
    monkeypatch.setattr(profile, "PROFILED", {"tiny": TINY})
    few = SearchConfig(model="tests.tiny:model", data="tests.tiny:data", budget=("0.5x",), batch=4, **FEW)  # type: ignore[arg-type]
    monkeypatch.setattr(profile, "PREDICTED", replace(few, space="gpu"))
    for name, value in {"POLICIES": 10, "BUILT": 1 / 600, "SURVEYED": 1 / 600, "START_S": 600.0}.items():
        monkeypatch.setattr(profile, name, value)
    monkeypatch.setattr(search, "RANDOM", (*TINY, *FLAGS))
    monkeypatch.delenv("AUTOCOMP_SHARED", raising=False)


def test_rows_hold_the_speedups_of_the_engine(made: Network, job: Job) -> None:
    spec = BackendSpec("simulated", batch=8)
    rows = list(engines.rows_of(made, "resnet8", spec, [], job))
    assert [row["variant"] for row in rows] == ["fp32", "int8", "fp32, half the channels", "fp32, tf32"]
    backend = make_backend(spec)
    policy = Policy(precisions={layer.name: INT8 for layer in made.graph.layers})
    times = [backend.build(made.file(chosen, backend)).time(1)[0] for chosen in (Policy(), policy)]
    assert rows[1]["speedup"] == pytest.approx(times[0] / times[1])
    assert rows[0]["speedup"] == rows[3]["speedup"] == pytest.approx(1.0)
    rest = engines.rows_of(made, "resnet8", spec, rows[:3], job)
    assert [row["variant"] for row in rest] == ["fp32, tf32"]


def test_goals_are_met_missed_or_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"network": "a", "batch": 8, "variant": "int8", "speedup": 2.5}]
    asked = (("a", 8, "int8", 2.0), ("a", 8, "int8", 3.0), ("a", 1, "int8", 2.0))
    monkeypatch.setattr(engines, "GOALS", asked)
    assert [goal["met"] for goal in engines.goals(rows)] == [True, False, None]


def test_files_of_tensorrt_are_symmetric(made: Network) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="not installed: pip install 'autocomp[tensorrt-rtx]'")
    backend = make_backend(BackendSpec("tensorrt-rtx", batch=2, hardware="sm89"))
    assert backend.capabilities().numerics == NUMERICS
    found = variants(made.graph, backend)
    assert {"fp16", "bf16", "int8", "fp8", "fp16-2:4", "int8-2:4"} <= found.keys()
    for name in ("fp8", "int8-2:4"):
        with backend.build(made.file(found[name].policy, backend)):
            pass
    half = found["fp32, half the channels"].policy
    policy = Policy(half.kept, precisions={layer.name: INT8 for layer in made.graph.layers})
    with backend.build(made.file(policy, backend)):
        pass


@pytest.mark.parametrize("part", sorted(whole.PARTS))
def test_a_part_that_cannot_run_says_why(part: str, job: Job) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    whole.record(part, replace(job, engine=None))
    found = job.found()
    answers = "torch finds no CUDA device" if part == "finetune" else "tensorrt: .*tensorrt-rtx: .*torch-cuda: no CUDA"
    assert re.search(answers, found["cannot_run"]) and not found["complete"] and found["doctor"]["engines"]


@pytest.mark.slow
def test_every_part_runs_to_its_end(small: None, tmp_path: Path) -> None:
    parts = ("engines", "profile", "search")
    words = [word for part in parts for word in ("--part", part)]
    whole.main([*words, "--out", str(tmp_path), "--engine", "simulated", "--minutes", "20"])
    found = {part: json.loads((tmp_path / f"gpu_{part}.json").read_text()) for part in parts}
    assert all(part["complete"] and "cannot_run" not in part for part in found.values()), found
    assert len(found["engines"]["rows"]) == 8 and found["engines"]["fresh"]["met"]
    assert [goal["met"] is None for goal in found["engines"]["goals"]] == [False, True]
    assert found["profile"]["built"]["tiny"]["kernels"] > 0
    assert list((tmp_path / "hardware_profiles").glob("*/kernels.csv"))
    assert 2 <= found["profile"]["resnet56"]["policies"] <= 10 and found["profile"]["goals"][0]["met"] in (True, False)
    assert "set AUTOCOMP_SHARED" in found["search"]["runs"]["resnet56"]["error"]
    run = found["search"]["runs"]["resnet50"]
    assert "error" not in run and (tmp_path / "work" / "resnet50" / "model.onnx").exists()
    assert found["search"]["goals"][0]["met"] is None


def test_what_there_was_no_time_for_is_measured_later(small: None, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "repeated", lambda *given: {"spread": 0.0})
    rows_of = engines.rows_of

    def broken(*given: Any) -> Any:
        yield next(rows_of(*given))
        raise KeyboardInterrupt

    monkeypatch.setattr(engines, "rows_of", broken)
    with pytest.raises(KeyboardInterrupt):
        engines.engines(job)
    assert len(job.found()["rows"]) == 1
    monkeypatch.setattr(engines, "rows_of", rows_of)
    engines.engines(replace(job, deadline=0.0))
    assert len(job.found()["rows"]) == 1
    assert job.found()["not_measured"] == ["simulated, small, batch 8", "simulated, small, batch 1"]
    engines.engines(job)
    found = job.found()
    assert len(found["rows"]) == 8 and found["not_measured"] == [] and found["rows"][0]["variant"] == "fp32"
    with pytest.raises(CannotRunError, match="holds what simulated did, and onnxruntime is to be measured"):
        replace(job, engine="onnxruntime").begin()


def test_an_engine_that_cannot_be_built_is_a_row(made: Network, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make_backend(BackendSpec("simulated", 8))
    whole_file, build = made.file(Policy(), backend), type(backend).build

    def refusing(self: Any, onnx: bytes) -> Any:
        if onnx != whole_file:
            raise EngineError("out of GPU memory")
        return build(self, onnx)

    monkeypatch.setattr(type(backend), "build", refusing)
    rows = list(engines.rows_of(made, "resnet8", BackendSpec("simulated", 8), [], job))
    assert [row.get("error") for row in rows] == [None, "out of GPU memory", "out of GPU memory", None]


def test_a_fault_ends_its_part_alone(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(job: Job) -> None:
        job.keep(rows=[1])
        raise ZeroDivisionError

    monkeypatch.setattr(whole, "PARTS", {"engines": fault})
    whole.record("engines", job)
    found = job.found()
    assert found["rows"] == [1] and "ZeroDivisionError" in found["cannot_run"] and not found["complete"]
    monkeypatch.setattr(whole, "PARTS", {"engines": lambda job: None})
    whole.record("engines", job)
    assert job.found()["complete"] and "cannot_run" not in job.found()


def test_a_search_that_was_stopped_goes_on(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def command(folder: Path, *arguments: str, seconds: float) -> dict[str, Any]:
        asked.append(arguments)
        (folder / "resnet50").mkdir(exist_ok=True)
        (folder / "resnet50" / "manifest.json").touch()
        return {"error": "stopped after 60 s"} if len(asked) == 1 else {"verified": True}

    monkeypatch.setattr(search, "command", command)
    monkeypatch.delenv("AUTOCOMP_SHARED", raising=False)
    for _ in range(3):
        search.search(job)
    assert [arguments[0] for arguments in asked] == ["search", "resume"]
    assert job.found()["runs"]["resnet50"] == {"verified": True}
    assert search.trials_for(1e6, 1.0) == 48 and search.trials_for(60, 20.0) == 8
    assert search.trials_for(480, 16.0) == 13


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    train, test = tiny.images(256, 0), tiny.images(64, 1)
    path = tmp_path / "images.npz"
    np.savez(path, x_train=train[0], y_train=train[1], x_test=test[0], y_test=test[1])
    config = SearchConfig(
        model="tests.study.tiny:model", data=f"npz:{path}", budget=("0.5xMACs",), batch=8, space="prune", **FEW  # type: ignore[arg-type]
    )  # fmt: skip
    return prepare(config, lambda event: None)


def half(bench: Workbench) -> Policy:
    traced: Traced = bench.traced
    return Policy({group.name: group.channels // 2 for group in traced.graph.groups})


def test_training_is_for_the_epochs_that_fit_and_kept(
    bench: Workbench, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To its end on the processor; what was decided before a stop stays."""
    monkeypatch.setattr(training, "RECIPE", TrainingRecipe(epochs=3, batch=32))
    monkeypatch.setattr(training, "GOALS", {20: 101.0})
    monkeypatch.setattr(training, "prepared", lambda depth, data, seed: bench)
    monkeypatch.setattr(training, "cifar10", lambda folder: folder)
    monkeypatch.setattr(training, "chosen", lambda bench: {"free": half(bench)})
    monkeypatch.setenv("AUTOCOMP_SHARED", str(job.work))
    assert training.fitting(bench, half(bench), 0.0).epochs == 1
    tuned: Callable[..., dict[str, Any]] = training.tuned

    def stopped(*given: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "tuned", stopped)
    with pytest.raises(KeyboardInterrupt):
        training.finetune(job)
    begun = job.found()["resnet20"]
    assert begun["recipe"]["epochs"] == 3 and begun["macs_ratio"] < 0.6 and "after" not in begun
    monkeypatch.setattr(training, "tuned", tuned)
    monkeypatch.setattr(training, "fitting", stopped)
    training.finetune(job)
    found = job.found()["resnet20"]
    assert len(found["losses"]) == 3 and 0 <= found["after"] <= 100 and found["met"] is False
    training.finetune(job)
    assert job.found()["resnet20"] == found
