from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocomp.errors import InputError
from autocomp.graph import Branch, LayerGraph, Member
from autocomp.policy import INT8, Policy
from tests.graphs import concat_net, residual_net


def sliced_shapes(graph: LayerGraph, policy: Policy) -> dict[str, tuple[int, ...]]:
    """By marking the first channels' positions in real arrays, and deleting the marked ones."""
    gone = {layer for name in policy.dropped for layer in graph.branch_by_name[name].layers}
    arrays = {name: np.zeros(shape) for name, shape in graph.parameters.items() if name.rsplit(".", 1)[0] not in gone}
    lost: dict[tuple[str, int], list[int]] = {}
    for name, count in policy.kept.items():
        group = graph.group_by_name[name]
        for member in group.members:
            for channel in member.positions[: group.channels - count]:
                lost.setdefault((member.parameter, member.axis), []).extend(channel)
    for (name, axis), places in lost.items():
        if name in arrays:
            arrays[name] = np.delete(arrays[name], places, axis=axis)
    return {name: array.shape for name, array in arrays.items()}


def macs_by_hand(blocks: int, channels: int, positions: int, kept: list[int | None]) -> int:
    """Of `residual_net`; None for a dropped block."""
    total = 3 * channels * 9 * positions + channels * 10
    for inner in kept:
        if inner is not None:
            total += 2 * channels * inner * 9 * positions
    return total


@given(st.lists(st.none() | st.integers(1, 16), min_size=3, max_size=3))
def test_shapes_and_macs_of_a_residual_net(kept: list[int | None]) -> None:
    graph = residual_net(3)
    policy = Policy(
        {f"blocks.{k}.a": count for k, count in enumerate(kept) if count is not None},
        frozenset(f"blocks.{k}" for k, count in enumerate(kept) if count is None),
    )
    assert graph.parameter_shapes(policy) == sliced_shapes(graph, policy)
    assert graph.macs(policy) == macs_by_hand(3, 16, 16, kept)
    assert sum(graph.layer_macs(policy).values()) == graph.macs(policy)


@given(st.integers(1, 4), st.integers(1, 6))
def test_shapes_and_macs_behind_a_concatenation(left: int, right: int) -> None:
    graph = concat_net()
    policy = Policy({"left": left, "right": right})
    assert graph.parameter_shapes(policy) == sliced_shapes(graph, policy)
    assert graph.layer_macs(policy) == {
        "left": 3 * left * 16,
        "right": 3 * right * 9 * 16,
        "depth": right * 9 * 16,
        "head": (left + right) * 4 * 5,
    }


def test_normalise_removes_what_has_no_effect() -> None:
    graph = residual_net(2)
    layers = {layer.name: INT8 for layer in graph.layers}
    policy = Policy({"blocks.0.a": 4, "blocks.1.a": 16}, frozenset({"blocks.0"}), layers)
    rest = {name: INT8 for name in layers if not name.startswith("blocks.0")}
    assert graph.normalise(policy) == Policy({}, frozenset({"blocks.0"}), rest)
    assert graph.normalise(graph.normalise(policy)) == graph.normalise(policy)
    assert graph.macs(graph.normalise(policy)) == graph.macs(policy)


def test_a_branch_inside_a_dropped_one_is_no_choice() -> None:
    graph = residual_net(2)
    both = Branch("all", "add_1", "relu_stem", "conv_1b", tuple(x for b in graph.branches for x in b.layers))
    nested = replace(graph, branches=(*graph.branches, both))
    assert nested.normalise(Policy(dropped=frozenset({"all", "blocks.0"}))) == Policy(dropped=frozenset({"all"}))
    two = Policy(dropped=frozenset({"blocks.0", "blocks.1"}))
    assert nested.normalise(two) == two


def test_a_group_partly_inside_a_dropped_branch_stays() -> None:
    graph = residual_net(1)
    group = graph.groups[0]
    wide = replace(group, members=(*group.members, Member("stem.weight", 0, group.members[0].positions)))
    policy = Policy({"blocks.0.a": 4}, frozenset({"blocks.0"}))
    assert replace(graph, groups=(wide,)).normalise(policy) == policy
    assert graph.normalise(policy) == Policy(dropped=frozenset({"blocks.0"}))


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        (Policy({"stem": 4}), "stem"),
        (Policy({"blocks.0.a": 17}), "17"),
        (Policy(dropped=frozenset({"stem"})), "stem"),
        (Policy(precisions={"relu": INT8}), "relu"),
    ],
)
def test_a_policy_of_another_model_is_refused(policy: Policy, name: str) -> None:
    graph = residual_net(1)
    with pytest.raises(InputError, match=name):
        graph.validate(policy)


def test_uneven_members_are_refused() -> None:
    with pytest.raises(InputError, match=r"head\.weight"):
        Member("head.weight", 1, ((0, 1), (2,)))


def test_the_digest_follows_the_structure() -> None:
    graph = residual_net(2)
    assert graph.digest == residual_net(2).digest
    assert replace(graph, left_whole={"stem": "why"}).digest == graph.digest
    others = [residual_net(3), residual_net(2, channels=8), replace(graph, branches=()), replace(graph, groups=())]
    assert len({graph.digest, *(other.digest for other in others)}) == 5


def test_lookups() -> None:
    graph = residual_net(1)
    assert graph.input_shape == (3, 4, 4) and graph.output_shape == (10,)
    assert graph.layer_by_node["conv_0a"].name == "blocks.0.a"
    assert graph.consumers["relu_stem"] == ("conv_0a", "add_0")
    assert graph.consumers["linear"] == ()
    assert concat_net().layer_by_name["depth"].depthwise and not concat_net().layer_by_name["left"].depthwise
