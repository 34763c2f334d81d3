"""A model as kernels: equal ones are the same operators to an engine, and take the same time."""

from collections import Counter
from pathlib import Path

import pytest

from autocomp.capabilities import Capabilities
from autocomp.engines import BackendSpec, by_graph_value, make_backend
from autocomp.engines.attribution import Attribution
from autocomp.engines.onnxruntime import OnnxRuntimeBackend
from autocomp.engines.template import parse
from autocomp.errors import InputError
from autocomp.hardware import ENTRY, Kernel, kernels_of, owners
from autocomp.policy import FP32, INT8, Policy
from autocomp.space import PolicySpace, SearchSpace
from tests.draws import Uniform
from tests.engines.conftest import Case, case
from tests.engines.nets import resnet
from tests.graphs import concat_net, residual_net

BATCH = 2


@pytest.fixture(scope="module")
def resnet20() -> Case:
    return case(resnet(depth=20, size=16))


def space_of(case: Case) -> PolicySpace:
    space = SearchSpace("test", kept=(1.0, 0.75, 0.5, 0.25), precisions=(FP32, INT8), drop_branches=True)
    return space.restrict(case.net.graph, Capabilities((FP32, INT8), channel_multiple=4))


def test_a_layer_comes_with_what_follows_it() -> None:
    graph = residual_net(1)
    policy = Policy({"blocks.0.a": 8}, precisions={"blocks.0.a": INT8, "blocks.0.b": INT8})
    found = kernels_of(graph, policy, batch=32)
    assert found["blocks.0.a"] == Kernel("conv", 16, 8, (3, 3), (1, 1), 1, (4, 4), 32, "int8", "q conv2d relu.q>int8")
    assert found["stem"] == Kernel("conv", 3, 16, (3, 3), (1, 1), 1, (4, 4), 32, "fp32", "f conv2d relu.q>add(qq),int8")
    assert found["blocks.0.b"].channels_in == 8
    assert found["blocks.0.b"].context == "q conv2d.q add(q) relu.q mean:1x1 flatten:16>fp32"
    assert found["head"].op == "linear" and found["head"].size == ()
    assert set(found) == {ENTRY, "stem", "blocks.0.a", "blocks.0.b", "head"}


def test_multiply_accumulates_are_the_graphs() -> None:
    for graph in (residual_net(2), concat_net()):
        for policy in (Policy(), Policy({graph.groups[0].name: 2})):
            found = kernels_of(graph, policy, batch=3)
            assert {name: k.macs for name, k in found.items() if name} == {
                name: 3 * macs for name, macs in graph.layer_macs(policy).items()
            }


def test_a_dropped_branch_has_no_kernels() -> None:
    graph = residual_net(2)
    found = kernels_of(graph, Policy(dropped=frozenset(["blocks.0"])), batch=1)
    assert set(found) == {ENTRY, "stem", "blocks.1.a", "blocks.1.b", "head"}


def test_what_several_layers_feed_belongs_to_the_last_of_them() -> None:
    graph = concat_net()
    found = owners(graph, graph.live(Policy()))
    assert found["cat"] == found["pool"] == found["view"] == "depth"
    assert found["relu_left"] == "left" and found["linear"] == "head" and found["x"] == ENTRY


def test_a_policy_of_another_model_is_refused() -> None:
    with pytest.raises(InputError, match="no prunable group"):
        kernels_of(residual_net(1), Policy({"conv9": 3}), batch=1)


def test_equal_kernels_take_equal_times_and_together_those_of_the_engine(resnet20: Case) -> None:
    """On the simulated engine, whose times are exact."""
    backend = make_backend(BackendSpec("simulated", batch=BATCH))
    space, graph = space_of(resnet20), resnet20.net.graph
    times: dict[Kernel, float] = {}
    repeated = 0
    for seed in range(40):
        policy = space.suggest(Uniform(seed))
        onnx = resnet20.emit(policy)
        by_node = by_graph_value(onnx, backend.profile(onnx, 1).by_value, resnet20.template.values)
        belongs = owners(graph, graph.live(policy))
        kernels = kernels_of(graph, policy, BATCH)
        sums = dict.fromkeys(kernels, 0.0)
        for node, ms in by_node.items():
            sums[belongs[node]] += ms
        for name, kernel in kernels.items():
            repeated += kernel in times
            assert times.setdefault(kernel, sums[name]) == pytest.approx(sums[name]), kernel
        with backend.build(onnx) as engine:
            assert sum(sums.values()) == pytest.approx(engine.time(1)[0])
    assert repeated > 100


def test_equal_kernels_are_the_same_operators_to_a_real_engine(resnet20: Case, tmp_path: Path) -> None:
    backend = OnnxRuntimeBackend(BackendSpec("onnxruntime", batch=BATCH))
    space, graph = space_of(resnet20), resnet20.net.graph
    operators: dict[Kernel, Counter[str]] = {}
    repeated = differing = 0
    for seed in range(12):
        policy = space.suggest(Uniform(seed))
        onnx = resnet20.emit(policy)
        nodes = parse(backend.optimized(onnx, tmp_path / "optimized.onnx")).graph.node
        belongs = owners(graph, graph.live(policy))
        found: dict[str, Counter[str]] = {}
        for node, value in zip(nodes, Attribution(onnx).of(nodes), strict=True):
            (owner,) = (belongs[name] for name in by_graph_value(onnx, {value: 0.0}, resnet20.template.values))
            found.setdefault(owner, Counter())[node.op_type] += 1
        for name, kernel in kernels_of(graph, policy, BATCH).items():
            repeated += kernel in operators
            differing += operators.setdefault(kernel, found.get(name, Counter())) != found.get(name, Counter())
    assert repeated > 30
    assert differing <= 0.05 * repeated, "layout conversions that depend on farther neighbours should be rare"
