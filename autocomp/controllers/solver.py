"""The options of least summed loss under budgets whose costs depend on several decisions together."""

import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autocomp.controllers.problem import Assignment, Problem
from autocomp.controllers.programme import solve_exactly

__all__ = ["solve", "solve_nearly"]

EXACT = 40_000
"""Combinations in all factors up to which the integer programme is solved, in a second; beyond it takes minutes."""
SWEEPS = 8
"""Visits of all decisions for one price, at most; few change anything after the third."""
PRICES = (1e-5, 1e3, 28)
"""First, last and number of the prices of a budget's whole, in units of all that can be lost."""
HALVINGS = 12
"""Of the interval of prices between the budgets kept and missed, in its logarithm."""
EXCHANGES = 32
"""Changes, and pairs of them, that follow, at most."""
TRIED = 64
"""Of the pairs that promise most, how many are tried to find one."""
DISTURBED = 30
"""Times that the best solution is disturbed and solved for again."""
DEARER = 1.3
"""What the price is raised by, up to `SWEEPS` times, where a disturbed solution is over a limit."""
EPSILON = 1e-9
"""Relative to a limit, and in losses: what sums of floats are off by."""

Array = NDArray[np.float64]


def solve(problem: Problem, limits: Sequence[float]) -> tuple[int, ...] | None:
    """Indices of the options of least loss whose costs are within the limits; None where none was found.

    Exact for problems of up to `EXACT` combinations (`solve_exactly`), else nearly so (`solve_nearly`).
    """
    combinations = sum(factor.costs.size for factors in problem.costs for factor in factors)
    return solve_exactly(problem, limits) if combinations <= EXACT else solve_nearly(problem, limits)


def solve_nearly(problem: Problem, limits: Sequence[float]) -> tuple[int, ...] | None:
    """As `solve`, of a small loss instead of the least, in a second for hundreds of decisions.

    Lagrangian relaxation (Everett 1963, theorem 1): costs get a price in place of their limits, and for a price every
    decision in turn takes its best option, the others as they are, until none changes. The least price at which the
    limits hold is approached from both sides, from nothing compressed and from everything. What the limits then leave
    is used up by single changes, and by pairs of which one pays for the other. The best found is disturbed and improved
    again, many times (iterated local search; Lourenco, Martin and Stuetzle 2003).

    Args:
        limits: by budget.
    """
    state = Assignment(problem, _least_loss(problem))
    if _hold(state, limits):
        return tuple(state.choices)
    if any(limit <= 0 for limit in limits):
        return None
    unit = max(sum(float(np.ptp(row)) for row in problem.losses), EPSILON)
    prices = [unit * price for price in np.geomspace(*PRICES)]
    found: dict[tuple[int, ...], tuple[float, float, Array]] = {}
    for weights in _emphases(limits):
        for path in (prices, prices[::-1]):
            best = _along(state, limits, weights, path)
            if best is not None:
                state.set(best[2])
                _exchange(state, limits)
                found[tuple(state.choices)] = state.loss, best[1], weights
    if not found:
        return None
    choices, (_, price, weights) = min(found.items(), key=lambda entry: entry[1][0])
    state.set(choices)
    _disturb(state, limits, price, weights)
    return tuple(state.choices)


def _least_loss(problem: Problem) -> list[int]:
    choices = [int(np.argmin(row[:-1] if d in problem.tied else row)) for d, row in enumerate(problem.losses)]
    for inner, outer in problem.tied.items():
        if choices[outer] == len(problem.losses[outer]) - 1:
            choices[inner] = len(problem.losses[inner]) - 1
    return choices


def _emphases(limits: Sequence[float]) -> list[Array]:
    """Prices of the budgets in proportion: alike, and each alone, for often only one of them binds."""
    each = 1 / np.array(limits)
    alone = [np.where(np.arange(len(each)) == budget, each, 0.01 * each) for budget in range(len(each))]
    return [each, *alone] if len(alone) > 1 else [each]


