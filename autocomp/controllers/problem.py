"""Decisions that cost together: what is to be chosen, and a choice that can be changed in microseconds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from autocomp.errors import InputError

__all__ = ["Assignment", "Factor", "Problem"]

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


class Assignment:
    """A choice for every decision, with its loss and costs, kept up to date by what a change touches."""

    def __init__(self, problem: Problem, choices: Sequence[int]) -> None:
        self.problem = problem
        self.choices = list(choices)
        self.loss = problem.loss(choices)
        self.costs = list(problem.cost(choices))
        self._touching: list[list[tuple[int, int]]] = [[] for _ in problem.losses]
        for budget, factors in enumerate(problem.costs):
            for position, factor in enumerate(factors):
                for d in factor.decisions:
                    self._touching[d].append((budget, position))
        self._ties: dict[int, list[int]] = {}
        for inner, outer in problem.tied.items():
            self._ties.setdefault(outer, []).append(inner)

    def options(self, decision: int) -> int:
        """How many options can be taken on their own: none inside a dropped branch."""
        count = len(self.problem.losses[decision])
        if decision not in self.problem.tied:
            return count
        return 0 if self.choices[decision] == count - 1 else count - 1

    def take(self, decision: int, option: int) -> None:
        """Change one choice; with a branch goes, and comes back whole, what is inside it."""
        changes = {decision: option}
        last = len(self.problem.losses[decision]) - 1
        if (option == last) != (self.choices[decision] == last):
            for inner in self._ties.get(decision, ()):
                changes[inner] = len(self.problem.losses[inner]) - 1 if option == last else 0
        self._apply(changes)

    def set(self, choices: Sequence[int]) -> None:
        self._apply({d: c for d, c in enumerate(choices) if c != self.choices[d]})

    def over(self, limits: Sequence[float]) -> float:
        """Largest fraction over a limit; 0 where all hold."""
        return max((max(0.0, cost / limit - 1) for cost, limit in zip(self.costs, limits, strict=True)), default=0.0)

    def changes(self, decision: int) -> tuple[Array, Array]:
        """What taking each option instead changes: loss (options,), and costs (budgets, options)."""
        count = self.options(decision)
        if count == 0:
            return np.zeros(0), np.zeros((len(self.costs), 0))
        if decision in self._ties:
            return self._by_trying(decision, count)
        row = self.problem.losses[decision][:count]
        costs = np.zeros((len(self.costs), count))
        for budget, position in self._touching[decision]:
            factor = self.problem.costs[budget][position]
            costs[budget] += factor.costs[
                tuple(slice(0, count) if d == decision else self.choices[d] for d in factor.decisions)
            ]
        at = self.choices[decision]
        return row - row[at], costs - costs[:, [at]]

    def _by_trying(self, decision: int, count: int) -> tuple[Array, Array]:
        before, loss, costs = list(self.choices), self.loss, np.array(self.costs)
        rows = []
        for option in range(count):
            self.take(decision, option)
            rows.append((self.loss - loss, *(np.array(self.costs) - costs)))
            self.set(before)
        found = np.array(rows).reshape(count, 1 + len(costs))
        return found[:, 0], found[:, 1:].T

    def _apply(self, changes: Mapping[int, int]) -> None:
        touched = dict.fromkeys(entry for d in changes for entry in self._touching[d])
        self._add(touched, -1.0)
        for d, choice in changes.items():
            row = self.problem.losses[d]
            self.loss += float(row[choice] - row[self.choices[d]])
            self.choices[d] = choice
        self._add(touched, 1.0)

    def _add(self, touched: Mapping[tuple[int, int], None], sign: float) -> None:
        for budget, position in touched:
            factor = self.problem.costs[budget][position]
            self.costs[budget] += sign * float(factor.costs[tuple(self.choices[d] for d in factor.decisions)])
