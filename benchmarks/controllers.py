"""What controllers cost late in a long search, and what they find early.

    OMP_NUM_THREADS=1 python -m benchmarks.controllers [--only NAME ...]

A synthetic problem of 84 decisions: every choice costs divergence and saves time, whatever the others are. Cost is
the time of ``ask(4)`` and ``tell`` of its results, by trial, after 10,000 results were told; quality is the least
divergence among feasible policies after 60 trials from nothing, the median of three drawn problems. The guided
controller knows all times, and losses that are each off by a factor of up to two. Writes
``benchmarks/results/controllers.json``.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from time import perf_counter

import numpy as np

from autocomp import controllers
from autocomp.controllers import CONTROLLERS, Factor, Knowledge
from autocomp.graph import Group, Layer, LayerGraph, Member, Node
from autocomp.policy import FP32, INT8, Policy
from autocomp.protocols import Controller
from autocomp.results import Score, TrialResult
from autocomp.space import Decision, PolicySpace
from benchmarks.common import save, show

LAYERS, CHANNELS = 43, 32
PAST, TIMED, TRIALS, SEEDS, WAVE = 10_000, 20, 60, 3, 4
LIMIT = 0.6
"""Of the time of the uncompressed model."""


def chain() -> PolicySpace:
    """Convolutions one behind the other: four counts for the channels between two, and fp32 or int8 for each."""
    shape = (CHANNELS, 8, 8)
    layers = tuple(Layer(f"l{k}", "conv", f"n{k}", (CHANNELS, CHANNELS, 3, 3), 64) for k in range(LAYERS))
    names = ["x", *(layer.node for layer in layers)]
    nodes = [Node("x", "input", (), shape)]
    nodes += [Node(name, "conv2d", (before,), shape) for before, name in pairwise(names)]
    each = tuple((channel,) for channel in range(CHANNELS))
    groups = tuple(
        Group(writer.name, CHANNELS, (Member(writer.weight, 0, each), Member(reader.weight, 1, each)))
        for writer, reader in pairwise(layers)
    )
    shapes = {layer.weight: layer.weight_shape for layer in layers}
    graph = LayerGraph(tuple(nodes), names[-1], layers, groups, (), shapes)
    decisions = [Decision("channels", group.name, (32, 24, 16, 8)) for group in groups]
    decisions += [Decision("precision", layer.name, (FP32, INT8)) for layer in layers]
    return PolicySpace(graph, tuple(decisions[: 2 * LAYERS - 2]), (1.0, 0.75, 0.5, 0.25))


@dataclass(frozen=True)
class Problem:
    """Divergence and time of each decision's options."""

    space: PolicySpace
    losses: tuple[tuple[float, ...], ...]
    times: tuple[tuple[float, ...], ...]

    @classmethod
    def drawn(cls, space: PolicySpace, seed: int) -> "Problem":
        generator = random.Random(seed)
        losses, times = [], []
        for decision in space.decisions:
            last = len(decision.options) - 1
            scale = (0.1 if decision.kind == "channels" else 0.01) * 10 ** generator.random()
            share = generator.uniform(0.5, 1.5)
            losses.append(tuple(scale * (index / last) ** 2 for index in range(last + 1)))
            times.append(tuple(share * (1 - 0.7 * index / last) for index in range(last + 1)))
        return cls(space, tuple(losses), tuple(times))

    def result(self, number: int, policy: Policy) -> TrialResult:
        """Timed first, scored only where the budget holds, as in a search."""
        indices = self.space.encode(policy)
        ratio = _chosen(self.times, indices) / _chosen(self.times, [0] * len(indices))
        violations, loss = (ratio / LIMIT - 1,), _chosen(self.losses, indices)
        if ratio > LIMIT:
            return TrialResult(number, "search", policy, "infeasible", violations, latency_ms=ratio, reference_ms=1.0)
        score = Score(loss, None, 1)
        return TrialResult(number, "search", policy, "ok", violations, loss, score, ratio, 1.0)

    def knowledge(self, seed: int) -> Knowledge:
        """Right about times, wrong about losses."""
        generator = random.Random(f"wrong {seed}")
        wrong = [2 ** generator.uniform(-1, 1) for _ in self.losses]
        losses = tuple(factor * np.array(row) for factor, row in zip(wrong, self.losses, strict=True))
        whole = _chosen(self.times, [0] * len(self.times))
        factors = tuple(Factor((place,), np.array(row) / whole) for place, row in enumerate(self.times))

        def costs(policy: Policy) -> tuple[float, ...]:
            return (_chosen(self.times, self.space.encode(policy)) / whole,)

        return Knowledge(
            controllers.Problem(losses, (factors,)), (LIMIT,), lambda p: tuple(self.space.encode(p)),
            self.space.decode, costs,
        )  # fmt: skip

    def controller(self, name: str, seed: int) -> Controller:
        known = self.knowledge(seed) if name == "guided" else None
        return controllers.make_controller(name, self.space, seed, (), known)


def _chosen(rows: Sequence[Sequence[float]], indices: Sequence[int]) -> float:
    return sum(row[index] for row, index in zip(rows, indices, strict=True))


def cost(name: str, problem: Problem, past: Sequence[TrialResult]) -> dict[str, float]:
    """Seconds to tell the past, and milliseconds by trial of the waves after it."""
    controller = problem.controller(name, 0)
    begun = perf_counter()
    controller.tell(past)
    telling, number, waves = perf_counter() - begun, len(past), []
    for _ in range(TIMED // WAVE):
        begun = perf_counter()
        wave = controller.ask(WAVE)
        asked = perf_counter() - begun
        results = [problem.result(number + place, policy) for place, policy in enumerate(wave)]
        begun = perf_counter()
        controller.tell(results)
        waves.append(1000 * (asked + perf_counter() - begun) / WAVE)
        number += len(wave)
    return {
        "tell_past_s": round(telling, 2),
        "ms_per_trial": round(sum(waves) / len(waves), 2),
        "ms_per_trial_max": round(max(waves), 2),
    }


def quality(name: str, space: PolicySpace) -> float:
    found = []
    for seed in range(SEEDS):
        problem = Problem.drawn(space, seed)
        controller, number, best = problem.controller(name, seed), 0, float("inf")
        while number < TRIALS:
            results = [problem.result(number + k, policy) for k, policy in enumerate(controller.ask(WAVE))]
            controller.tell(results)
            number += len(results)
            best = min([best, *(r.objective for r in results if r.objective is not None)])
        found.append(best)
    return round(median(found), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=CONTROLLERS)
    args = parser.parse_args()
    space = chain()
    problem = Problem.drawn(space, 0)
    drawn = problem.controller("random", 1).ask(PAST)
    past = [problem.result(number, policy) for number, policy in enumerate(drawn)]
    found = {}
    for name in args.only or CONTROLLERS:
        found[name] = {**cost(name, problem, past), "best_of_60": quality(name, space)}
        print(name, found[name], flush=True)
    rows = [[name, *row.values()] for name, row in found.items()]
    columns = ["", f"tell {PAST}, s", "ask + tell, ms a trial", "slowest wave, ms a trial", f"best of {TRIALS}"]
    show(f"{len(space.decisions)} decisions, after {PAST} results", columns, rows)
    print(f"written: {save('controllers', found)}")


if __name__ == "__main__":
    main()
