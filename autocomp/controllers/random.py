"""The honest baseline: every option of every decision is equally likely.

Removing a branch is one more option beside its kept ratios, not one of two: drawn as often as not it would leave half
of every network, and beating that proves nothing.
"""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from autocomp.controllers.initial import checked
from autocomp.policy import Policy, digest_of
from autocomp.results import TrialResult
from autocomp.space import Decision, PolicySpace

__all__ = ["RandomController", "derived", "fresh"]

# Draws in a row that bring nothing new before a space counts as exhausted: the last policy of a hundred is then
# missed once in 20,000 times.
PATIENCE = 1000


class RandomController:
    """Proposes the initial policies, then the policies of one seeded stream, leaving out those it was told of.

    What it learns from a result is only that the policy was tried: a resumed search proposes exactly what the
    interrupted one had still to do.
    """

    def __init__(self, space: PolicySpace, seed: int, initial: Sequence[Policy] = ()) -> None:
        self._space = space
        self._initial = checked(space, initial)
        self._generator = random.Random(seed)
        self._seen: set[Policy] = set()

    def ask(self, count: int) -> list[Policy]:
        wave = [policy for policy in self._initial if policy not in self._seen][:count]
        self._seen.update(wave)
        while len(wave) < count:
            policy = fresh(self._space, self._generator, self._seen)
            if policy is None:
                break
            self._seen.add(policy)
            wave.append(policy)
        return wave

    def tell(self, results: Sequence[TrialResult]) -> None:
        self._seen.update(result.policy for result in results)


@dataclass(frozen=True, slots=True)
class _UniformSource:
    generator: random.Random
    ratios: int

    def choose(self, decision: Decision) -> int:
        if decision.kind == "branch" and len(decision.options) > 1:
            return int(self.generator.randrange(self.ratios + 1) == 0)
        return self.generator.randrange(len(decision.options))


def fresh(space: PolicySpace, generator: random.Random, seen: Collection[Policy]) -> Policy | None:
    """A uniformly drawn policy that is not in ``seen``, or None when `PATIENCE` draws in a row bring none."""
    source = _UniformSource(generator, len(space.ratios))
    for _ in range(PATIENCE):
        policy = space.suggest(source)
        if policy not in seen:
            return policy
    return None


def derived(*parts: int) -> int:
    """A seed of 32 bits that depends on all parts."""
    return int(digest_of(parts)[:8], 16)
