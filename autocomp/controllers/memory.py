"""What an Optuna sampler is shown of a long history: bounded, and the same however the history was told."""

from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import optuna
from optuna.samplers import BaseSampler, NSGAIISampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

__all__ = ["Elites", "Generations", "Memory", "Observation", "Successors", "new_study"]


@dataclass(frozen=True, slots=True)
class Observation:
    """A result as a sampler sees it.

    Attributes:
        indices: of the option taken, by decision.
        values: the numbers to minimise; None where the result is infeasible and has none.
        violations: of the budgets; feasible where none is positive.
    """

    indices: tuple[int, ...]
    values: tuple[float, ...] | None
    violations: tuple[float, ...]


class Memory(Protocol):
    """A fold over the observations in the order told."""

    def add(self, observation: Observation) -> None: ...

    def kept(self) -> Sequence[Observation]:
        """For the sampler of the next wave to look at."""
        ...


class Elites:
    """The best feasible observations and the most recent ones, in the order told: all of them in a short history."""

    def __init__(self, best: int, recent: int) -> None:
        self._size = best
        self._best: list[tuple[tuple[float, ...], int, Observation]] = []
        self._recent: deque[tuple[int, Observation]] = deque(maxlen=recent)
        self._count = 0

    def add(self, observation: Observation) -> None:
        if observation.values is not None and all(violation <= 0 for violation in observation.violations):
            insort(self._best, (observation.values, self._count, observation))
            del self._best[self._size :]
        self._recent.append((self._count, observation))
        self._count += 1

    def kept(self) -> Sequence[Observation]:
        by_number = dict([*((number, observation) for _, number, observation in self._best), *self._recent])
        return [by_number[number] for number in sorted(by_number)]


class Generations:
    """The parents of the generation that is being filled.

    NSGA-II (Deb et al. 2002, section III-C): as soon as ``population`` observations are in, the best of them and of
    their parents, by constraint domination and crowding, become the parents of the next generation.
    """

    def __init__(self, population: int, objectives: int) -> None:
        self._population = population
        self._objectives = objectives
        self._parents: list[Observation] = []
        self._filled: list[Observation] = []

    def add(self, observation: Observation) -> None:
        self._filled.append(observation)
        if len(self._filled) == self._population:
            self._parents = _selected([*self._filled, *self._parents], self._population, self._objectives)
            self._filled = []

    def kept(self) -> Sequence[Observation]:
        return self._parents


class Successors(NSGAIISampler):
    """NSGA-II whose parents are all finished trials of the study, instead of a generation of a long one."""

    def get_trial_generation(self, study: Study, trial: FrozenTrial) -> int:
        return 1

    def get_population(self, study: Study, generation: int) -> list[FrozenTrial]:
        return []

    def get_parent_population(self, study: Study, generation: int) -> list[FrozenTrial]:
        return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def new_study(objectives: int, sampler: BaseSampler | None = None) -> Study:
    """A study in memory. Optuna announces every one on standard error; its level is put back afterwards."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(sampler=sampler, directions=["minimize"] * objectives)
    finally:
        optuna.logging.set_verbosity(level)


def _selected(observations: Sequence[Observation], population: int, objectives: int) -> list[Observation]:
    """As many as the population, by Optuna's selection, which needs no parameters."""
    study = new_study(objectives)
    unknown = (0.0,) * objectives  # infeasible ones are ranked by their violations alone
    for observation in observations:
        constraints = {str(position): violation for position, violation in enumerate(observation.violations)}
        study.add_trial(create_trial(values=observation.values or unknown, constraints=constraints))
    chosen = Successors(population_size=population).select_parent(study, 1)
    return [observations[trial.number] for trial in chosen]
