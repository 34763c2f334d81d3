"""The integer programme of a problem: exact, for the small ones."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from autocomp.controllers.problem import Factor, Problem

__all__ = ["solve_exactly"]

GAP = 1e-3
"""Relative gap to the bound at which a solution counts as the best."""

Array = NDArray[np.float64]


def solve_exactly(problem: Problem, limits: Sequence[float], time_limit_s: float = 5.0) -> tuple[int, ...] | None:
    """Indices of the options of least loss whose costs are within the limits; None where none was found.

    A binary variable for each option of each decision, and for each factor a continuous one for each combination of its
    decisions' options, whose marginals are the binary ones (the local polytope; Wainwright and Jordan 2008, section
    4.1), so that a cost that is no sum over decisions stays linear. HiGHS solves it to a relative gap of `GAP`.

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
