from collections import Counter

from autocomp.controllers import make_controller
from tests.controllers.problem import Problem, policy_space


def test_every_option_is_equally_likely() -> None:
    space = policy_space(blocks=6, drop_branches=False)
    count = 2000
    drawn = [space.encode(policy) for policy in make_controller("random", space, 0).ask(count)]
    for place, decision in enumerate(space.decisions):
        seen = Counter(indices[place] for indices in drawn)
        options = len(decision.options)
        expected = count / options
        chi_squared = sum((seen[index] - expected) ** 2 / expected for index in range(options))
        assert chi_squared < 20  # at most 3 degrees of freedom: beyond the 99.98th percentile


def test_a_kill_inside_a_wave_loses_nothing() -> None:
    problem = Problem.drawn(policy_space(blocks=3), 0, 1.0)
    whole = [result.policy for result in problem.search(make_controller("random", problem.space, 7), 20, wave=4)]
    resumed = make_controller("random", problem.space, 7)
    resumed.tell([problem.result(0, whole[0]), problem.result(2, whole[2])])
    assert resumed.ask(4) == [whole[1], whole[3], *whole[4:6]]


def test_it_learns_nothing() -> None:
    problem = Problem.drawn(policy_space(blocks=3), 0, 0.8)
    controller = make_controller("random", problem.space, 7)
    assert [r.policy for r in problem.search(make_controller("random", problem.space, 7), 12)] == controller.ask(12)


def test_a_branch_is_dropped_as_often_as_one_of_its_ratios_is_chosen() -> None:
    space = policy_space(blocks=6)
    count = 2000
    policies = make_controller("random", space, 0).ask(count)
    share = sum(len(policy.dropped) for policy in policies) / (count * len(space.graph.branches))
    assert abs(share - 1 / (1 + len(space.ratios))) < 0.02
