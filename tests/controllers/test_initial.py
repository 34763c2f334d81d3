import pytest

from autocomp.capabilities import Capabilities
from autocomp.controllers import warm_start
from autocomp.policy import FP32, INT8, Policy
from autocomp.space import PolicySpace, Rule, SearchSpace
from tests.controllers.problem import policy_space
from tests.graphs import residual_net


@pytest.fixture(scope="module")
def space() -> PolicySpace:
    return policy_space(blocks=6)


def int8(space: PolicySpace, kept: dict[str, int]) -> Policy:
    return Policy(kept, precisions={layer.name: INT8 for layer in space.graph.layers})


def test_the_plain_ones_first_then_stages_from_the_middle_ratio(space: PolicySpace) -> None:
    half = [f"blocks.{k}.a" for k in range(6)]
    assert warm_start(space, 7) == (
        Policy(),
        int8(space, {}),
        int8(space, dict.fromkeys(half[:2], 8)),
        int8(space, dict.fromkeys(half[:4], 8)),
        int8(space, dict.fromkeys(half, 8)),
        int8(space, dict.fromkeys(half[2:4], 8)),
        int8(space, dict.fromkeys(half[4:], 8)),
    )


def test_every_entry_is_legal_and_new(space: PolicySpace) -> None:
    policies = warm_start(space, 1000)
    # identity, int8, 3 ratios for 5 spans, and the smallest with every second and with no branch
    assert len(policies) == len(set(policies)) == 2 + 3 * 5 + 2
    assert all(space.contains(policy) for policy in policies)
    assert {len(policy.dropped) for policy in policies} == {0, 3, 6}


def test_the_cheapest_branches_go_one_after_the_other(space: PolicySpace) -> None:
    order = ["blocks.4", "blocks.1", "blocks.2", "blocks.0", "blocks.3"]
    without = [policy.dropped for policy in warm_start(space, 100, order) if 0 < len(policy.dropped) < 5]
    expected = [frozenset(order[:count]) for count in (1, 2, 3, 4)]
    assert [dropped for dropped in dict.fromkeys(without) if dropped in expected] == expected
    unpruned, middle = (policy for policy in warm_start(space, 100, order) if policy.dropped == expected[0])
    assert not unpruned.kept and all(count == 8 for count in middle.kept.values())


def test_the_limit_holds(space: PolicySpace) -> None:
    assert [len(warm_start(space, limit)) for limit in (0, 1, 4)] == [0, 1, 4]


def test_what_the_space_does_not_hold_is_left_out() -> None:
    forced = SearchSpace("s", kept=(0.5,), precisions=(INT8,)).restrict(residual_net(2), Capabilities((FP32, INT8)))
    assert Policy() not in warm_start(forced, 100)
    assert warm_start(forced, 1) == (int8(forced, {}),)


def test_a_space_without_groups_or_with_fp32_only() -> None:
    precision_only = SearchSpace("s", precisions=(FP32, INT8)).restrict(residual_net(2), Capabilities((FP32, INT8)))
    assert warm_start(precision_only, 100) == (Policy(), int8(precision_only, {}))
    rules = (Rule("blocks.1*", whole=True),)
    pruning = SearchSpace("s", kept=(0.5,), rules=rules).restrict(residual_net(2), Capabilities())
    assert warm_start(pruning, 100) == (Policy(), Policy({"blocks.0.a": 8}))
