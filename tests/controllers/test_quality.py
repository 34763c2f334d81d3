"""Do the samplers search at all? Against uniform draws, and against the optimum found by trying everything."""

from dataclasses import replace
from statistics import mean, median

import pytest

from autocomp.controllers import make_controller, warm_start
from tests.controllers.problem import Problem, best, policy_space


@pytest.mark.parametrize(
    ("name", "share"), [("evolution", 0.8), ("tpe", 0.8), ("gp", 0.8), ("cmaes", 0.9), ("nsga2", 1.0)]
)
def test_better_than_uniform_draws(name: str, share: float) -> None:
    space = policy_space(blocks=4, drop_branches=False)
    found: dict[str, list[float]] = {name: [], "random": []}
    for seed in range(3):
        problem = Problem.drawn(space, seed, limit=0.6)
        for which, reached in found.items():
            reached.append(best(problem.search(make_controller(which, space, seed), 60)))
    assert median(found[name]) < share * median(found["random"])


@pytest.mark.parametrize("name", ["evolution", "tpe"])
def test_near_the_optimum_of_a_small_space(name: str) -> None:
    space = policy_space(blocks=2, kept=(1.0, 0.75, 0.5))
    for seed in range(3):
        problem = Problem.drawn(space, seed, limit=0.6)
        reached = best(problem.search(make_controller(name, space, seed, warm_start(space, 12)), space.size // 25))
        assert problem.optimum() <= reached <= 1.2 * problem.optimum()


@pytest.mark.parametrize("name", ["evolution", "tpe"])
def test_a_tight_budget_is_met_from_the_warm_start(name: str) -> None:
    """Where only policies without some branches are fast enough, the search starts among them and goes on."""
    space = policy_space(blocks=9)
    problem = Problem.drawn(space, seed=0, limit=0.45)
    initial = warm_start(space, 24)
    first = problem.search(make_controller(name, space, 0, initial), len(initial))
    results = problem.search(make_controller(name, space, 0, initial), 72)
    drawn = problem.search(make_controller("random", space, 0), 72)
    assert best(results) < best(first) < best(drawn)


def test_the_actor_learns_what_is_rewarded() -> None:
    """In tens of trials DDPG does not beat uniform draws at their best; where its proposals go it does learn."""
    space = policy_space(blocks=4, drop_branches=False)
    problem = Problem.drawn(space, seed=0, limit=0.6)

    def int8_layers(sign: int) -> float:
        """Mean over the last 20 of 100 proposals, when the objective rises or falls with their number."""
        controller, counts = make_controller("ddpg", space, 0), []
        for _ in range(25):
            wave = controller.ask(4)
            counts += [len(policy.precisions) for policy in wave]
            timed = [replace(problem.result(0, policy), status="ok", violations=()) for policy in wave]
            controller.tell([replace(r, objective=10.0 ** (sign * (len(r.policy.precisions) - 5) / 5)) for r in timed])
        return mean(counts[-20:])

    assert int8_layers(1) + 3.0 < int8_layers(-1)  # of 10 layers a uniform draw has 5 in int8
