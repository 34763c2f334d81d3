"""Predicted against measured latency, on policies that no fit has seen.

    AUTOCOMP_SHARED=... python -m benchmarks.predict [--case resnet20|resnet56|mobilenet_v2 ...] [--engine E]
    python -m benchmarks.predict --half [--case mobilenet_v2|resnet18|vit_b_16 ...] [--engine E]

Writes ``benchmarks/results/predict.json``. A profile is measured from nothing; then policies spread over predicted
ratios from 0.3 to 1.0 are timed beside the uncompressed engine, twice, each time on an engine of its own: the
difference of the two is the noise that a prediction cannot be better than. With ``--half`` there are five policies, all
predicted at 0.5x, and the file is ``half.json``: ``worst`` is the largest relative error among them. Models of 224x224
have random weights, batch 1.
"""

import argparse
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import zip_longest
from math import inf
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from autocomp.config import SearchConfig
from autocomp.engines import compare, estimate
from autocomp.errors import EngineError
from autocomp.hardware import HardwareProfile, Predictor, kernels_of
from autocomp.policy import Policy
from autocomp.results import TimingProtocol
from autocomp.space import Decision, PolicySpace
from autocomp.study.guidance import subject_of
from autocomp.study.profiling import PROTOCOL, Subject, survey
from autocomp.study.workbench import prepare
from benchmarks.common import cifar10, save, shared, show

SPREAD, HALF = tuple(np.linspace(0.3, 1.0, 11).tolist()), (0.495, 0.505)
"""Edges between which equally many policies are predicted."""
POLICIES, HALVES, DRAWS = 100, 5, 20_000
SPREAD_CASES, HALF_CASES = ("resnet20", "resnet56", "mobilenet_v2"), ("mobilenet_v2", "resnet18", "vit_b_16")
QUIET = 0.05
"""How much slower than usual the reference may be beside a measurement that counts."""
ATTEMPTS = 6
COLUMNS = ("", "engine", "kernels", "profile s", "policies", "MAPE %", "worst %", "Spearman", "repeat %", "repeat")


@dataclass(frozen=True, slots=True)
class Level:
    """Draws options that compress about equally much everywhere."""

    generator: random.Random
    share: float

    def choose(self, decision: Decision) -> int:
        if decision.kind == "branch":
            return int(self.generator.random() < 0.2 * self.share)
        return sum(self.generator.random() < self.share for _ in decision.options[1:])


def config(case: str, work: Path) -> SearchConfig:
    if case in HALF_CASES:
        return SearchConfig(
            model=f"torchvision:{case}", data="random:3x224x224", budget=("0.5x",), batch=1,
            calibration_images=32, search_images=32, selection_images=32,
        )  # fmt: skip
    weights = shared() / "weights" / f"cifar10_{case}.safetensors"
    return SearchConfig(
        model=f"zoo:{case}", weights=str(weights), data=f"npz:{cifar10(work)}", budget=("0.5x",), batch=32,
        calibration_images=256,
    )  # fmt: skip


