"""Optuna's Gaussian process over many small decisions."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.samplers import GPSampler

__all__ = ["Climber"]

SAMPLES = 256
"""Uniform points, the best of which is climbed from."""
STEPS = 12
"""Changed decisions between a start and the proposal, at most."""


class Climber(GPSampler):
    """Expected improvement times the probability of holding every budget (Gardner et al. 2014), climbed in steps.

    Optuna looks for its maximum one decision after the other from ten starts, which takes seconds for tens of
    decisions. Here all points that differ in one decision are compared at once, from two starts: the best trial, and
    the best of a uniform sample. `_optimize_acqf` is the hook that Optuna names for that.
    """

    def _optimize_acqf(self, acqf: Any, best_params: NDArray[np.float64] | None) -> NDArray[np.float64]:
        points = acqf.search_space.sample_normalized_params(SAMPLES, rng=self._rng.rng)
        starts = [points[int(np.argmax(acqf.eval_acqf_no_grad(points)))]]
        climbed = [_climbed(acqf, start) for start in [*starts, *([] if best_params is None else best_params)]]
        return max(climbed, key=lambda found: found[0])[1]


def _climbed(acqf: Any, start: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """The value and the place where no single change raises the value any more, or where the steps end."""
    place, value = start, float(acqf.eval_acqf_no_grad(start[None])[0])
    space = acqf.search_space
    choices = list(zip(space.discrete_indices, space.get_choices_of_discrete_params(), strict=True))
    for _ in range(STEPS):
        around = np.repeat(place[None], sum(len(options) for _, options in choices), axis=0)
        row = 0
        for index, options in choices:
            around[row : row + len(options), index] = options
            row += len(options)
        values = acqf.eval_acqf_no_grad(around)
        best = int(np.argmax(values))
        if not values[best] > value:
            break
        place, value = around[best], float(values[best])
    return value, place
