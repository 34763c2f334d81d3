"""Policies drawn from a space."""

import random

from autocomp.space import Decision

__all__ = ["Uniform"]


class Uniform:
    """Every option of a decision alike."""

    def __init__(self, seed: int) -> None:
        self._generator = random.Random(seed)

    def choose(self, decision: Decision) -> int:
        return self._generator.randrange(len(decision.options))