def _along(
    state: Assignment, limits: Sequence[float], weights: Array, prices: Sequence[float]
) -> tuple[float, float, tuple[int, ...]] | None:
    """The best state along prices to where the limits begin or cease to hold, and ever closer to that.

    Returns:
        Its loss, its price, its choices.
    """
    best: tuple[float, float, tuple[int, ...]] | None = None

    def holds(price: float) -> bool:
        nonlocal best
        _settle(state, price * weights)
        if not _hold(state, limits):
            return False
        if best is None or state.loss < best[0]:
            best = state.loss, price, tuple(state.choices)
        return True

    before, first = prices[0], holds(prices[0])
    behind = next((price for price in prices[1:] if holds(price) != first), None)
    if behind is not None:
        before = prices[prices.index(behind) - 1]
        for _ in range(HALVINGS):
            middle = float(np.sqrt(before * behind))
            before, behind = (middle, behind) if holds(middle) == first else (before, middle)
    return best


def _settle(state: Assignment, prices: Array) -> None:
    """Every decision in turn takes its best option, until none changes."""
    for _ in range(SWEEPS):
        changed = False
        for decision in range(len(state.choices)):
            if state.options(decision) > 1:
                losses, costs = state.changes(decision)
                priced = losses + prices @ costs
                option = int(np.argmin(priced))
                if priced[option] < -EPSILON:
                    state.take(decision, option)
                    changed = True
        if not changed:
            return


def _disturb(state: Assignment, limits: Sequence[float], price: float, weights: Array) -> None:
    """Leave the state at the best that is found by changing some decisions at random and settling again."""
    draws = random.Random(0)
    best, loss = tuple(state.choices), state.loss
    for _ in range(DISTURBED):
        state.set(best)
        part = draws.choice((0.05, 0.1, 0.2))
        for decision in draws.sample(range(len(best)), min(len(best), max(2, int(part * len(best))))):
            if (count := state.options(decision)) > 1:
                state.take(decision, (state.choices[decision] + draws.randrange(1, count)) % count)
        dear = price * draws.uniform(0.3, 1.5)
        for _ in range(SWEEPS):
            _settle(state, dear * weights)
            if _hold(state, limits):
                _exchange(state, limits)
                break
            dear *= DEARER
        if _hold(state, limits) and state.loss < loss - EPSILON:
            best, loss = tuple(state.choices), state.loss
    state.set(best)


def _exchange(state: Assignment, limits: Sequence[float]) -> None:
    """Changes of one decision or of two that lose less and hold the limits, the best ones first."""
    for _ in range(EXCHANGES):
        places, rows = [], []
        for decision in range(len(state.choices)):
            losses, costs = state.changes(decision)
            places += [(decision, option) for option in range(len(losses)) if option != state.choices[decision]]
            rows += [(loss, *cost) for o, (loss, cost) in enumerate(zip(losses, costs.T, strict=True))
                     if o != state.choices[decision]]  # fmt: skip
        if not rows or not _improve(state, limits, places, np.array(rows)):
            return


def _improve(state: Assignment, limits: Sequence[float], places: Sequence[tuple[int, int]], changes: Array) -> bool:
    """Take the best change or pair of changes; False where none is better."""
    left = np.array(limits) - np.array(state.costs)
    losses, costs = changes[:, 0], changes[:, 1:]
    gains = np.flatnonzero(losses < -EPSILON)
    fitting = gains[(costs[gains] <= left).all(axis=1)]
    pays = np.flatnonzero((costs < 0).any(axis=1))
    pairs = losses[gains][:, None] + losses[pays][None, :]
    fits = (costs[gains][:, None] + costs[pays][None, :] <= left).all(axis=2)
    pairs = np.where(fits, pairs, np.inf)
    order = np.argsort(pairs, axis=None)[:TRIED]
    tries: list[tuple[int, ...]] = [(place,) for place in fitting[np.argsort(losses[fitting])][:1]]
    tries += [(gains[k // len(pays)], pays[k % len(pays)]) for k in order if pairs.flat[k] < -EPSILON]
    before, loss = tuple(state.choices), state.loss
    for moves in tries:
        for decision, option in (places[move] for move in moves):
            if option < state.options(decision):
                state.take(decision, option)
        if _hold(state, limits) and state.loss < loss - EPSILON:
            return True
        state.set(before)
    return False


def _hold(state: Assignment, limits: Sequence[float]) -> bool:
    return all(cost <= limit + EPSILON * abs(limit) for cost, limit in zip(state.costs, limits, strict=True))
