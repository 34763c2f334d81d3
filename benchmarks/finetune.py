"""Fine-tuning: CIFAR-10 ResNets at a latency and at half of their MACs, what an epoch costs, the default job.

    AUTOCOMP_SHARED=... python -m benchmarks.finetune [--part latency20|latency56|macs20|epoch|default ...] [--epochs N]
        [--role best|uniform|random ...] [--work FOLDER]

Writes ``benchmarks/results/finetune.json``, after each policy. Best, uniform and random policies get the same epochs.
Accuracy is the engine's over all 10,000 test images, in percent; latency is that of the search, which training does not
change. With ``--work`` nothing is done twice: a search at a latency that was stopped goes on, a training goes on from
its checkpoint (with the same OMP_NUM_THREADS), and a policy that was trained by the same recipe is read back, so that
``--role best`` may come first.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch

from autocomp.api import load_result, resume
from autocomp.capabilities import Capabilities
from autocomp.compress import Compressed
from autocomp.data import Indexed
from autocomp.outcome import EpochDone, Event, Step, TrialDone
from autocomp.policy import INT8, Policy, Recipe
from autocomp.storage import write_atomic
from autocomp.study.conduct import conduct, manifest_of
from autocomp.study.executors import LocalCrew
from autocomp.study.run import Run
from autocomp.study.score import paired_interval, predict
from autocomp.study.search import begin
from autocomp.study.training import Course, trained, training_images
from autocomp.study.workbench import Workbench, prepare
from autocomp.train import TrainingRecipe
from benchmarks.common import cifar10, save, shared, show
from benchmarks.main_job import bounded, describe, search
from benchmarks.no_training import RANKED, prepared

ROLES = ("best", "uniform", "random")
STEPS = 20
"""Steps that an epoch's cost is taken from."""
HARD = TrainingRecipe(epochs=10, lr=0.0015, batch=64, optimizer="muon", weight_decay=0.01, hints=5.0, mixup=1.0)
"""Where much is lost."""


@dataclass(frozen=True)
class Job:
    """What is asked of a part: how to train, whom, and where everything is kept."""

    part: str
    recipe: TrainingRecipe
    roles: Sequence[str]
    work: Path


def tuned(bench: Workbench, policy: Policy, recipe: TrainingRecipe, title: str, work: Path) -> dict[str, Any]:
    """Accuracy of a policy before and after training, on the engine."""

    def predictions(compressed: Compressed) -> Any:
        with bench.backend.build(bench.emitter.emit(compressed)) as engine:
            return predict(engine, bench.splits.test)

    def watch(event: Event) -> None:
        if isinstance(event, EpochDone):
            print(f"{title}: epoch {event.number}, loss {event.loss:.4f}", file=sys.stderr, flush=True)

    before = predictions(bench.emitter.finish(policy))
    compressed, found = trained(Course(bench, training_images(bench.splits), recipe, watch, work), policy)
    after = predictions(compressed)
    return {
        "policy": policy.digest,
        "macs": bench.traced.graph.macs(policy),
        "before": 100 * before.accuracy,
        "after": 100 * after.accuracy,
        "change": paired_interval(after, before).to_json(),
        "losses": list(found.losses),
        "recipe": recipe.to_json(),
    }


def compare(
    title: str, job: Job, policies: Mapping[str, Policy], ratios: Mapping[str, str], bench: Callable[[], Workbench]
) -> None:
    """Every policy trained alike; a row each, kept when it is there.

    Args:
        bench: made when there is something left to train.
    """
    recipe, made = job.recipe, cache(bench)
    rows: dict[str, dict[str, Any]] = {}
    for role, policy in policies.items():
        path = job.work / f"{job.part}-{role}-{recipe.digest[:8]}.json"
        row = json.loads(path.read_text()) if path.exists() else None
        if row is None or row["policy"] != policy.digest:
            if role not in job.roles:
                continue
            row = tuned(made(), policy, recipe, path.stem, job.work)
            write_atomic(path, json.dumps(row))
        rows[role] = row
        save("finetune", {job.part: {"epochs": recipe.epochs, "rows": rows, "ratios": dict(ratios)}})
    table = []
    for role, row in rows.items():
        numbers = (row["macs"] / 1e6, row["before"], row["after"])
        table.append(
            [role, ratios[role], *(f"{value:.2f}" for value in numbers), bounded(row["change"], "{:+.2f}", 100)]
        )
    columns = ["", "ratio", "MMACs", "before, %", "after, %", "change"]
    show(f"{title}, {recipe.epochs} epochs", columns, table)


