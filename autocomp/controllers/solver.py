"""The options of least summed loss under budgets whose costs depend on several decisions together."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from autocomp.errors import InputError

__all__ = ["Factor", "Problem", "solve"]

GAP = 1e-3
"""Relative gap to the bound at which a solution counts as the best."""

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """A part of a cost that depends on a few decisions.

    Attributes:
        decisions: their indices, each once.
        costs: one axis a decision, one entry an option.
    """

    decisions: tuple[int, ...]
    costs: Array


@dataclass(frozen=True, eq=False)
class Problem:
    """Decisions to make, what each option loses, and what all together cost.

    Attributes:
        losses: for each decision the loss of each option.
        costs: for each budget the factors whose sum it limits.
        tied: decision -> another one: it takes its last option exactly where the other takes its own last one.
    """

    losses: tuple[Array, ...]
    costs: tuple[tuple[Factor, ...], ...]
    tied: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        factors = [factor for entries in self.costs for factor in entries]
        for factor in factors:
            shape = tuple(len(self.losses[decision]) for decision in factor.decisions)
            if factor.costs.shape != shape or len(set(factor.decisions)) != len(shape):
                raise InputError(f"a factor of decisions {factor.decisions} has costs of shape {factor.costs.shape}")
        if not all(np.isfinite(array).all() for array in (*self.losses, *(factor.costs for factor in factors))):
            raise InputError("losses and costs must be finite: leave out the options that have none")

    def loss(self, choices: Sequence[int]) -> float:
        return float(sum(row[choice] for row, choice in zip(self.losses, choices, strict=True)))

    def cost(self, choices: Sequence[int]) -> tuple[float, ...]:
        """By budget."""
        return tuple(
            float(sum(factor.costs[tuple(choices[d] for d in factor.decisions)] for factor in factors))
            for factors in self.costs
        )


def solve(problem: Problem, limits: Sequence[float], time_limit_s: float = 5.0) -> tuple[int, ...] | None:
    """Indices of the options of least loss whose costs are within the limits; None where none was found.

    An integer programme: a binary variable for each option of each decision, and for each factor a continuous one for
    each combination of its decisions' options, whose marginals are the binary ones (the local polytope; Wainwright
    and Jordan 2008, section 4.1), so that a cost that is no sum over decisions stays linear. HiGHS solves it to a
    relative gap of `GAP`.

    Args:
        limits: by budget.
        time_limit_s: after which the best solution found so far is taken.
    """
    programme = _Programme(problem)
    for factors, limit in zip(problem.costs, limits, strict=True):
        terms = [programme.combinations(factor) for factor in factors]
        columns = np.concatenate([np.zeros(0, np.int64), *(places for places, _ in terms)])
        programme.row(columns, np.concatenate([np.zeros(0), *(costs for _, costs in terms)]), -np.inf, limit)
    return programme.solve(time_limit_s)


class _Programme:
    """Variables and rows; every decision's options are the first variables."""

    def __init__(self, problem: Problem) -> None:
        sizes = [len(row) for row in problem.losses]
        self._first = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._objective = np.concatenate([np.zeros(0), *problem.losses])
        self._variables = self._binary = len(self._objective)
        self._rows: list[tuple[NDArray[np.int64], Array, float, float]] = []
        self._known: dict[tuple[int, ...], NDArray[np.int64]] = {}
        self._sizes = sizes
        for decision, size in enumerate(sizes):
            self.row(self._options(decision), np.ones(size), 1.0, 1.0)
        for inner, outer in problem.tied.items():
            last = np.array([self._first[inner + 1] - 1, self._first[outer + 1] - 1])
            self.row(last, np.array([1.0, -1.0]), 0.0, 0.0)

    def row(self, columns: NDArray[np.int64], values: Array, low: float, high: float) -> None:
        self._rows.append((columns, values, low, high))

    def combinations(self, factor: Factor) -> tuple[NDArray[np.int64], Array]:
        """Variables and costs of the combinations of a factor's options."""
        if len(factor.decisions) == 1:
            return self._options(factor.decisions[0]), factor.costs.ravel()
        places = self._known.get(factor.decisions)
        if places is None:
            places = self._variables + np.arange(factor.costs.size).reshape(factor.costs.shape)
            self._variables += factor.costs.size
            self._known[factor.decisions] = places
            for axis, decision in enumerate(factor.decisions):
                for option, variable in enumerate(self._options(decision)):
                    columns = places.take(option, axis=axis).ravel()
                    values = np.append(np.ones(len(columns)), -1.0)
                    self.row(np.append(columns, variable), values, 0.0, 0.0)
        return places.ravel(), factor.costs.ravel()

    def solve(self, time_limit_s: float) -> tuple[int, ...] | None:
        at = np.repeat(np.arange(len(self._rows)), [len(row[0]) for row in self._rows])
        columns, values = (np.concatenate([row[part] for row in self._rows]) for part in (0, 1))
        matrix = sparse.csr_matrix((values, (at, columns)), shape=(len(self._rows), self._variables))
        low, high = (np.array([row[part] for row in self._rows]) for part in (2, 3))
        with _quiet():
            found = milp(
                np.append(self._objective, np.zeros(self._variables - self._binary)),
                constraints=LinearConstraint(matrix, low, high),
                integrality=np.arange(self._variables) < self._binary,
                bounds=Bounds(0, 1),
                options={"time_limit": time_limit_s, "mip_rel_gap": GAP},
            )
        if found.x is None:
            return None
        return tuple(int(np.argmax(found.x[self._options(decision)])) for decision in range(len(self._sizes)))

    def _options(self, decision: int) -> NDArray[np.int64]:
        return np.arange(self._first[decision], self._first[decision + 1])


@contextmanager
def _quiet() -> Iterator[None]:
    """HiGHS writes some of its messages to standard output whatever it was told, past Python's own."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
