"""The guided controller: what is known of losses and costs, solved for the budget, and corrected by every result."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from math import exp, isfinite, log

import numpy as np
from numpy.typing import NDArray

from autocomp.controllers.initial import checked
from autocomp.controllers.problem import Assignment, Problem
from autocomp.controllers.random import fresh
from autocomp.controllers.solver import solve
from autocomp.policy import Policy
from autocomp.results import TrialResult
from autocomp.space import PolicySpace

__all__ = ["GuidedController", "Knowledge"]

Array = NDArray[np.float64]

SOLVED = 40
"""Results after which proposals come from local search alone."""
LEARNED_FROM = 400
"""Results that the losses are fitted to: the best ones, beyond that number."""
NOISE = 0.2
"""Relative error that the sum of losses has anyway, as a fraction of the divergence."""
EXPLORE = 0.25
"""Of the standard deviation that the results leave open, how much a draw may be off."""
DOUBT = 1.0
"""Relative standard deviation of each decision's loss before anything was tried."""
RECENT = 12
"""Last results whose predictions are looked at, for devices change their speed."""
CAUTION = 0.6
"""Quantile of their errors that the limits are moved by."""
ROOM = 0.93
"""Part of the limits that some proposals are solved for, should the device be slower when finalists are verified."""
ROOMY, SELDOM = 4, 8
"""Of so many proposals one has that room, before anything held the budgets and after."""
SURE = 4
"""Of so many proposals one is the best by what is believed, not by a draw."""
FASTEST = 0.1
"""Part of the least latency that kept the accuracy which is taken to be lossy before anything is known."""
ELITES = 4
"""Best results that local search begins from."""
MOVES = 400
"""Changes that local search tries for one proposal."""
CHECKED = 30
"""Of what local search found, how many are asked for their exact costs at most."""
CORRECTIONS = 3
"""Solutions after each of which the limits are moved by what the factors got wrong."""


@dataclass(frozen=True)
class Knowledge:
    """What a guided search begins with.

    Attributes:
        problem: losses of the options, and their costs by budget.
        limits: of the budgets.
        choices: policy -> one index per decision of the problem.
        policy: the reverse.
        costs: what a policy is expected to cost by budget, interactions between decisions included.
        speed: the budgets hold already, and the least latency within a bound on the accuracy is looked for.
    """

    problem: Problem
    limits: tuple[float, ...]
    choices: Callable[[Policy], tuple[int, ...]]
    policy: Callable[[Sequence[int]], Policy]
    costs: Callable[[Policy], tuple[float, ...]]
    speed: bool = False


