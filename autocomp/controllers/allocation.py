"""Which option each of many decisions takes so that the summed loss is least within a summed cost."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autocomp.errors import InputError

__all__ = ["STATES", "Allocation", "allocate", "frontier"]

STATES = 4096
"""Partial choices kept after each decision, at most."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """One option for every decision.

    Attributes:
        choices: index of the option taken, by decision.
        loss, cost: summed over the decisions.
    """

    choices: tuple[int, ...]
    loss: float
    cost: float


def frontier(
    losses: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], states: int = STATES
) -> tuple[Allocation, ...]:
    """Every allocation that no other beats in both loss and cost, by rising cost and falling loss.

    The multiple-choice knapsack's dynamic programme over non-dominated partial choices (Kellerer, Pferschy and
    Pisinger, Knapsack Problems, 2004, section 11.5): exact as long as no decision leaves more than ``states`` of
    them. Where one does, of those whose costs lie within a ``states``-th of the range the cheapest stays, so that
    what is returned is always a real allocation, and near the best one.

    Args:
        losses, costs: one row a decision, one entry an option; finite, of any unit and sign.

    Raises:
        InputError: rows of unequal lengths, an empty row, or a value that is not finite.
    """
    if [len(row) for row in losses] != [len(row) for row in costs] or not all(map(len, losses)):
        raise InputError("every decision needs a loss and a cost for each of its options, and at least one option")
    loss, cost = np.zeros(1), np.zeros(1)
    choices = np.zeros((1, 0), dtype=np.int64)
    for more_loss, more_cost in zip(losses, costs, strict=True):
        if not np.isfinite([*more_loss, *more_cost]).all():
            raise InputError("losses and costs must be finite: leave out the options that have none")
        options = len(more_loss)
        wider_loss, wider_cost = np.add.outer(loss, more_loss).ravel(), np.add.outer(cost, more_cost).ravel()
        kept = _thinned(wider_cost, _non_dominated(wider_loss, wider_cost), states)
        loss, cost = wider_loss[kept], wider_cost[kept]
        choices = np.column_stack([choices[kept // options], kept % options])
    rows = zip(choices.tolist(), loss.tolist(), cost.tolist(), strict=True)
    return tuple(Allocation(tuple(chosen), *sums) for chosen, *sums in rows)


def allocate(
    losses: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], limit: float, states: int = STATES
) -> Allocation | None:
    """The allocation of least loss whose cost is at most ``limit``; None where every one costs more.

    Raises:
        InputError: as `frontier`.
    """
    affordable = [found for found in frontier(losses, costs, states) if found.cost <= limit]
    return affordable[-1] if affordable else None


def _non_dominated(loss: NDArray[np.float64], cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices by rising cost, each of lower loss than all before it; of equal ones the first."""
    order = np.lexsort((loss, cost))
    best_before = np.minimum.accumulate(np.concatenate([[np.inf], loss[order][:-1]]))
    return order[loss[order] < best_before]


def _thinned(cost: NDArray[np.float64], kept: NDArray[np.int64], states: int) -> NDArray[np.int64]:
    """At most ``states`` of the indices, spread over their costs, the two ends among them."""
    if len(kept) <= states:
        return kept
    span = cost[kept[-1]] - cost[kept[0]]
    places = ((cost[kept[:-1]] - cost[kept[0]]) / span * (states - 1)).astype(np.int64)
    _, first = np.unique(np.minimum(places, states - 2), return_index=True)
    return np.append(kept[first], kept[-1])
