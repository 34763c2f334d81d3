"""Evolution: the best policies so far, recombined and changed in a few places, the budget kept used."""

import random
from collections.abc import Sequence
from math import isfinite

from autocomp.controllers.initial import checked
from autocomp.controllers.random import fresh
from autocomp.policy import Policy
from autocomp.results import TrialResult
from autocomp.space import PolicySpace

__all__ = ["EvolutionController", "rank"]

PARENTS = 3
"""Best results that have offspring."""
CROSSOVER = 0.25
"""Share of offspring with two parents."""
STRANGERS = 0.1
"""Share of proposals drawn uniformly, so that no corner of the space is given up."""
SLACK = 0.02
"""A feasible parent further below every limit than this may only give compression back."""
ATTEMPTS = 200
"""Offspring in a row that are known already, before a policy is drawn uniformly instead."""


class EvolutionController:
    """Steady-state evolution over the indices of the space's decisions.

    Parents are the best results under constraint domination (Deb 2000, section 3: a feasible one beats an infeasible
    one, feasible ones compare by objective, infeasible ones by violation), chosen by tournaments of two. Options are
    ordered from least to most compressed, which gives every change a direction: offspring of a parent over the budget
    compress more, those of one with slack compress less, and those of one at the budget trade one choice for another.

    What is asked depends on the seed and on the results told, not on how the two were interleaved.
    """

    def __init__(self, space: PolicySpace, seed: int, initial: Sequence[Policy] = ()) -> None:
        self._space = space
        self._seed = seed
        self._initial = checked(space, initial)
        self._results: dict[Policy, TrialResult] = {}
        self._pending: set[Policy] = set()
        self._open = [place for place, decision in enumerate(space.decisions) if len(decision.options) > 1]

    def ask(self, count: int) -> list[Policy]:
        seen = {*self._results, *self._pending}
        wave = [policy for policy in self._initial if policy not in seen][:count]
        seen.update(wave)
        generator = random.Random(f"{self._seed}/{len(seen)}")
        parents = sorted(self._results.values(), key=rank)[:PARENTS]
        while len(wave) < count:
            stranger = generator.random() < STRANGERS
            policy = None if stranger else self._offspring(parents, generator, seen)
            policy = policy or fresh(self._space, generator, seen)
            if policy is None:
                break
            seen.add(policy)
            wave.append(policy)
        self._pending.update(wave)
        return wave

    def tell(self, results: Sequence[TrialResult]) -> None:
        self._results.update({result.policy: result for result in results})
        self._pending.difference_update(result.policy for result in results)

    def _offspring(self, parents: Sequence[TrialResult], generator: random.Random, seen: set[Policy]) -> Policy | None:
        """A new policy from one or two parents; None where there are none or they have nothing new."""
        if not parents or not self._open:
            return None
        for _ in range(ATTEMPTS):
            first, second = (min(generator.choices(range(len(parents)), k=2)) for _ in range(2))
            genes = list(self._space.encode(parents[first].policy))
            if generator.random() < CROSSOVER:
                other = self._space.encode(parents[second].policy)
                genes = [generator.choice(pair) for pair in zip(genes, other, strict=True)]
            self._change(genes, _room(parents[first]), generator)
            policy = self._space.decode(genes)
            if policy not in seen:
                return policy
        return None

    def _change(self, genes: list[int], room: float, generator: random.Random) -> None:
        """Move one to three choices, in the directions that the parent's room under its limits calls for."""
        if room < 0:
            directions = [1] * generator.randint(1, 3)
        elif room > SLACK:
            directions = [-1] * generator.randint(1, 2) + [1] * generator.randint(0, 1)
        else:
            directions = [-1, 1][: generator.randint(1, 2)] + [1] * generator.randint(0, 1)
        kind: str | None = None
        for direction in directions:
            movable = [place for place in self._open if 0 <= genes[place] + direction < self._options(place)]
            alike = [place for place in movable if self._space.decisions[place].kind == kind]
            if alike and generator.random() < 0.5:
                movable = alike  # a trade between two branches, say
            if movable:
                place = generator.choice(movable)
                kind = self._space.decisions[place].kind
                furthest = self._options(place) - 1 - genes[place] if direction > 0 else genes[place]
                genes[place] += direction * min(furthest, 1 if generator.random() < 0.7 else generator.randint(1, 3))

    def _options(self, place: int) -> int:
        return len(self._space.decisions[place].options)


def rank(result: TrialResult) -> tuple[int, float, int]:
    """Constraint domination as a sort key; useless results come last, equal ones as they were made."""
    if result.status == "failed" or not all(map(isfinite, result.violations)):
        return 2, 0.0, result.number
    if result.feasible and result.objective is not None:
        return 0, result.objective, result.number
    return 1, sum(max(violation, 0.0) for violation in result.violations), result.number


def _room(result: TrialResult) -> float:
    """Least distance to a limit, as a fraction of it; negative over a limit."""
    return -max(result.violations, default=0.0)
