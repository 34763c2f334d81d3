"""ResNets at half of their MACs, trained with distillation: at most 100 epochs, as many as fit."""

import os
import tempfile
from dataclasses import replace
from math import ceil
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from autocomp.data import Indexed
from autocomp.errors import AutocompError
from autocomp.outcome import Event, Step
from autocomp.policy import Policy
from autocomp.study.training import Course, trained, training_images
from autocomp.study.workbench import Workbench
from autocomp.train import TrainingRecipe
from benchmarks.common import cifar10
from benchmarks.finetune import tuned
from benchmarks.gpu.job import CannotRunError, Job
from benchmarks.no_training import chosen, prepared

__all__ = ["finetune", "fitting", "row_of"]

GOALS = {20: 91.26, 56: 93.77}
"""Depth -> top-1 over all 10,000 test images, in percent, to be beaten at half of the MACs."""
SHARES = {20: 0.25, 56: 1.0}
"""Depth -> part of the time that is left."""
RECIPE = TrainingRecipe(epochs=100, weight_decay=5e-4, device="cuda")
STEPS = 60
"""From which the time of an epoch is taken."""
SCORED_S = 40.0
"""To score a model on the processor, before training and after."""


def finetune(job: Job) -> None:
    """A row for each network. One that was stopped goes on from its checkpoint, where that is still there.

    Raises:
        CannotRunError: there is no CUDA device for torch, or no data.
    """
    if RECIPE.device == "cuda" and not torch.cuda.is_available():
        raise CannotRunError("torch finds no CUDA device: run 'autocomp doctor' to see what is missing")
    if "AUTOCOMP_SHARED" not in os.environ:
        raise CannotRunError("set AUTOCOMP_SHARED to the folder with CIFAR-10 and the trained ResNets")
    for depth, goal in GOALS.items():
        title = f"resnet{depth}"
        known: dict[str, Any] = job.found().get(title, {})
        if "after" in known:
            continue
        seconds = SHARES[depth] * job.left_s
        try:
            begun = perf_counter()
            bench = prepared(depth, cifar10(job.work), 0)
            policy = Policy.from_json(known["chosen"]) if "chosen" in known else chosen(bench)["free"]
            row_of(job, title, bench, policy, seconds - (perf_counter() - begun), goal)
        except AutocompError as error:
            job.keep(**{title: {**job.found().get(title, {}), "error": str(error)}})


def row_of(job: Job, title: str, bench: Workbench, policy: Policy, seconds: float, goal: float) -> None:
    """Train a policy for as many epochs as fit and keep what came of it; what is decided is kept before."""
    known: dict[str, Any] = job.found().get(title, {})
    recipe = TrainingRecipe.from_json(known["recipe"]) if "recipe" in known else fitting(bench, policy, seconds)
    graph = bench.traced.graph
    begun: dict[str, Any] = {
        "chosen": policy.to_json(),
        "recipe": recipe.to_json(),
        "macs_ratio": graph.macs(policy) / graph.macs(Policy()),
        "goal": goal,
    }
    job.keep(**{title: begun})
    row = tuned(bench, policy, recipe, title, job.work)
    job.keep(**{title: {**begun, **row, "met": row["after"] > goal}})


def fitting(bench: Workbench, policy: Policy, seconds: float) -> TrainingRecipe:
    """The recipe, for as many epochs as a few steps say that there is time for: one at least."""
    images = training_images(bench.splits)
    few = images.take(np.arange(min(STEPS * RECIPE.batch, len(images))))
    assert isinstance(few, Indexed)
    times: list[float] = []

    def watch(event: Event) -> None:
        if isinstance(event, Step):
            times.append(perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        trained(Course(bench, few, replace(RECIPE, epochs=1), watch, Path(folder)), policy)
    epoch_s = float(np.median(np.diff(times))) * ceil(len(images) / RECIPE.batch)
    return replace(RECIPE, epochs=max(1, min(RECIPE.epochs, int((seconds - SCORED_S) / epoch_s))))
