"""Fine-tuning on a cluster: Ray Tune trains a model at several learning rates and stops the worse ones early."""

import os
import shutil
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from io import StringIO
from math import inf
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler

from autocomp.compress.wire import Packed, pack, unpack
from autocomp.errors import CompressError
from autocomp.outcome import EpochDone, Event, Note, Observer, Phase
from autocomp.study.worker import line_of
from autocomp.train import Training, TrainingRecipe, Tuned, finetune

__all__ = ["RATES", "finetune_on_ray"]

RATES = (1 / 3, 1.0, 3.0)
"""Learning rates that are tried, over the recipe's."""
RESTARTS = 2
"""Times that a training whose worker was lost is begun again, from its last checkpoint."""
FOLDER = "tune"
"""Of Ray Tune's own records, while it works."""


@dataclass(frozen=True)
class _Job:
    """What every trial is given: a training whose modules travel as lists of their nodes.

    Attributes:
        rest: the training but for its modules, to be trained at another rate.
    """

    student: Packed
    teacher: Packed | None
    rest: Training

    def at(self, lr: float) -> tuple[TrainingRecipe, Path]:
        """The recipe at another learning rate, and its checkpoint."""
        kept = self.rest.checkpoint
        assert kept is not None
        return replace(self.rest.recipe, lr=lr), kept.with_suffix(f".{lr:g}.pt")

    def training(self, lr: float) -> Training:
        teacher = None if self.teacher is None else unpack(self.teacher)
        recipe, kept = self.at(lr)
        return replace(self.rest, module=unpack(self.student), teacher=teacher, recipe=recipe, checkpoint=kept)


def finetune_on_ray(training: Training, observer: Observer) -> Tuned:
    """As `autocomp.train.finetune`, at several learning rates at once; the one whose training loss ends lowest counts.

    Asynchronous successive halving (Li et al., arXiv:1810.05934, algorithm 2) stops a training after an epoch in which
    it is not among the best third of those that came as far. No image that a later choice is made on is looked at.
    Every training keeps its own checkpoint beside ``checkpoint``, on storage that all nodes reach: one whose worker is
    lost, or all of them after a stop of the search, go on from there.

    Raises:
        DataError, ModelError, CompressError: as `autocomp.train.finetune`; the last one where all trainings diverged.
    """
    student: Any = training.module
    teacher: Any = training.teacher
    recipe, checkpoint = training.recipe, training.checkpoint
    assert checkpoint is not None
    records = checkpoint.resolve().parent / FOLDER
    shutil.rmtree(records, ignore_errors=True)
    apart: Any = None  # modules travel apart
    rest = replace(training, module=apart, teacher=apart, checkpoint=checkpoint.resolve())
    job = _Job(pack(student), None if teacher is None else pack(teacher), rest)
    observer(Phase("finetune"))
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # a stop is the user's: it must not look like an end
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_train, job=job), {"cpu": 1, "gpu": int(recipe.device == "cuda")}),
        param_space={"lr": tune.grid_search([rate * recipe.lr for rate in RATES])},
        tune_config=tune.TuneConfig(
            metric="loss",
            mode="min",
            scheduler=ASHAScheduler(time_attr="epoch", max_t=training.epochs, reduction_factor=len(RATES)),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=FOLDER,
            storage_path=str(records.parent),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=RESTARTS),
        ),
    )
    with redirect_stdout(StringIO()):  # for its banner
        results = tuner.fit()
    if results.errors:
        failed = f"{len(results.errors)} of {len(results)} trainings on the cluster failed"
        observer(Note(f"{failed}, the last one so: {line_of(results.errors[-1])}"))
    ended = [(result.metrics or {}, result.config or {}) for result in results]
    _, best = min(ended, key=lambda end: (-end[0].get("epoch", 0), end[0].get("loss", inf)))
    shutil.rmtree(records)
    chosen, kept = job.at(best["lr"])
    return finetune(replace(training, recipe=chosen, checkpoint=kept), observer)  # none of whose steps is left to do


def _train(config: Mapping[str, Any], job: _Job) -> None:
    """One training; where it diverges it ends with the epochs it has."""

    def watch(event: Event) -> None:
        if isinstance(event, EpochDone) and event.number < job.rest.epochs:
            tune.report({"epoch": event.number, "loss": event.loss})

    with suppress(CompressError):
        tuned = finetune(job.training(config["lr"]), watch)
        tune.report({"epoch": job.rest.epochs, "loss": tuned.losses[-1]})
