"""What is made of ONNX files before TensorRT sees them, and which are refused."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from autocomp.engines.attribution import layer_of
from autocomp.engines.tensorrt.backend import NUMERICS
from autocomp.engines.tensorrt.onnx_file import LARGEST_BYTES, check_size, prepare
from autocomp.errors import EngineError
from autocomp.policy import FP32, INT8, Policy, Precision
from tests.engines.conftest import Case
from tests.engines.test_onnx_graph import everywhere, exact


def edited(data: bytes, edit: Callable[[onnx.ModelProto], object]) -> bytes:
    model = onnx.load_model_from_string(data)
    edit(model)
    return bytes(model.SerializeToString())


def set_zero_points(model: onnx.ModelProto, value: np.generic) -> None:
    for tensor in model.graph.initializer:
        if tensor.name.startswith("zero_point"):
            tensor.CopyFrom(numpy_helper.from_array(np.array(value), tensor.name))


def integer_bias(model: onnx.ModelProto) -> None:
    """Biases as onnxruntime's quantizer writes them: int32 codes, one scale a channel."""
    for layer in [node for node in model.graph.node if node.op_type == "Conv"]:
        bias = next(tensor for tensor in model.graph.initializer if tensor.name == layer.input[2])
        scale = np.full(bias.dims[0], 2.0**-20, np.float32)
        codes = np.rint(numpy_helper.to_array(bias) / scale).astype(np.int32)
        names = [f"{bias.name}_{part}" for part in ("codes", "scale", "dq")]
        model.graph.initializer.extend(numpy_helper.from_array(a, n) for a, n in zip((codes, scale), names))  # noqa: B905
        model.graph.node.insert(0, helper.make_node("DequantizeLinear", names[:2], names[2:], name=names[2], axis=0))
        layer.input[2] = names[2]


def free_width(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_param = "width"


def outside(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL


def new_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 99


def other_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: set_zero_points(m, np.int8(3)), r"input_q has zero point 3 .* symmetric: quantize it again"),
        (lambda m: set_zero_points(m, np.uint8(0)), "input_q has uint8 codes .* int8: quantize it again"),
        (free_width, r"dynamic sizes \(width\).*profile.*fixed sizes"),
        (outside, "another file .* at most 2 GB"),
        (new_opset, r"opset 99.*opset_version=\d+"),
        (other_batch, "batch 4, not 2: give --batch 4"),
    ],
)
def test_what_tensorrt_would_refuse_or_misread(
    resnet8: Case, edit: Callable[[onnx.ModelProto], None], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        prepare(edited(resnet8.emit(everywhere(resnet8.net), NUMERICS), edit), 2)


def test_a_file_of_more_than_two_gigabytes() -> None:
    check_size(LARGEST_BYTES)
    with pytest.raises(EngineError, match=r"2\.1 GB .* at most 2 GB: prune it"):
        check_size(LARGEST_BYTES + 1)


def test_integer_biases_become_the_floats_they_stand_for(resnet8: Case) -> None:
    data = edited(resnet8.emit(everywhere(resnet8.net), NUMERICS), integer_bias)
    written = prepare(data, 8)
    model = onnx.load_model_from_string(written)
    assert not any(tensor.data_type == TensorProto.INT32 for tensor in model.graph.initializer)
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(exact(written, resnet8.images), exact(data, resnet8.images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kinds", [(INT8, FP32), (Precision.parse("w4a8"), INT8)], ids=str)
def test_nothing_of_the_model_changes(resnet8: Case, kinds: tuple[Precision, ...]) -> None:
    """Packed weights are codes again, and activations are dequantized by one scale a tensor."""
    layers = resnet8.net.graph.layers
    policy = Policy(precisions={layer.name: kinds[i % len(kinds)] for i, layer in enumerate(layers)})
    data = resnet8.emit(policy, NUMERICS)
    written = prepare(data, 8)
    model = onnx.load_model_from_string(written)
    onnx.checker.check_model(model, full_check=True)
    constant = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert {constant[node.input[1]].ndim for node in pairs if node.input[0] not in constant} == {0}
    assert {constant[node.input[1]].ndim for node in pairs if node.input[0] in constant} == {1}
    assert not any(node.op_type == "BitShift" for node in model.graph.node)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 8
    np.testing.assert_array_equal(exact(written, resnet8.images), exact(data, resnet8.images))


def test_nodes_belong_to_the_layer_whose_weight_they_follow(resnet8: Case) -> None:
    model = onnx.load_model_from_string(resnet8.emit(everywhere(resnet8.net), NUMERICS))
    of: dict[str, str | None] = {node.op_type: layer_of(model, i) for i, node in enumerate(model.graph.node)}
    assert of["MatMul"] == of["Sum"] == "linear" and of["AveragePool"] == "layer3.0.conv2"
    assert layer_of(model, 0) is None  # the input's own quantization
