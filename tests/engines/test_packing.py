"""Packed codes: what ONNX Runtime unpacks are the codes, few bits are few bytes, and the layer still runs as int8."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from autocomp.engines import BackendSpec, initializer_bytes, int8_layers, structure_digest
from autocomp.engines.onnxruntime import OnnxRuntimeBackend, session_options
from autocomp.engines.packing import pack, planes_of, unpacked
from autocomp.engines.simulated import SimulatedBackend
from autocomp.policy import INT8, Policy, Precision
from tests.engines.conftest import Case, case
from tests.engines.nets import Net
from tests.engines.test_onnx_graph import exact, optimized

shapes = st.one_of(arrays.array_shapes(min_dims=2, max_dims=4, max_side=5), st.tuples(st.integers(1, 40)))


@st.composite
def packable(draw: st.DrawFn) -> tuple[NDArray[np.int8], int]:
    bits = draw(st.integers(2, 7))
    limit = 2 ** (bits - 1)
    return draw(arrays.arrays(np.int8, draw(shapes), elements=st.integers(-limit, limit - 1))), bits


def unpacking(codes: NDArray[np.int8], bits: int) -> onnx.ModelProto:
    """A model whose only output are the codes."""
    tensors, nodes = pack("w_codes", codes, bits)
    output = helper.make_tensor_value_info("w_codes", TensorProto.INT8, codes.shape)
    graph = helper.make_graph(nodes, "unpack", [], [output], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


@settings(deadline=None, max_examples=60)
@given(packable())
def test_the_runtime_unpacks_the_same_codes(drawn: tuple[NDArray[np.int8], int]) -> None:
    codes, bits = drawn
    model = unpacking(codes, bits)
    (found,) = ort.InferenceSession(model.SerializeToString(), session_options(1)).run(None, {})
    assert found.dtype == np.int8 and found.shape == codes.shape
    assert (found == codes).all()
    plain = unpacked(model)
    assert [tensor.name for tensor in plain.graph.initializer] == ["w_codes"] and not plain.graph.node
    assert (numpy_helper.to_array(plain.graph.initializer[0]) == codes).all()


def test_planes_hold_one_bit_of_every_code() -> None:
    planes = planes_of(np.array([1, -1, -2, 0, 1, 0, 0, 0, -1], np.int8), 2)
    assert planes.tolist() == [[0b00010011, 0b1], [0b00000110, 0b1]]


@pytest.mark.parametrize("bits", range(2, 8))
def test_a_layer_of_few_bits_runs_as_int8(resnet20: Case, bits: int, tmp_path: Path) -> None:
    kind = Precision(f"int{bits}", "int8")
    policy = Policy(precisions={layer.name: kind for layer in resnet20.net.graph.layers})
    whole = Policy(precisions={layer.name: INT8 for layer in resnet20.net.graph.layers})
    data, in_eight = resnet20.emit(policy), resnet20.emit(whole)
    onnx.checker.check_model(data, full_check=True)
    model = optimized(data, tmp_path)
    assert int8_layers(model.SerializeToString(), resnet20.net.graph) == set(policy.precisions)
    assert not {node.op_type for node in model.graph.node} & {"BitShift", "Conv", "Relu", "Gemm", "MatMul", "Cast"}
    expected = resnet20.expected(policy)
    assert np.abs(exact(data, resnet20.images) - expected).max() < 0.03 * expected.std()
    assert structure_digest(data) == structure_digest(in_eight)
    weights = sum(tensor.size for name, tensor in resnet20.net.tensors.items() if name.endswith(".weight"))
    saved = weights * (8 - bits) / 8
    # what unpacking needs: each weight's shape, and a few constants for all of them together
    assert saved - 1500 < initializer_bytes(in_eight) - initializer_bytes(data) <= saved
    assert len(in_eight) - len(data) > saved - 40_000  # the file itself, whose nodes take some place too


def test_mixed_bits_and_odd_counts_agree_with_the_backends(tmp_path: Path) -> None:
    """Linear layers that are stored transposed, counts that do not fill their last byte, layers left in float."""
    net = Net((3, 7, 7))
    x = net.relu(net.conv("c1", "input", 5))
    x = net.relu(net.conv("c2", x, 7))
    net.linear("f", net.flatten(net.average(x)), 3)
    this = case(net)
    kinds = {"c1": Precision("int3", "int8"), "c2": Precision("int6", "int8"), "f": Precision("int2", "int8")}
    for chosen in (kinds, {"c2": kinds["c2"]}, {**kinds, "c2": INT8}):
        policy = Policy(precisions=chosen)
        data = this.emit(policy)
        assert int8_layers(optimized(data, tmp_path).SerializeToString(), net.graph) == set(chosen)
        expected = this.expected(policy)
        for backend in (SimulatedBackend(BackendSpec(batch=8)), OnnxRuntimeBackend(BackendSpec(batch=8))):
            assert set(kinds.values()) <= set(backend.capabilities().precisions)
            with backend.build(data) as engine:
                assert np.abs(engine.run(this.images) - expected).max() < 0.05 * expected.std()


def test_the_roofline_takes_packed_weights_for_int8(resnet8: Case) -> None:
    times = []
    for kind in (INT8, Precision("int4", "int8")):
        data = resnet8.emit(Policy(precisions={layer.name: kind for layer in resnet8.net.graph.layers}))
        with SimulatedBackend(BackendSpec()).build(data) as engine:
            times.append(engine.time(1)[0])
    assert times[0] == times[1]
