"""A search problem without an engine: each choice costs divergence and saves time, whatever the others are; what lies
inside a dropped branch does neither."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from autocomp import controllers
from autocomp.capabilities import Capabilities
from autocomp.controllers import Factor, Knowledge
from autocomp.policy import FP32, INT8, Policy
from autocomp.protocols import Controller
from autocomp.results import Score, TrialResult
from autocomp.space import PolicySpace, SearchSpace
from tests.graphs import residual_net


def policy_space(
    blocks: int, kept: Sequence[float] = (1.0, 0.75, 0.5, 0.25), drop_branches: bool = True
) -> PolicySpace:
    space = SearchSpace("test", kept=tuple(kept), precisions=(FP32, INT8), drop_branches=drop_branches)
    return space.restrict(residual_net(blocks), Capabilities((FP32, INT8), channel_multiple=4))


@dataclass(frozen=True)
class Problem:
    """Costs and savings of each decision's options, drawn by a seed; the limit is on the remaining time in [0, 1]."""

    space: PolicySpace
    costs: tuple[tuple[float, ...], ...]
    times: tuple[tuple[float, ...], ...]
    limit: float

    @classmethod
    def drawn(cls, space: PolicySpace, seed: int, limit: float) -> "Problem":
        generator = random.Random(seed)
        costs, times = [], []
        for decision in space.decisions:
            options = len(decision.options)
            # int8 costs little, channels more, a branch most; within a kind costs differ by up to ten times
            scale = {"precision": 0.01, "channels": 0.1, "branch": 0.5}[decision.kind] * 10 ** generator.random()
            share = 0.0 if decision.kind == "branch" else generator.uniform(0.5, 1.5)  # of the whole time
            costs.append(tuple(scale * (index / max(1, options - 1)) ** 2 for index in range(options)))
            times.append(tuple(share * (1 - 0.7 * index / max(1, options - 1)) for index in range(options)))
        return cls(space, tuple(costs), tuple(times), limit)

    def knowledge(self) -> Knowledge:
        """All there is to know, for the guided controller."""
        space = self.space
        branches = {d.name: at for at, d in enumerate(space.decisions) if d.kind == "branch"}
        tied = {
            at: branches[branch.name]
            for branch in space.graph.branches
            if branch.name in branches
            for at, d in enumerate(space.decisions)
            if d.kind != "branch" and d.name in branch.layers
        }
        losses = tuple(np.array([*row, 0.0] if at in tied else row) for at, row in enumerate(self.costs))
        whole = sum(times[0] for times in self.times)
        times = tuple(
            Factor((at,), np.array([*row, 0.0] if at in tied else row) / whole) for at, row in enumerate(self.times)
        )

        def choices(policy: Policy) -> tuple[int, ...]:
            taken = space.encode(policy)
            return tuple(len(losses[d]) - 1 if taken[tied.get(d, d)] and d in tied else c for d, c in enumerate(taken))

        def policy(found: Sequence[int]) -> Policy:
            return space.decode([c % len(d.options) for d, c in zip(space.decisions, found, strict=True)])

        return Knowledge(
            controllers.Problem(losses, (times,), tied), (self.limit,), choices, policy, lambda p: (self.judge(p)[1],)
        )

    def judge(self, policy: Policy) -> tuple[float, float]:
        """Divergence and latency ratio."""
        gone = self.space.graph.removed_layers(policy)  # groups bear the name of the layer that writes them
        divergence = time = 0.0
        choices = zip(self.space.decisions, self.space.encode(policy), self.costs, self.times, strict=True)
        for decision, index, costs, times in choices:
            if decision.name not in gone:
                divergence += costs[index]
                time += times[index]
        return divergence, time / sum(times[0] for times in self.times)

    def result(self, number: int, policy: Policy) -> TrialResult:
        """As a study would: timed first, scored only where the budget holds."""
        divergence, ratio = self.judge(policy)
        violation = ratio / self.limit - 1
        timed = TrialResult(number, "search", policy, "infeasible", (violation,), latency_ms=ratio, reference_ms=1.0)
        if violation > 0:
            return timed
        return replace(timed, status="ok", objective=divergence, score=Score(divergence, None, 1))

    def optimum(self) -> float:
        """The least divergence within the limit, by trying every point."""
        points = product(*(range(len(decision.options)) for decision in self.space.decisions))
        judged = (self.judge(self.space.decode(point)) for point in points)
        return min(divergence for divergence, ratio in judged if ratio <= self.limit)

    def search(self, controller: Controller, trials: int, wave: int = 4) -> list[TrialResult]:
        """Ask and tell in waves until ``trials`` results are in or the controller is dry."""
        results: list[TrialResult] = []
        while len(results) < trials and (policies := controller.ask(min(wave, trials - len(results)))):
            told = [self.result(len(results) + place, policy) for place, policy in enumerate(policies)]
            controller.tell(told)
            results += told
        return results


def best(results: Sequence[TrialResult]) -> float:
    """The least divergence among feasible results; infinite without one."""
    return min((result.objective for result in results if result.objective is not None), default=float("inf"))
