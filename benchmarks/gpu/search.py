"""A search at half the latency: ResNet-56 on CIFAR-10, and ResNet-50 with random weights for the latency side."""

import os
from time import perf_counter
from typing import Any

from autocomp.engines import BackendSpec, make_backend
from autocomp.policy import FP32, INT8
from benchmarks.common import cifar10, shared
from benchmarks.gpu.job import Job, command
from benchmarks.gpu.networks import FP16, everywhere, network

__all__ = ["search", "trials_for"]

ASKED = ("--budget", "0.5x", "--space", "gpu", "--json")
FEW = ("--calibration-images", "64", "--search-images", "32", "--selection-images", "64")
RANDOM = ("--model", "torchvision:resnet50", "--data", "random:3x224x224", "--batch", "8", *FEW)
TRIED = ("resnet18", 64)
"""Network and side of the images that say how long an engine takes."""
FEWEST, MOST = 8, 48
TIMED_S = 0.5
"""To time an engine beside the reference."""
TRIAL_ENGINES = 4
"""That take as long as a trial does: one to be timed, one to be scored, of a network with more layers."""


def search(job: Job) -> None:
    """Two thirds of the time for ResNet-56. A search that was stopped goes on where its run folder is still there."""
    name = job.begin()
    trial_s = TRIAL_ENGINES * _engine_s(name)
    runs: dict[str, Any] = dict(job.found().get("runs", {}))
    if "AUTOCOMP_SHARED" in os.environ:
        weights = str(shared() / "weights" / "cifar10_resnet56.safetensors")
        data = f"npz:{cifar10(job.work)}"
        given = ("--model", "zoo:resnet56", "--weights", weights, "--data", data, "--batch", "32")
        runs["resnet56"] = _one(job, runs, "resnet56", (*given, "--engine", name), trial_s, 2 / 3)
    else:
        runs["resnet56"] = {"error": "set AUTOCOMP_SHARED to the folder with CIFAR-10 and the trained ResNets"}
    job.keep(runs=runs, goals=[_goal(runs["resnet56"])])
    runs["resnet50"] = _one(job, runs, "resnet50", (*RANDOM, "--engine", name), trial_s, 1.0)
    job.keep(runs=runs)


def _one(
    job: Job, runs: dict[str, Any], name: str, given: tuple[str, ...], trial_s: float, share: float
) -> dict[str, Any]:
    known: dict[str, Any] = runs.get(name, {"error": ""})
    if "error" not in known:
        return known
    seconds = share * job.left_s
    if (job.work / name / "manifest.json").exists():
        return command(job.work, "resume", name, "--json", seconds=seconds)
    trials = trials_for(seconds, trial_s)
    counts = ("--trials", str(trials), "--baseline-trials", str(trials // 4))
    return command(job.work, "search", *given, *ASKED, *counts, "--out", name, seconds=seconds)


def trials_for(seconds: float, trial_s: float) -> int:
    """As many as fit, with a quarter as many for each of both baselines and a third of the time for all else."""
    return max(FEWEST, min(MOST, int(2 / 3 * seconds / trial_s / 1.5)))


def _engine_s(name: str) -> float:
    """Seconds to build an engine that no cache holds, and to time it for a moment."""
    backend = make_backend(BackendSpec(name, fresh=True))
    made, known = network(*TRIED), backend.capabilities().precisions
    kind = next(kind for kind in (INT8, FP16, FP32) if kind in known)
    file = made.file(everywhere(made.graph, kind), backend)
    begun = perf_counter()
    with backend.build(file) as engine:
        engine.time(10)
    return perf_counter() - begun + TIMED_S


def _goal(run: dict[str, Any]) -> dict[str, Any]:
    verified = run.get("verified")
    return {"what": "ResNet-56 at 0.5x of fp32 without TF32, verified", "met": verified}
