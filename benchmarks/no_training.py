"""Accuracy without training: pruning CIFAR-10 ResNets by half, int8 and 4-bit weights, what a policy costs, memory.

    AUTOCOMP_SHARED=... python -m benchmarks.no_training [--part resnet20|resnet56|int8|bits|cost|memory ...]

Writes ``benchmarks/results/no_training.json``. No weight sees a gradient except where rounding is learned. Ratios come
from calibration and search images, both from the training set; accuracy is over all 10,000 test images, in percent.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean, median, stdev
from time import perf_counter
from typing import Any

import torch

from autocomp.capabilities import Capabilities
from autocomp.compress import Compressed, Statistics, compress, logits_of, to_tensor
from autocomp.compress.importance import Evidence
from autocomp.compress.ordering import order_channels
from autocomp.compress.surgery import tensors_of
from autocomp.config import SearchConfig
from autocomp.controllers import make_controller
from autocomp.policy import INT8, Policy, Precision, Recipe
from autocomp.space import SearchSpace
from autocomp.study.ranks import with_ranks
from autocomp.study.score import predict
from autocomp.study.starts import allocated
from autocomp.study.sweep import THOROUGH, measure
from autocomp.study.workbench import Workbench, prepare
from benchmarks.common import cifar10, save, shared, show

SEEDS = (0, 1, 2)
EIGHTHS = SearchSpace("eighths", kept=tuple(count / 8 for count in range(8, 0, -1)), drop_branches=False)
RANKED = replace(EIGHTHS, name="ranked", ranks=tuple(count / 8 for count in range(7, 1, -1)))
"""Layers may be pairs of smaller ones, too."""


def prepared(depth: int, data: Path, seed: int, space: str = "prune") -> Workbench:
    weights = shared() / "weights" / f"cifar10_resnet{depth}.safetensors"
    config = SearchConfig(
        model=f"zoo:resnet{depth}", weights=str(weights), data=f"npz:{data}", budget=("0.5xMACs",), batch=32,
        space=space, seed=seed,
    )  # fmt: skip
    return prepare(config, lambda event: None)


def top1(bench: Workbench, predictions: Callable[[Any], Any]) -> float:
    """Percent of the test images."""
    right = count = 0
    for images, labels in bench.splits.test.batches(500):
        right += int((predictions(images).argmax(axis=1) == labels).sum())
        count += len(labels)
    return 100 * right / count


def of_module(bench: Workbench, compressed: Compressed) -> float:
    return top1(bench, lambda images: logits_of(compressed.module, images))


def of_engine(bench: Workbench, compressed: Compressed) -> float:
    with bench.backend.build(bench.emitter.emit(compressed)) as engine:
        return 100 * float(predict(engine, bench.splits.test).accuracy or 0.0)


def uniform(bench: Workbench) -> Policy:
    """The largest single ratio that leaves at most half of the MACs."""
    graph = bench.traced.graph
    for thousandths in range(1000, 0, -5):
        policy = Policy({group.name: max(1, round(group.channels * thousandths / 1000)) for group in graph.groups})
        if graph.macs(policy) <= 0.5 * graph.macs(Policy()):
            return policy
    raise SystemExit("no uniform ratio leaves half of the MACs")


def chosen(bench: Workbench) -> dict[str, Policy]:
    """Ratios of least summed divergence at half of the MACs, each measured alone on images of the search split; and of
    such ratios at the root of a half, with ranks for the rest."""
    graph = bench.traced.graph
    fine, ranked = (replace(bench, space=space.restrict(graph, Capabilities())) for space in (EIGHTHS, RANKED))
    sensitivity = measure(fine, THOROUGH, lambda event: None)
    (free,), (milder,) = (allocated(fine.space, sensitivity, (target,)) for target in (0.5, 0.5**0.5))
    both = with_ranks(ranked, milder, 0.5)
    assert both is not None
    return {"free": free, "free, with ranks": both}


def ways(bench: Workbench) -> dict[str, tuple[Recipe, Statistics]]:
    """Recipes to compare, and statistics with the channels in the order each asks for."""
    statistics, finishing = bench.statistics, bench.finishing
    evidence = Evidence(
        bench.traced, tensors_of(bench.traced.module), statistics.moments, to_tensor(bench.images), 1e-3, finishing.seed
    )
    random = replace(statistics, orders=order_channels(evidence, "random"))
    return {
        "solved in sequence": (finishing, statistics),
        "closed form": (bench.recipe, statistics),
        "random channels, in sequence": (finishing, random),
        "no reconstruction": (replace(bench.recipe, reconstruction="none", recalibration="never"), statistics),
    }


def halved(depth: int, data: Path) -> dict[str, Any]:
    """Accuracy at half of the MACs, by ratios and by recipe, over the calibration draws."""
    found: dict[str, dict[str, list[float]]] = {}
    macs: dict[str, list[float]] = {}
    for seed in SEEDS:
        bench = prepared(depth, data, seed)
        graph = bench.traced.graph
        for ratios, policy in {"uniform": uniform(bench), **chosen(bench)}.items():
            macs.setdefault(ratios, []).append(graph.macs(policy) / graph.macs(Policy()))
            for name, (recipe, statistics) in ways(bench).items():
                numerics = bench.backend.capabilities().numerics
                compressed = compress(bench.traced, statistics, policy, recipe, numerics, to_tensor(bench.images))
                accuracy = of_module(bench, compressed)
                found.setdefault(ratios, {}).setdefault(name, []).append(accuracy)
                print(f"ResNet-{depth}, draw {seed}, {ratios}, {name}: {accuracy:.2f}", file=sys.stderr, flush=True)
    rows = [
        [ratios, f"{max(macs[ratios]):.4f}", name, f"{mean(values):.2f}", f"{stdev(values):.2f}", values]
        for ratios, entries in found.items()
        for name, values in entries.items()
    ]
    show(f"ResNet-{depth} at half of the MACs, fp32", ["ratios", "MACs", "recipe", "mean", "s.d.", "draws"], rows)
    return {"macs": macs, "top1": found}


def int8(data: Path) -> dict[str, Any]:
    rows = {}
    for depth in (20, 56):
        bench = prepared(depth, data, 0, "int8")
        every = Policy(precisions={layer.name: INT8 for layer in bench.traced.graph.layers})
        accuracies = [of_engine(bench, bench.emitter.finish(policy)) for policy in (Policy(), every)]
        rows[f"resnet{depth}"] = dict(zip(("fp32", "int8"), accuracies, strict=True))
    table = [[name, *(f"{value:.2f}" for value in row.values())] for name, row in rows.items()]
    show("every layer in int8, on the engine", ["", "fp32", "int8"], table)
    return rows


def bits(data: Path) -> dict[str, Any]:
    bench = prepared(56, data, 0, "bits")
    every = Policy(precisions={layer.name: Precision.parse("w4a8") for layer in bench.traced.graph.layers})
    numerics, found = bench.backend.capabilities().numerics, {"fp32": of_engine(bench, bench.emitter.finish(Policy()))}
    recipes = {
        "nearest": replace(bench.finishing, rounding="nearest", bias_correction="never"),
        "nearest, biases corrected": replace(bench.finishing, rounding="nearest"),
        "learned rounding": bench.finishing,
    }
    for name, recipe in recipes.items():
        begun = perf_counter()
        compressed = compress(bench.traced, bench.statistics, every, recipe, numerics, to_tensor(bench.images))
        found[f"{name}, seconds"] = perf_counter() - begun
        found[name] = of_engine(bench, compressed)
    rows = [[name, f"{value:.2f}"] for name, value in found.items()]
    show("ResNet-56, every layer with 4-bit weights and 8-bit activations, on the engine", ["", "top-1 or s"], rows)
    return found


def cost(data: Path) -> dict[str, Any]:
    bench = prepared(56, data, 0, "default")
    torch.set_num_threads(1)
    space = EIGHTHS.restrict(bench.traced.graph, Capabilities())
    seconds: list[Mapping[str, float]] = []
    for policy in make_controller("random", space, 0).ask(21):
        begun = perf_counter()
        compressed = bench.emitter.compress(policy)
        seconds.append({"whole": perf_counter() - begun, **compressed.seconds})
    found = {stage: median(entry.get(stage, 0.0) for entry in seconds[1:]) for stage in seconds[0]}
    found |= {"slowest": max(entry["whole"] for entry in seconds[1:])}
    rows = [[name, f"{value:.3f}"] for name, value in found.items()]
    show("compressing one more policy, ResNet-56, one thread, s (median of 20)", ["stage", "s"], rows)
    return found


def memory() -> dict[str, Any]:
    """In a process of its own, so that the peak is this job's."""
    command = [sys.executable, "-m", "benchmarks.no_training", "--child"]
    found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    rows = [[name, f"{value:.2f}"] for name, value in found.items()]
    show("torchvision ResNet-50, random weights, 224x224, 256 images, half of each group", ["", ""], rows)
    return found


def child() -> None:
    from torchvision.models import resnet50

    from autocomp.compress import collect, trace

    images = torch.randn(256, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    begun = perf_counter()
    traced = trace(resnet50(), images[:2])
    recipe = Recipe(images=256)
    statistics = collect(traced, images, recipe)
    collected = perf_counter()
    policy = Policy({group.name: group.channels // 2 for group in traced.graph.groups})
    compress(traced, statistics, policy, recipe, Capabilities().numerics, images)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    seconds = {"statistics, s": collected - begun, "one policy, s": perf_counter() - collected}
    print(json.dumps({**seconds, "peak resident, GB": peak}))


def main() -> None:
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        "resnet20": lambda data: halved(20, data),
        "resnet56": lambda data: halved(56, data),
        "int8": int8,
        "bits": bits,
        "cost": cost,
        "memory": lambda data: memory(),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=list(parts))
    parser.add_argument("--work", type=Path, help="folder for CIFAR-10; a temporary one by default")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child()
        return
    with tempfile.TemporaryDirectory() as temporary:
        data = cifar10(args.work or Path(temporary))
        for part in args.part or list(parts):
            print(f"written: {save('no_training', {part: parts[part](data)})}")


if __name__ == "__main__":
    main()