class GuidedController:
    """Solves for the least expected divergence within the budgets, tries the solution, and learns from the result.

    The divergence is taken to be a weighted sum of the divergences of single choices. The weights are a Bayesian
    linear regression over the results so far, with the measured single divergences as its prior mean. Each proposal is
    the best policy for one draw of the weights (Thompson sampling; Russo et al. 2018, section 3), so that search goes
    where the weights are uncertain and little is expected to be lost; every fourth one trusts their mean. The idea of
    searching over sensitivities with a solver inside is SPDY's (Frantar and Alistarh 2022, section 3.3); there weights
    are drawn blindly, here the results shape them. The first draws are solved exactly (see `solver`), later ones by
    local search from the best results, in milliseconds.

    What measured budgets were over or under their prediction moves the limits.
    """

    def __init__(self, space: PolicySpace, seed: int, initial: Sequence[Policy], knowledge: Knowledge) -> None:
        self._space = space
        self._seed = seed
        self._initial = checked(space, initial)
        self._knowledge = knowledge
        self._results: dict[Policy, TrialResult] = {}
        self._told: set[Policy] = set()
        self._pending: dict[Policy, None] = {}
        self._predicted: dict[Policy, tuple[float, ...]] = {}
        self._choices: dict[Policy, tuple[int, ...]] = {}

    def ask(self, count: int) -> list[Policy]:
        seen = {*self._told, *self._pending}
        known = len(seen)
        wave = [policy for policy in self._initial if policy not in seen][:count]
        seen.update(wave)
        scored = [(self._choices[policy], r.score.divergence) for policy, r in self._results.items() if r.score]
        beliefs = Beliefs(self._knowledge.problem.losses, scored)
        limits, starts = self._limits(known, count), [self._choices[policy] for policy in self._elites()]
        while len(wave) < count:
            place = len(seen)
            policy = self._proposal(beliefs, limits[len(wave)], starts, seen, place)
            policy = policy or fresh(self._space, random.Random(f"{self._seed}/{place}"), seen)
            if policy is None:
                break
            seen.add(policy)
            wave.append(policy)
        self._pending.update(dict.fromkeys(wave))
        return wave

    def tell(self, results: Sequence[TrialResult]) -> None:
        for result in results:
            self._pending.pop(result.policy, None)
            self._told.add(result.policy)
            usable = result.status != "failed" and all(map(isfinite, result.violations))
            if usable and self._space.contains(result.policy):
                self._results[result.policy] = result
                self._choices[result.policy] = self._knowledge.choices(result.policy)

    def _proposal(
        self,
        beliefs: "Beliefs",
        limits: tuple[float, ...],
        starts: Sequence[tuple[int, ...]],
        seen: set[Policy],
        place: int,
    ) -> Policy | None:
        """The best policy for one draw of the weights that was not tried yet; None where local search finds none."""
        knowledge = self._knowledge
        generator = np.random.default_rng([self._seed, place])
        weights = beliefs.draw(generator) if place % SURE else beliefs.mean
        losses = tuple(w * row for w, row in zip(weights, knowledge.problem.losses, strict=True))
        problem = Problem(losses, knowledge.problem.costs, knowledge.problem.tied)
        if len(self._results) < SOLVED:
            solution = _solved(knowledge, problem, limits)
            if solution is not None:
                policy = knowledge.policy(solution)
                if policy not in seen:
                    return policy
                starts = [*starts, solution]
        if not starts:
            return None
        start = starts[int(generator.integers(len(starts)))]
        return _searched(knowledge, problem, limits, start, generator, seen)

    def _limits(self, first: int, count: int) -> list[tuple[float, ...]]:
        """Limits on predicted costs for each of a wave: the budgets', moved by what predictions got wrong of late.

        Somewhat more than the median is taken off: a proposal over the budget teaches little.
        """
        if self._knowledge.speed:
            return [(target,) for target in self._targets(count)]
        measured = (r for r in reversed(self._results.values()) if len(r.violations) >= len(self._knowledge.limits))
        rows = []
        for result in islice(measured, RECENT):
            if result.policy not in self._predicted:
                self._predicted[result.policy] = self._knowledge.costs(result.policy)
            pairs = zip(self._predicted[result.policy], result.violations, self._knowledge.limits, strict=False)
            rows.append([log(max(1 + violation, 1e-6) * limit / max(cost, 1e-12)) for cost, violation, limit in pairs])
        off = np.exp(np.quantile(rows, CAUTION, axis=0)) if rows else np.ones(len(self._knowledge.limits))
        moved = np.array(self._knowledge.limits) / off
        every = SELDOM if any(result.feasible for result in self._results.values()) else ROOMY
        rooms = [1.0 if (place + 1) % every else ROOM for place in range(first, first + count)]
        return [tuple((room * moved).tolist()) for room in rooms]

    def _targets(self, count: int) -> list[float]:
        """Predicted latency ratios between the least that kept the accuracy and the largest below it that did not.

        Spread evenly in their logarithm, so that a wave of four leaves a fifth of the interval, and none below what
        the most compressed policies are predicted to take.
        """
        timed = [(policy, r) for policy, r in self._results.items() if r.score is not None and r.ratio]
        ratios = [r.ratio / self._knowledge.costs(policy)[0] for policy, r in timed if r.ratio]
        off = float(np.median(ratios)) if ratios else 1.0
        kept = min((r.ratio for _, r in timed if r.feasible and r.ratio), default=self._knowledge.limits[0])
        lost = max((r.ratio for _, r in timed if not r.feasible and r.ratio and r.ratio < kept), default=FASTEST * kept)
        least = (self._space.uniform()[-1], self._space.decode([len(d.options) - 1 for d in self._space.decisions]))
        floor = off * min(self._knowledge.costs(policy)[0] for policy in least)
        return [float(ratio) / off for ratio in np.geomspace(kept, min(max(lost, floor), kept), count + 2)[1:-1]]

    def _elites(self) -> list[Policy]:
        feasible = [r for r in self._results.values() if r.feasible and r.objective is not None]
        return [r.policy for r in sorted(feasible, key=lambda r: (r.objective, r.number))[:ELITES]]


