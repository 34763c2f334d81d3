"""What every controller must do, whatever it learns."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

import pytest

from autocomp.controllers import CONTROLLERS, make_controller, warm_start
from autocomp.errors import ConfigError, SpaceError
from autocomp.policy import Policy
from autocomp.protocols import Controller
from autocomp.results import TrialResult
from autocomp.space import PolicySpace
from tests.controllers.problem import Problem, policy_space

TRIALS = 48  # more than two generations of NSGA-II and well past TPE's random start
FEWER = {"gp": 20}  # a proposal of the Gaussian process takes half a second, and it starts after ten


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem.drawn(policy_space(blocks=2), seed=3, limit=0.8)


@pytest.fixture(scope="module")
def space(problem: Problem) -> PolicySpace:
    return problem.space


@pytest.fixture(params=sorted(CONTROLLERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def trials(name: str) -> int:
    return FEWER.get(name, TRIALS)


def made(name: str, space: PolicySpace, seed: int, initial: Sequence[Policy] = ()) -> Controller:
    """A controller; the guided one knows of the problem what there is to know."""
    knowledge = Problem.drawn(space, seed=3, limit=0.8).knowledge() if name == "guided" else None
    return make_controller(name, space, seed, initial, knowledge)


def policies(results: list[TrialResult]) -> list[Policy]:
    return [result.policy for result in results]


def test_the_protocol_is_met(name: str, space: PolicySpace) -> None:
    assert isinstance(made(name, space, 0), Controller)


def test_equal_seeds_propose_the_same_and_others_do_not(name: str, problem: Problem, trials: int) -> None:
    first, again, other = (policies(problem.search(made(name, problem.space, seed), trials)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("at_once", [True, False])
def test_a_told_history_leads_to_the_wave_of_the_uninterrupted_search(
    name: str, problem: Problem, trials: int, at_once: bool
) -> None:
    initial = warm_start(problem.space, 6)
    whole = problem.search(made(name, problem.space, 5, initial), trials)
    for done in [at for at in (0, 4, 8, 16, 24, 44) if at < trials]:
        resumed = made(name, problem.space, 5, initial)
        if at_once:
            resumed.tell(whole[:done])
        else:
            for result in whole[:done]:
                resumed.tell([result])
        assert resumed.ask(4) == policies(whole[done : done + 4])


def test_a_search_asked_again_from_the_start_repeats_itself(name: str, problem: Problem, trials: int) -> None:
    """As a study does that goes on after a kill: the same questions, the same answers."""
    whole = problem.search(made(name, problem.space, 5), trials)
    again = made(name, problem.space, 5)
    for start in range(0, trials, 4):
        assert again.ask(4) == policies(whole[start : start + 4])
        again.tell(whole[start : start + 4])


def test_only_legal_normalised_and_new_policies(name: str, problem: Problem, trials: int) -> None:
    found = policies(problem.search(made(name, problem.space, 0, warm_start(problem.space, 5)), trials))
    assert len(found) == trials
    assert all(problem.space.contains(policy) for policy in found)
    assert all(problem.space.graph.normalise(policy) == policy for policy in found)
    assert len(set(found)) == trials


def test_initial_policies_come_first_in_order(name: str, space: PolicySpace) -> None:
    initial = warm_start(space, 5)
    controller = made(name, space, 0, (*initial, initial[0]))
    assert controller.ask(3) == list(initial[:3])
    wave = controller.ask(4)
    assert wave[:2] == list(initial[3:])
    assert len(wave) == 4 and not set(wave) & set(initial[:3])


def test_initial_policies_told_already_are_left_out(name: str, problem: Problem) -> None:
    initial = warm_start(problem.space, 3)
    controller = made(name, problem.space, 0, initial)
    controller.tell([problem.result(0, initial[1])])
    assert controller.ask(2) == [initial[0], initial[2]]


def test_an_initial_policy_outside_the_space_is_refused(name: str, space: PolicySpace) -> None:
    with pytest.raises(SpaceError):
        made(name, space, 0, [Policy(kept={"blocks.0.a": 15})])


def test_failures_and_infeasible_trials_are_survived(name: str, problem: Problem) -> None:
    controller = made(name, problem.space, 0)
    for number in range(0, 32, 4):
        wave = controller.ask(4)
        told = [problem.result(number + place, policy) for place, policy in enumerate(wave)]
        told[0] = TrialResult(number, "search", wave[0], "failed", error="the runtime refused it", stage="build")
        told[1] = TrialResult(number + 1, "search", wave[1], "infeasible", (0.5,), latency_ms=1.0, reference_ms=1.0)
        told[2] = replace(told[2], violations=(float("nan"),))
        controller.tell(told)
    assert len(controller.ask(4)) == 4


def test_results_of_policies_it_never_asked_for_are_accepted(name: str, problem: Problem) -> None:
    controller = made(name, problem.space, 0)
    foreign = [problem.result(number, policy) for number, policy in enumerate(problem.space.uniform())]
    outside = TrialResult(99, "uniform", Policy(kept={"blocks.0.a": 15}), "infeasible", (0.1,))
    controller.tell([*foreign, outside])
    wave = controller.ask(8)
    assert len(wave) == 8 and not set(wave) & set(problem.space.uniform())


def test_waves_asked_before_results_are_in_do_not_repeat(name: str, space: PolicySpace) -> None:
    controller = made(name, space, 0)
    asked = [policy for _ in range(5) for policy in controller.ask(4)]
    assert len(set(asked)) == 20


def test_an_exhausted_space_ends_with_an_empty_wave(name: str) -> None:
    space = policy_space(blocks=1, kept=(0.5,))
    problem = Problem.drawn(space, seed=0, limit=1.0)
    # without the branch 2 precisions are left (stem and head); with it also the group and two more layers
    distinct = 2**2 + 2 * 2**4
    results = problem.search(made(name, space, 0), 1000, wave=8)
    assert len(set(policies(results))) == len(results) == distinct
    assert made(name, space, 0, policies(results)).ask(distinct + 5) == policies(results)


def test_an_unknown_name_is_refused_with_the_known_ones(space: PolicySpace) -> None:
    with pytest.raises(ConfigError, match=r"bayes.*guided.*evolution.*random.*tpe.*nsga2"):
        make_controller("bayes", space, 0)


def test_the_guided_one_needs_something_to_go_by(space: PolicySpace) -> None:
    with pytest.raises(ConfigError, match="use evolution"):
        make_controller("guided", space, 0)


def test_tpe_follows_the_objective_it_is_told_not_the_score() -> None:
    space = policy_space(blocks=6, kept=(1.0,), drop_branches=False)
    problem = Problem.drawn(space, seed=0, limit=1.0)

    def int8_layers(sign: int) -> float:
        """Mean over the last 20 of 48 proposals, when ``sign`` times their number is the objective."""
        controller = make_controller("tpe", space, 0)
        for _ in range(12):
            wave = controller.ask(4)
            told = [replace(problem.result(0, p), objective=float(sign * len(p.precisions))) for p in wave]
            controller.tell(told)
            counts.extend(len(policy.precisions) for policy in wave)
        return mean(counts[-20:])

    counts: list[int] = []
    # of 14 layers a uniform draw has 7 in int8; the mean of 20 draws has a standard deviation of 0.42
    assert int8_layers(1) + 3.0 < int8_layers(-1)
