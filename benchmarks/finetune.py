"""Fine-tuning: CIFAR-10 ResNets at a latency and at half of their MACs, what an epoch costs, the default job.

    AUTOCOMP_SHARED=... python -m benchmarks.finetune [--part latency20|latency56|macs20|epoch|default ...] [--epochs N]

Writes ``benchmarks/results/finetune.json``. Best, uniform and random policies get the same epochs. Accuracy is the
engine's over all 10,000 test images, in percent; latency is that of the search, which training does not change. With
``--work`` a stopped part goes on from its checkpoints.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch

from autocomp.api import load_result
from autocomp.capabilities import Capabilities
from autocomp.compress import Compressed
from autocomp.controllers import make_controller
from autocomp.data import Indexed
from autocomp.outcome import Event, Step
from autocomp.policy import INT8, Policy
from autocomp.study.finetune import trained, training_images
from autocomp.study.score import paired_interval, predict
from autocomp.study.workbench import Workbench
from autocomp.train import TrainingRecipe
from benchmarks.common import cifar10, save, shared, show
from benchmarks.main_job import bounded, describe, search
from benchmarks.no_training import EIGHTHS, chosen, prepared, uniform

ROLES = ("best", "uniform", "random")
STEPS = 20
"""Steps that an epoch's cost is taken from."""


def tuned(bench: Workbench, policy: Policy, epochs: int, checkpoint: Path) -> dict[str, Any]:
    """Accuracy of a policy before and after training, on the engine."""

    def predictions(compressed: Compressed) -> Any:
        with bench.backend.build(bench.emitter.emit(compressed)) as engine:
            return predict(engine, bench.splits.test)

    recipe = TrainingRecipe(epochs=epochs)
    before = predictions(bench.emitter.finish(policy))
    compressed, losses = trained(bench, policy, training_images(bench), recipe, lambda event: None, checkpoint)
    after = predictions(compressed)
    return {
        "macs": bench.traced.graph.macs(policy),
        "before": 100 * before.accuracy,
        "after": 100 * after.accuracy,
        "change": paired_interval(after, before).to_json(),
        "losses": list(losses),
        "recipe": recipe.to_json(),
    }


def compare(
    title: str, bench: Workbench, policies: Mapping[str, Policy], ratios: Mapping[str, str], epochs: int, work: Path
) -> dict[str, Any]:
    """Every policy trained alike; a row each."""
    rows = {role: tuned(bench, policy, epochs, work / f"{title}-{role}.pt") for role, policy in policies.items()}
    table = []
    for role, row in rows.items():
        numbers = (row["macs"] / 1e6, row["before"], row["after"])
        table.append(
            [role, ratios[role], *(f"{value:.2f}" for value in numbers), bounded(row["change"], "{:+.2f}", 100)]
        )
    columns = ["", "ratio", "MMACs", "before, %", "after, %", "change"]
    show(f"{title}, {epochs} epochs", columns, table)
    return {"epochs": epochs, "rows": rows, "ratios": dict(ratios)}


def at_latency(depth: int, budget: str, epochs: int, work: Path) -> dict[str, Any]:
    """A search at a measured latency, then training of its three contenders."""
    data, out = cifar10(work), work / f"search{depth}"
    weights = shared() / "weights" / f"cifar10_resnet{depth}.safetensors"
    arguments = ["--model", f"zoo:resnet{depth}", "--weights", str(weights), "--data", f"npz:{data}"]
    if not (out / "result.json").exists():
        search([*arguments, "--budget", budget, "--batch", "32", "--trials", "100"], out)
    found = load_result(out).contenders
    rows = {role: found[role] for role in ROLES if role in found}
    policies = {role: row.policy for role, row in rows.items()}
    ratios = {role: f"{row.latency.ratio.value:.3f}" if row.latency else "-" for role, row in rows.items()}
    return compare(f"ResNet-{depth} at {budget}", prepared(depth, data, 0, "default"), policies, ratios, epochs, work)


def at_macs(epochs: int, work: Path) -> dict[str, Any]:
    """Half of the multiply-accumulates of ResNet-20, in float32."""
    bench = prepared(20, cifar10(work), 0)
    whole = bench.traced.graph.macs(Policy())

    def part(policy: Policy) -> float:
        return bench.traced.graph.macs(policy) / whole

    drawn = make_controller("random", EIGHTHS.restrict(bench.traced.graph, Capabilities()), 0)
    at_random = next(policy for _ in range(1000) for policy in drawn.ask(1) if 0.45 < part(policy) <= 0.5)
    policies = {"best": chosen(bench), "uniform": uniform(bench), "random": at_random}
    ratios = {role: f"{part(policy):.3f} MACs" for role, policy in policies.items()}
    return compare("ResNet-20 at half of its MACs", bench, policies, ratios, epochs, work)


def epoch(work: Path) -> dict[str, Any]:
    """Processor time of training steps with and without a teacher, int8 trained as int8 and in float."""
    bench = prepared(20, cifar10(work), 0, "default")
    torch.set_num_threads(1)
    graph = bench.traced.graph
    kept = {group.name: group.channels // 2 for group in graph.groups if not group.name.startswith("layer3")}
    policy = Policy(kept, frozenset(), {layer.name: INT8 for layer in graph.layers})
    recipe = TrainingRecipe(epochs=1)
    images = training_images(bench)
    few = images.take(np.arange(STEPS * recipe.batch))
    assert isinstance(few, Indexed)

    def seconds(recipe: TrainingRecipe) -> float:
        times: list[float] = []

        def watch(event: Event) -> None:
            if isinstance(event, Step):
                times.append(process_time())

        trained(bench, policy, few, recipe, watch, work / "none.pt")
        (work / "none.pt").unlink()
        return float(np.median(np.diff(times))) * len(images) / recipe.batch

    found = {}
    for quantization in ("learned", "calibrated"):
        alike = replace(recipe, quantization=quantization)
        alone, taught = seconds(replace(alike, distillation=0.0)), seconds(alike)
        found[quantization] = {"without a teacher, s": alone, "with, s": taught, "ratio": taught / alone}
    rows = [[name, *(f"{value:.2f}" for value in row.values())] for name, row in found.items()]
    show("an epoch of half a ResNet-20, one thread, processor time", ["int8", "alone, s", "taught, s", "ratio"], rows)
    return found


def default(epochs: int, work: Path) -> dict[str, Any]:
    """The default job, fine-tuned at its end."""
    found = search(["--budget", "15ms", "--finetune-epochs", str(epochs)], work / "default")
    describe(f"autocomp search --budget 15ms --finetune-epochs {epochs}", found)
    return {"epochs": epochs, **found}


def main() -> None:
    parts: dict[str, Callable[[int | None, Path], dict[str, Any]]] = {
        "latency20": lambda epochs, work: at_latency(20, "0.5x", epochs or 10, work),
        "latency56": lambda epochs, work: at_latency(56, "0.4x", epochs or 4, work),
        "macs20": lambda epochs, work: at_macs(epochs or 10, work),
        "epoch": lambda epochs, work: epoch(work),
        "default": lambda epochs, work: default(epochs or 5, work),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=list(parts))
    parser.add_argument("--epochs", type=int, help="in place of each part's own")
    parser.add_argument(
        "--work", type=Path, help="folder for CIFAR-10, runs and checkpoints; a temporary one by default"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        for part in args.part or list(parts):
            print(f"written: {save('finetune', {part: parts[part](args.epochs, work)})}")


if __name__ == "__main__":
    main()
