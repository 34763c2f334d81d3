"""Factors of layers that read many groups, and of weights, against whole policies."""

import numpy as np
import pytest

from autocomp.capabilities import Capabilities
from autocomp.controllers import Problem, solve
from autocomp.graph import Group, Layer, LayerGraph, Member, Node
from autocomp.hardware import kernels_of
from autocomp.policy import FP32, INT8, Policy
from autocomp.space import SearchSpace
from autocomp.study.factors import layer_terms, shape_terms
from autocomp.study.knowledge import Terms, terms_of
from tests.draws import Uniform
from tests.graphs import concat_net, conv, each, parameters_of, residual_net

WIDTH = 16


def dense_net(depth: int) -> LayerGraph:
    """Convolutions, each of which reads all before it, concatenated; then mean pooling and a linear head."""
    names = [f"conv_{k}" for k in range(depth)]
    layers = [conv(name, name, WIDTH, 3 + k * WIDTH, 64) for k, name in enumerate(names)]
    nodes = [Node("x", "input", (), (3, 8, 8))]
    for k, name in enumerate(names):
        if k:
            nodes.append(Node(f"cat_{k}", "cat", ("x", *names[:k]), (3 + k * WIDTH, 8, 8)))
        nodes.append(Node(name, "conv2d", (nodes[-1].name,), (WIDTH, 8, 8)))
    nodes += [Node("mean", "mean", (names[-1],), (WIDTH, 1, 1)), Node("flatten", "flatten", ("mean",), (WIDTH,))]
    nodes.append(Node("linear", "linear", ("flatten",), (10,)))
    layers.append(Layer("head", "linear", "linear", (10, WIDTH), 1))
    groups = []
    for k, writer in enumerate(layers[: depth - 1]):
        reads = (Member(reader.weight, 1, each(WIDTH, 3 + k * WIDTH)) for reader in layers[k + 1 : depth])
        members = (Member(writer.weight, 0, each(WIDTH)), Member(writer.bias, 0, each(WIDTH)), *reads)
        groups.append(Group(writer.name, WIDTH, members))
    return LayerGraph(tuple(nodes), "linear", tuple(layers), tuple(groups), (), parameters_of(tuple(layers)))


def terms(graph: LayerGraph) -> Terms:
    kept = tuple(count / 8 for count in range(8, 0, -1))
    space = SearchSpace("test", kept=kept, precisions=(FP32, INT8), drop_branches=True)
    return terms_of(space.restrict(graph, Capabilities((FP32, INT8))))


def time_of(graph: LayerGraph, policy: Policy) -> float:
    return sum(cost(kernel.macs, kernel.precision) for kernel in kernels_of(graph, policy, 1).values())


def cost(macs: int, precision: str) -> float:
    return 1.0 + macs * (0.4 if precision == "int8" else 1.0) / 1e5


@pytest.fixture(scope="module")
def dense() -> Terms:
    return terms(dense_net(12))


def test_a_layer_that_reads_many_groups_has_small_factors_that_nearly_add_up(dense: Terms) -> None:
    """A table over all of what the last layer reads would have 8**11 places."""
    factors = layer_terms(dense, lambda kernels: [cost(k.macs, k.precision) for k in kernels], 1)
    assert max(factor.costs.size for factor in factors) <= 8**4
    problem = Problem(tuple(np.zeros(len(options)) for options in dense.options), (factors,))
    graph = dense.space.graph
    drawn = [dense.space.suggest(Uniform(seed)) for seed in range(40)]
    errors = [problem.cost(dense.choices(policy))[0] / time_of(graph, policy) - 1 for policy in drawn]
    assert abs(np.mean(errors)) < 0.02 and np.std(errors) < 0.05
    (whole,) = problem.cost(dense.choices(Policy()))
    assert whole == pytest.approx(time_of(graph, Policy()), rel=0.2)  # far from the middle


def test_such_a_network_can_be_solved_for(dense: Terms) -> None:
    factors = layer_terms(dense, lambda kernels: [cost(k.macs, k.precision) for k in kernels], 1)
    losses = tuple(np.arange(len(options), dtype=float) for options in dense.options)
    graph = dense.space.graph
    found = solve(Problem(losses, (factors,)), (0.3 * time_of(graph, Policy()),))
    assert found is not None
    assert time_of(graph, dense.policy(found)) == pytest.approx(0.3 * time_of(graph, Policy()), rel=0.1)


@pytest.mark.parametrize("graph", [residual_net(2), concat_net()], ids=["residual", "concat"])
def test_multiply_accumulates_of_few_groups_add_up_exactly(graph: LayerGraph) -> None:
    known = terms(graph)
    factors = shape_terms(known, lambda layer, weights, out, precision: float(weights * layer.positions))
    problem = Problem(tuple(np.zeros(len(options)) for options in known.options), (factors,))
    for seed in range(40):
        policy = known.space.suggest(Uniform(seed))
        assert problem.cost(known.choices(policy))[0] == pytest.approx(graph.macs(policy))


def test_multiply_accumulates_of_many_groups_nearly_add_up(dense: Terms) -> None:
    factors = shape_terms(dense, lambda layer, weights, out, precision: float(weights * layer.positions))
    assert max(factor.costs.size for factor in factors) <= 8**4
    problem = Problem(tuple(np.zeros(len(options)) for options in dense.options), (factors,))
    drawn = [dense.space.suggest(Uniform(seed)) for seed in range(40)]
    errors = [problem.cost(dense.choices(p))[0] / dense.space.graph.macs(p) - 1 for p in drawn]
    assert abs(np.mean(errors)) < 0.03 and np.std(errors) < 0.06
