"""The integer programme against trying everything."""

from itertools import product

import numpy as np
import pytest

from autocomp.controllers import Factor, Problem, solve
from autocomp.errors import InputError


def drawn(seed: int) -> Problem:
    """Five decisions, the last two without effect where the first takes its last option; two budgets."""
    rng = np.random.default_rng(seed)
    sizes = (2, 3, 4, 3, 3)
    losses = tuple(np.sort(rng.uniform(0, 1, size)) for size in sizes)
    for inner in (3, 4):
        losses[inner][-1] = 0.0
    time = tuple(Factor(d, rng.uniform(0, 1, [sizes[k] for k in d])) for d in ((0, 1), (1, 2, 3), (3, 4), (2,)))
    size = tuple(Factor((d,), rng.uniform(0, 1, sizes[d])) for d in range(5))
    return Problem(losses, (time, size), {3: 0, 4: 0})


def brute_force(problem: Problem, limits: tuple[float, ...]) -> float | None:
    sizes = [len(row) for row in problem.losses]
    found = [
        sum(problem.losses[d][c] for d, c in enumerate(choices))
        for choices in product(*map(range, sizes))
        if all((choices[i] == sizes[i] - 1) == (choices[o] == sizes[o] - 1) for i, o in problem.tied.items())
        and all(
            sum(f.costs[tuple(choices[d] for d in f.decisions)] for f in factors) <= limit
            for factors, limit in zip(problem.costs, limits, strict=True)
        )
    ]
    return min(found, default=None)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("limits", [(3.0, 5.0), (1.6, 2.5), (1.2, 1.8), (0.1, 5.0)])
def test_it_finds_the_least_loss_within_every_budget(seed: int, limits: tuple[float, float]) -> None:
    problem = drawn(seed)
    best = brute_force(problem, limits)
    found = solve(problem, limits)
    if best is None:
        assert found is None
        return
    assert found is not None
    assert all(cost <= limit + 1e-6 for cost, limit in zip(problem.cost(found), limits, strict=True))
    assert problem.loss(found) == pytest.approx(best, abs=2e-3)
    assert all((found[i] == 2) == (found[o] == 1) for i, o in problem.tied.items())


def test_without_a_budget_nothing_is_lost() -> None:
    problem = drawn(0)
    assert solve(Problem(problem.losses, ()), ()) == tuple(int(np.argmin(row)) for row in problem.losses)


def test_costs_that_do_not_fit_their_decisions_are_refused() -> None:
    losses = (np.zeros(2), np.zeros(3))
    with pytest.raises(InputError, match="shape"):
        Problem(losses, ((Factor((0, 1), np.zeros((3, 2))),),))
    with pytest.raises(InputError, match="finite"):
        Problem(losses, ((Factor((0,), np.array([0.0, np.inf])),),))