def stratified(
    space: PolicySpace, predictor: Predictor, batch: int, count: int, edges: Sequence[float]
) -> list[tuple[Policy, float]]:
    """Policies with their predicted ratios, equally many from between each two edges, in turn; none twice."""
    generator = random.Random(1234)  # not the seed of the survey's own candidates
    whole = predictor.engine(kernels_of(space.graph, Policy(), batch).values()).ms
    found: list[dict[Policy, float]] = [{} for _ in edges[1:]]
    for _ in range(DRAWS):
        policy = space.suggest(Level(generator, generator.random()))
        ratio = predictor.engine(kernels_of(space.graph, policy, batch).values()).ms / whole
        place = int(np.searchsorted(edges, ratio)) - 1
        if 0 <= place < len(found) and len(found[place]) < count // len(found):
            found[place][policy] = ratio
        if all(len(part) == count // len(found) for part in found):
            break
    turns = zip_longest(*(part.items() for part in found))
    return [entry for turn in turns for entry in turn if entry is not None]


def measured(subject: Subject, policy: Policy) -> float:
    """Latency ratio on a new engine; taken again while the reference is slowed by something else."""
    taken: list[tuple[float, float]] = []
    with subject.backend.build(subject.skeleton(policy)) as engine:
        while len(taken) < ATTEMPTS and not (taken and min(taken)[0] <= QUIET):
            found = estimate(compare(engine, subject.reference, TimingProtocol(blocks=7)), "p50")
            taken.append((found.reference_ms.value / subject.reference_ms - 1, found.ratio.value))
    return min(taken)[1]


def one(
    config: SearchConfig,
    engine: str,
    seconds: float,
    count: int,
    edges: Sequence[float] = SPREAD,
    deadline: float = inf,
    keep: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Predictions by a profile that is measured from nothing, and measurements.

    Args:
        config: of the model and what may be chosen.
        seconds: for the profile.
        count: policies to measure, at most.
        edges: of the ranges of predicted ratios from which equally many are taken.
        deadline: by `time.monotonic`, after which no policy is begun.
        keep: is given the figures after every policy from the second on.
    """
    bench = prepare(replace(config, engine=engine), lambda event: None)
    with bench.backend.build(bench.reference) as reference:
        subject = subject_of(bench, reference)
        if subject is None:
            raise EngineError(f"the kernels of {config.model} cannot be told apart: choose another model")
        begun = perf_counter()
        empty = HardwareProfile.of(bench.backend.device, date.today(), str(PROTOCOL))
        profile = survey(subject, empty, seconds, 10_000, lambda step: None)
        row: dict[str, Any] = {
            "engine": bench.backend.device.engine,
            "profile_s": round(perf_counter() - begun, 1),
            "engines": len(profile.engines),
            "kernels": len(profile.kernels),
        }
        predicted, twice = list[float](), list[list[float]]()
        for policy, ratio in stratified(bench.space, Predictor(profile), bench.spec.batch, count, edges):
            if monotonic() > deadline:
                break
            predicted.append(ratio)
            twice.append([measured(subject, policy) for _ in range(2)])
            if len(twice) > 1:
                row |= {"policies": len(twice), **figures(np.array(predicted), np.array(twice))}
                pairs = zip(predicted, twice, strict=True)
                row["pairs"] = [[round(first, 4), *np.round(others, 4).tolist()] for first, others in pairs]
                keep(row)
    return row


def figures(predicted: np.ndarray, twice: np.ndarray) -> dict[str, float]:
    """Errors of the predictions, and of one measurement against the other, as fractions."""
    middle = twice.mean(axis=1)
    return {
        "mape": float(np.mean(np.abs(predicted / middle - 1))),
        "worst": float(np.max(np.abs(predicted / middle - 1))),
        "bias": float(np.mean(predicted / middle - 1)),
        "spearman": float(spearmanr(predicted, middle).statistic),
        "repeat_mape": float(np.mean(np.abs(twice[:, 1] / twice[:, 0] - 1))),
        "repeat_spearman": float(spearmanr(twice[:, 0], twice[:, 1]).statistic),
    }


def table(found: dict[str, dict[str, Any]]) -> list[Sequence[object]]:
    return [
        [
            case, row["engine"], row["kernels"], f"{row['profile_s']:.0f}", row["policies"], f"{100 * row['mape']:.1f}",
            f"{100 * row['worst']:.1f}", f"{row['spearman']:.3f}", f"{100 * row['repeat_mape']:.1f}",
            f"{row['repeat_spearman']:.3f}",
        ]
        for case, row in found.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=list(dict.fromkeys(SPREAD_CASES + HALF_CASES)))
    parser.add_argument("--half", action="store_true", help="policies predicted at 0.5x alone")
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--seconds", type=float, default=600.0, help="spent on each profile")
    parser.add_argument("--policies", type=int, help=f"{POLICIES}, with --half {HALVES}")
    parser.add_argument("--work", type=Path, help="folder for CIFAR-10; a temporary one by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        for case in args.case or (HALF_CASES if args.half else SPREAD_CASES):
            name = f"{case}, {args.engine}"
            edges, count = (HALF, args.policies or HALVES) if args.half else (SPREAD, args.policies or POLICIES)
            row = one(config(case, work), args.engine, args.seconds, count, edges)
            show("predicted against measured latency ratio", COLUMNS, table({name: row}))
            print(f"written: {save('half' if args.half else 'predict', {name: row})}")


if __name__ == "__main__":
    main()
