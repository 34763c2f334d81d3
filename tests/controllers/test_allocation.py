"""The knapsack against all combinations."""

import random
from itertools import product

import pytest

from autocomp.controllers import Allocation, allocate, frontier
from autocomp.errors import InputError

Table = list[list[float]]


def drawn(seed: int, decisions: int = 5, whole: bool = False) -> tuple[Table, Table]:
    generator = random.Random(seed)
    sizes = [generator.randint(1, 4) for _ in range(decisions)]
    draw = (lambda: float(generator.randint(-3, 6))) if whole else generator.random
    return [[draw() for _ in range(size)] for size in sizes], [[draw() for _ in range(size)] for size in sizes]


def trading(seed: int, decisions: int) -> tuple[Table, Table]:
    """Options that cost the less the more they lose, so that few combinations are beaten in both."""
    generator = random.Random(seed)

    def table() -> Table:
        return [sorted(generator.random() for _ in range(4)) for _ in range(decisions)]

    return table(), [row[::-1] for row in table()]


def everything(losses: Table, costs: Table) -> list[Allocation]:
    found = []
    for choices in product(*(range(len(row)) for row in losses)):
        loss = sum(row[index] for row, index in zip(losses, choices, strict=True))
        found.append(Allocation(choices, loss, sum(r[i] for r, i in zip(costs, choices, strict=True))))
    return found


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_the_best_within_every_limit(seed: int, whole: bool) -> None:
    losses, costs = drawn(seed, whole=whole)
    possible = everything(losses, costs)
    for limit in sorted({found.cost for found in possible}):
        best = min(found.loss for found in possible if found.cost <= limit + 1e-12)
        found = allocate(losses, costs, limit + 1e-12)
        assert found is not None and found.loss == pytest.approx(best) and found.cost <= limit + 1e-9
        assert found.loss == pytest.approx(sum(r[i] for r, i in zip(losses, found.choices, strict=True)))
        assert found.cost == pytest.approx(sum(r[i] for r, i in zip(costs, found.choices, strict=True)))
    assert allocate(losses, costs, min(found.cost for found in possible) - 0.1) is None


def test_a_frontier_rises_in_cost_and_falls_in_loss() -> None:
    found = frontier(*trading(3, decisions=8))
    assert len(found) > 5
    assert [a.cost for a in found] == sorted({a.cost for a in found})
    assert [a.loss for a in found] == sorted({a.loss for a in found}, reverse=True)


@pytest.mark.parametrize("seed", range(5))
def test_with_few_states_it_stays_near_the_best_and_within_the_limit(seed: int) -> None:
    losses, costs = trading(seed, decisions=12)
    exact, thinned = frontier(losses, costs, states=10**6), frontier(losses, costs, states=64)
    assert len(thinned) <= 64 < len(exact)
    assert thinned[0].cost == exact[0].cost and thinned[-1].loss == exact[-1].loss
    limit = (exact[0].cost + exact[-1].cost) / 2
    near, best = allocate(losses, costs, limit, states=64), allocate(losses, costs, limit, states=10**6)
    assert near is not None and best is not None and near.cost <= limit
    assert best.loss <= near.loss <= best.loss + 0.05 * (exact[0].loss - exact[-1].loss)


def test_nothing_to_decide_is_one_empty_allocation() -> None:
    assert frontier([], []) == (Allocation((), 0.0, 0.0),)


@pytest.mark.parametrize(
    ("losses", "costs", "said"),
    [
        ([[1.0, 2.0]], [[1.0]], "for each of its options"),
        ([[1.0]], [[1.0], [2.0]], "for each of its options"),
        ([[]], [[]], "at least one option"),
        ([[float("nan")]], [[1.0]], "finite"),
        ([[1.0]], [[float("inf")]], "finite"),
    ],
)
def test_tables_that_do_not_fit_are_refused(losses: Table, costs: Table, said: str) -> None:
    with pytest.raises(InputError, match=said):
        frontier(losses, costs)
