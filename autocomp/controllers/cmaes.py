"""CMA-ES with margin, over the indices of the decisions as integers."""

import random
from collections.abc import Sequence

import numpy as np
from cmaes import CMAwM
from numpy.typing import NDArray

from autocomp.controllers.evolution import rank
from autocomp.controllers.initial import checked
from autocomp.controllers.random import derived, fresh
from autocomp.policy import Policy
from autocomp.results import TrialResult
from autocomp.space import PolicySpace

__all__ = ["CmaesController"]

WAVE = 4
"""The population is a multiple of it, so that the waves of a study fill generations."""
SPARE = 2
"""Samples of a generation for each result that it needs: waves ask for some before the last results are in."""
SIGMA = 0.3
"""First standard deviation, as a fraction of a decision's range."""
LEAPS = 3
"""Generations in a row that known policies complete, after which the Gaussian is drawn anew around the best result."""

Array = NDArray[np.float64]


class CmaesController:
    """The covariance matrix adaptation evolution strategy with margin (Hamano et al. 2022, section 4).

    `cmaes` is the library behind Optuna's CmaEsSampler. That one learns only from trials that it proposed in the same
    study, so no search could be resumed by telling its history. Here the samples of a generation follow from the
    seed and the results before it, and results are matched to them by policy; those of other policies move nothing.

    Initial policies and uniform draws come first, and the first Gaussian lies around the best of them. A generation
    ends when results of as many samples as the population are in; where known policies complete it again and again, the
    search begins anew around the best. CMA-ES looks at nothing but their order, so that
    constraints need no penalty with a weight: it is told each result's place under constraint domination (Deb 2000,
    section 3), feasible ones by objective, then infeasible ones by violation, then failed ones.
    """

    def __init__(self, space: PolicySpace, seed: int, initial: Sequence[Policy] = ()) -> None:
        self._space = space
        self._seed = seed
        self._initial = checked(space, initial)
        self._open = [place for place, decision in enumerate(space.decisions) if len(decision.options) > 1]
        self._last = np.array([len(space.decisions[place].options) - 1 for place in self._open], np.float64)
        self._population = _population(len(self._open))
        self._seen: set[Policy] = set()
        self._results: dict[Policy, TrialResult] = {}
        self._best: TrialResult | None = None
        self._optimizer: CMAwM | None = None
        self._samples: dict[Policy, list[Array]] = {}
        self._known: list[tuple[Policy, Array]] = []

    def ask(self, count: int) -> list[Policy]:
        generator = random.Random(derived(self._seed, len(self._results), len(self._seen)))
        offered = (policy for policy in (*self._initial, *self._samples) if policy not in self._seen)
        wave: list[Policy] = []
        while len(wave) < count:
            policy = next(offered, None) or fresh(self._space, generator, self._seen)
            if policy is None:
                break
            self._seen.add(policy)
            wave.append(policy)
        return wave

    def tell(self, results: Sequence[TrialResult]) -> None:
        for result in results:
            new = result.policy not in self._results
            self._seen.add(result.policy)
            self._results[result.policy] = result
            better = self._best is None or rank(result) < rank(self._best)
            if better and self._space.contains(result.policy):
                self._best = result
            if new:
                self._known += [(result.policy, sample) for sample in self._samples.get(result.policy, ())]
                self._advance()

    def _advance(self) -> None:
        """Begin when there is something to begin from; go on to the next generation when one is complete."""
        if self._optimizer is None:
            if len(self._open) > 1 and len(self._results) >= max(self._population, len(self._initial)):
                self._begin()
            return
        for _ in range(LEAPS):
            if len(self._known) < self._population:
                return
            known = sorted(self._known[: self._population], key=lambda pair: rank(self._results[pair[0]]))
            self._optimizer.tell([(sample, float(place)) for place, (_, sample) in enumerate(known)])
            self._sample(self._optimizer)
        self._begin()

    def _begin(self) -> None:
        best = self._space.encode(self._best.policy) if self._best else [0] * len(self._space.decisions)
        self._optimizer = CMAwM(
            mean=np.array([best[place] for place in self._open]) / self._last,
            sigma=SIGMA,
            bounds=np.tile([0.0, 1.0], (len(self._open), 1)),
            steps=1 / self._last,
            seed=derived(self._seed, len(self._results)),
            population_size=self._population,
        )
        self._sample(self._optimizer)

    def _sample(self, optimizer: CMAwM) -> None:
        """Draw a generation. Samples whose policies have results already need no other."""
        self._samples = {}
        for _ in range(SPARE * self._population):
            encoded, sample = optimizer.ask()
            indices = [0] * len(self._space.decisions)
            for place, index in zip(self._open, np.rint(encoded * self._last), strict=True):
                indices[place] = int(index)
            self._samples.setdefault(self._space.decode(indices), []).append(sample)
        self._known = [(p, sample) for p, samples in self._samples.items() if p in self._results for sample in samples]


def _population(dimensions: int) -> int:
    """Hansen's default (2016, arXiv:1604.00772, table 1), rounded up to whole waves."""
    return -(-(4 + int(3 * np.log(max(dimensions, 1)))) // WAVE) * WAVE
