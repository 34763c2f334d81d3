"""What is particular to OpenVINO: what it runs as int8, and what it refuses."""

import re
import sys
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper

pytest.importorskip("openvino", reason="openvino is not installed: pip install 'autocomp[openvino]'")

from autocomp.engines import BackendSpec, make_backend
from autocomp.engines.openvino_cpu import OpenVinoBackend, one_line
from autocomp.errors import ConfigError, EngineError
from autocomp.policy import FEWER_BITS, Policy, Precision
from tests.engines.conftest import Case, case
from tests.engines.nets import Net
from tests.engines.test_onnx_graph import convolutional, everywhere, exact, fire, mobile, random_policy, vgg


def int8_layers(found: Case, data: bytes) -> set[str]:
    """Layers that are computed with codes in the graph that is executed, alone or inside a fused kernel."""
    weights = {name: layer.name for layer in found.net.graph.layers for name in (layer.weight, f"{layer.weight}_dq")}
    layers = {
        node.name: weights[node.input[1]]
        for node in onnx.load_model_from_string(data).graph.node
        if len(node.input) > 1 and node.input[1] in weights
    }
    with OpenVinoBackend(BackendSpec(batch=2)).build(data) as engine:
        names = [
            re.sub(r"(/WithoutBiases|/Dequantization\w+)+$", "", name)
            for kernel in engine.kernels()
            if kernel.kind in ("Convolution", "FullyConnected", "Subgraph") and kernel.precision in ("u8", "i8")
            for name in kernel.name.split(",")
        ]
    return {layers[name] for name in names if name in layers}


@pytest.mark.parametrize("seed", range(4))
def test_exactly_the_int8_layers_run_as_int8(resnet20: Case, seed: int) -> None:
    policy = random_policy(resnet20.net, np.random.default_rng(seed))
    assert int8_layers(resnet20, resnet20.emit(policy)) == set(policy.precisions)


@pytest.mark.parametrize("build", [vgg, mobile, fire, convolutional])
def test_networks_of_other_kinds(build: Callable[[], Net]) -> None:
    found = case(build())
    policy = everywhere(found.net)
    data = found.emit(policy)
    assert int8_layers(found, data) == set(policy.precisions)
    expected = exact(data, found.images)
    with OpenVinoBackend(BackendSpec(batch=8)).build(data) as engine:
        result = engine.run(found.images)
    assert np.abs(result - expected).max() < 0.1 * expected.std()


@pytest.mark.parametrize("precision", FEWER_BITS[::2], ids=str)
def test_packed_weights_run_as_int8(resnet8: Case, precision: Precision) -> None:
    policy = Policy(precisions={layer.name: precision for layer in resnet8.net.graph.layers})
    data = resnet8.emit(policy)
    assert int8_layers(resnet8, data) == set(policy.precisions)
    expected = exact(data, resnet8.images)
    with OpenVinoBackend(BackendSpec(batch=3)).build(data) as engine:
        result = engine.run(resnet8.images)
    assert np.abs(result - expected).max() < 0.1 * expected.std()


def test_times_of_operators_belong_to_layers(resnet20: Case) -> None:
    """Each convolution of the file is found, with the additions and activations that were fused into it."""
    data = resnet20.emit(everywhere(resnet20.net))
    times = OpenVinoBackend(BackendSpec(batch=8)).profile(data, repeats=10)
    convolutions = {node.output[0] for node in onnx.load_model_from_string(data).graph.node if node.op_type == "Conv"}
    assert all(times.by_value[value] > 0 for value in convolutions)
    assert 0.5 * times.run_ms < sum(times.by_value.values()) <= 1.01 * times.run_ms


def test_device_has_no_other_hardware() -> None:
    with pytest.raises(ConfigError, match="simulated-gpu"):
        OpenVinoBackend(BackendSpec(hardware="simulated-gpu"))


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "autocomp.engines.openvino_cpu")
    with pytest.raises(ConfigError, match=r"pip install 'autocomp\[openvino\]'"):
        make_backend(BackendSpec("openvino"))


def test_refused_model_names_the_node(resnet8: Case) -> None:
    model = onnx.load_model_from_string(resnet8.emit(Policy()))
    node = model.graph.node[0]
    node.op_type = "NoSuchOperator"
    with pytest.raises(EngineError, match=f"no operator NoSuchOperator, which {node.name} is"):
        OpenVinoBackend(BackendSpec()).build(model.SerializeToString())
    model = onnx.load_model_from_string(resnet8.emit(Policy()))
    first, second, *_ = [node for node in model.graph.node if node.op_type == "Conv"]
    second.input[1] = first.input[1]
    with pytest.raises(EngineError, match="cannot build") as caught:
        OpenVinoBackend(BackendSpec()).build(model.SerializeToString())
    assert "\n" not in str(caught.value) and ".cpp" not in str(caught.value)


def identity(kind: int, shape: list[str | int] | None, outputs: int = 1) -> bytes:
    value = helper.make_tensor_value_info("x", kind, shape)
    results = [helper.make_tensor_value_info(f"y{index}", kind, shape) for index in range(outputs)]
    nodes = [helper.make_node("Abs", ["x"], [result.name]) for result in results]
    graph = helper.make_graph(nodes, "g", [value], results)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (identity(onnx.TensorProto.INT64, ["n", 3]), "float32"),
        (identity(onnx.TensorProto.FLOAT, ["n", 3], outputs=2), "float32 tensors"),
        (identity(onnx.TensorProto.FLOAT, ["n"]), "float32 tensors"),
        (identity(onnx.TensorProto.FLOAT, None), "float32 tensors"),
        (identity(onnx.TensorProto.FLOAT, ["n", 3, "width"]), "not fixed"),
        (identity(onnx.TensorProto.FLOAT, [4, 3]), "batch 4, not 2: give --batch 4"),
    ],
)
def test_interface_that_does_not_fit(data: bytes, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        OpenVinoBackend(BackendSpec(batch=2)).build(data)


def test_fixed_batch_that_fits(resnet8: Case) -> None:
    model = onnx.load_model_from_string(resnet8.emit(Policy()))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    with OpenVinoBackend(BackendSpec(batch=4)).build(model.SerializeToString()) as engine:
        assert engine.run(np.zeros((5, *resnet8.net.input_shape), np.float32)).shape == (5, 10)


def test_messages_lose_their_source_lines() -> None:
    error = RuntimeError("Exception from src/core.cpp:105:\nCheck 'a == b' failed at src/x/conv.cpp:38:\nit is odd\n\n")
    assert one_line(error) == "it is odd"
    assert one_line(RuntimeError()) == "RuntimeError"