class Beliefs:
    """Weights of the decisions' losses: their mean, and draws from what the results leave open."""

    def __init__(self, losses: Sequence[Array], scored: Sequence[tuple[tuple[int, ...], float]]) -> None:
        """From the choices and the divergence of each result."""
        count = len(losses)
        self.mean: Array = np.ones(count, np.float64)
        self._factor: Array = DOUBT * np.eye(count)
        scored = sorted((pair for pair in scored if pair[1] > 0), key=lambda pair: pair[1])[:LEARNED_FROM]
        rows = np.array([[losses[d][c] for d, c in enumerate(choices)] for choices, _ in scored]).reshape(-1, count)
        reached = rows.sum(axis=1) > 0
        if not reached.any():
            return
        rows, divergences = rows[reached], np.array([value for _, value in scored])[reached]
        scale = float(np.exp(np.median(np.log(divergences / rows.sum(axis=1)))))
        features = scale * rows / divergences[:, None]  # of weights around 1, for a target of 1
        # By its singular values: divergences that differ by many orders leave the products of features no digits.
        _, values, axes = np.linalg.svd(features / NOISE, full_matrices=True)
        precision = np.full(count, 1 / DOUBT**2)
        precision[: len(values)] += values**2
        target = axes @ (features.sum(axis=0) / NOISE**2 + np.ones(count) / DOUBT**2)
        mean: Array = axes.T @ (target / precision)
        self.mean = np.maximum(mean, 0.05)
        self._factor = axes.T / np.sqrt(precision)

    def draw(self, generator: np.random.Generator) -> Array:
        """Positive ones, less doubtful than the regression alone would have it."""
        noise = self._factor @ generator.standard_normal(len(self.mean))
        return np.maximum(self.mean + EXPLORE * noise, 0.05 * self.mean)


def _solved(knowledge: Knowledge, problem: Problem, limits: Sequence[float]) -> tuple[int, ...] | None:
    """The exact solution, corrected for what factors leave out; the last one that holds the limits."""
    moved, best = tuple(limits), None
    for _ in range(CORRECTIONS):
        found = solve(problem, moved)
        if found is None:
            return best
        exact, by_factors = knowledge.costs(knowledge.policy(found)), problem.cost(found)
        if _within(exact, limits):
            if best is None or problem.loss(found) < problem.loss(best):
                best = found
            if all(cost > 0.995 * limit for cost, limit in zip(exact, limits, strict=True)):
                return best
        after = tuple(limit - (e - f) for limit, e, f in zip(limits, exact, by_factors, strict=True))
        if all(abs(a - b) <= 1e-3 * abs(b) for a, b in zip(after, moved, strict=True)):
            return best
        moved = after
    return best


def _searched(
    knowledge: Knowledge,
    problem: Problem,
    limits: Sequence[float],
    start: Sequence[int],
    generator: np.random.Generator,
    seen: set[Policy],
) -> Policy | None:
    """Simulated annealing over one or two changed decisions; the best new policy on the way that holds the limits."""
    state = Assignment(problem, start)
    offsets = [e - f for e, f in zip(knowledge.costs(knowledge.policy(start)), state.costs, strict=True)]
    bounds = [limit - offset for limit, offset in zip(limits, offsets, strict=True)]
    free = [d for d, row in enumerate(problem.losses) if len(row) > 1 and d not in problem.tied]
    free += [d for d, row in enumerate(problem.losses) if len(row) > 2 and d in problem.tied]
    if not free:
        return None
    draws = random.Random(int(generator.integers(2**32)))
    visited: dict[tuple[int, ...], float] = {}
    temperature = 0.05 * max(problem.loss(start), 1e-9)
    for step in range(MOVES):
        before, loss, was_over = tuple(state.choices), state.loss, state.over(bounds)
        for d in draws.sample(free, min(len(free), draws.randint(1, 2))):
            if state.options(d) > 1:
                state.take(d, (state.choices[d] + draws.choice((-2, -1, 1, 2))) % state.options(d))
        over, worse = state.over(bounds), state.loss - loss
        cool = temperature * (1 - step / MOVES) + 1e-12
        within = was_over <= 0 and over <= 0
        if not (worse <= 0 or draws.random() < exp(-worse / cool) if within else over < was_over):
            state.set(before)
        elif over <= 0:
            visited[tuple(state.choices)] = state.loss
    for choices in sorted(visited, key=visited.__getitem__)[:CHECKED]:
        policy = knowledge.policy(choices)
        if policy not in seen and _within(knowledge.costs(policy), limits):
            return policy
    return None


def _within(costs: Sequence[float], limits: Sequence[float]) -> bool:
    return all(cost <= limit for cost, limit in zip(costs, limits, strict=True))