def at_latency(depth: int, budget: str, job: Job) -> None:
    """A search at a measured latency, then training of its three contenders."""
    data, out = cifar10(job.work), job.work / f"search{depth}"
    weights = shared() / "weights" / f"cifar10_resnet{depth}.safetensors"
    arguments = ["--model", f"zoo:resnet{depth}", "--weights", str(weights), "--data", f"npz:{data}"]
    if not (out / "manifest.json").exists():
        search([*arguments, "--budget", budget, "--batch", "32", "--trials", "100", "--finetune-epochs", "0"], out)
    found = resume(out).contenders  # of a finished search what it found
    rows = {role: found[role] for role in ROLES if role in found}
    policies = {role: row.policy for role, row in rows.items()}
    ratios = {role: f"{row.latency.ratio.value:.3f}" if row.latency else "-" for role, row in rows.items()}
    compare(f"ResNet-{depth} at {budget}", job, policies, ratios, lambda: prepared(depth, data, 0, "default"))


def at_macs(job: Job) -> None:
    """Half of the multiply-accumulates of ResNet-20, in float32: a search over widths and ranks, then training.

    Every layer stays, since what is trained for epochs learns more with its depth. Trials are solved in sequence, as
    the model is that training begins with.
    """
    bench, out = prepared(20, cifar10(job.work), 0), job.work / "search-macs20"
    graph = bench.traced.graph

    def watch(event: Event) -> None:
        if isinstance(event, TrialDone):
            print(f"{event.result.role} {event.result.number}: {event.result.objective}", file=sys.stderr, flush=True)

    if not (out / "result.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        config = replace(bench.config, trials=100, baseline_trials=100)
        tried = prepare(config, watch, recipe=Recipe(reconstruction="sequential", images=256))
        fine = replace(tried, space=RANKED.restrict(graph, Capabilities()))
        with begin(fine, LocalCrew()) as prologue, Run.create(out, manifest_of(fine)) as run:
            conduct(fine, prologue, run, watch)
    found = load_result(out).contenders
    policies = {role: found[role].policy for role in ROLES if role in found}
    ratios = {role: f"{graph.macs(policy) / graph.macs(Policy()):.3f} MACs" for role, policy in policies.items()}
    compare("ResNet-20 at half of its MACs", job, policies, ratios, lambda: bench)


def epoch(job: Job) -> None:
    """Processor time of training steps with and without a teacher, int8 trained as int8 and in float."""
    bench = prepared(20, cifar10(job.work), 0, "default")
    torch.set_num_threads(1)
    graph = bench.traced.graph
    kept = {group.name: group.channels // 2 for group in graph.groups if not group.name.startswith("layer3")}
    policy = Policy(kept, frozenset(), {layer.name: INT8 for layer in graph.layers})
    recipe = job.recipe
    images = training_images(bench.splits)
    few = images.take(np.arange(STEPS * recipe.batch))
    assert isinstance(few, Indexed)

    def seconds(recipe: TrainingRecipe) -> float:
        times: list[float] = []

        def watch(event: Event) -> None:
            if isinstance(event, Step):
                times.append(process_time())

        with tempfile.TemporaryDirectory() as folder:
            trained(Course(bench, few, recipe, watch, Path(folder)), policy)
        return float(np.median(np.diff(times))) * len(images) / recipe.batch

    found = {}
    for quantization in ("learned", "calibrated"):
        alike = replace(recipe, quantization=quantization)
        alone, taught = seconds(replace(alike, distillation=0.0)), seconds(alike)
        found[quantization] = {"without a teacher, s": alone, "with, s": taught, "ratio": taught / alone}
    rows = [[name, *(f"{value:.2f}" for value in row.values())] for name, row in found.items()]
    show("an epoch of half a ResNet-20, one thread, processor time", ["int8", "alone, s", "taught, s", "ratio"], rows)
    save("finetune", {job.part: found})


def default(job: Job) -> None:
    """The default job, fine-tuned at its end: timed, so never in parts."""
    with tempfile.TemporaryDirectory() as folder:
        found = search(["--budget", "15ms"], Path(folder) / "default")
    describe("autocomp search --budget 15ms", found)
    save("finetune", {job.part: found})


PARTS: Mapping[str, tuple[Callable[[Job], None], TrainingRecipe]] = {
    "latency20": (partial(at_latency, 20, "0.5x"), TrainingRecipe(epochs=10)),
    "latency56": (partial(at_latency, 56, "0.4x"), TrainingRecipe(epochs=4)),
    "macs20": (at_macs, HARD),
    "epoch": (epoch, TrainingRecipe(epochs=1)),
    "default": (default, TrainingRecipe()),
}
"""Name -> what it does, and how it trains."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=list(PARTS))
    parser.add_argument("--epochs", type=int, help="in place of each part's own; the default job keeps its own")
    parser.add_argument("--role", action="append", choices=ROLES, help="whom to train; all by default")
    parser.add_argument(
        "--work", type=Path, help="folder for CIFAR-10, runs and checkpoints; a temporary one by default"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for name in args.part or PARTS:
            part, recipe = PARTS[name]
            part(Job(name, replace(recipe, epochs=args.epochs or recipe.epochs), args.role or ROLES, work))


if __name__ == "__main__":
    main()
