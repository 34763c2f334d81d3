"""Half-precision layers in the typed model."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, shape_inference
from onnx.reference import ReferenceEvaluator

from autocomp.engines import initializer_bytes, structure_digest
from autocomp.policy import FP32, INT8, Policy, Precision
from tests.engines.conftest import Case, case
from tests.engines.test_onnx_graph import exact, fire, mobile

FP16, BF16 = Precision.parse("fp16"), Precision.parse("bf16")
ONNX_TYPES = {FP32: TensorProto.FLOAT, FP16: TensorProto.FLOAT16, BF16: TensorProto.BFLOAT16, INT8: TensorProto.FLOAT}


def of_layers(found: Case, *kinds: Precision) -> Policy:
    """The precisions in turn, one for each layer."""
    return Policy(precisions={layer.name: kinds[i % len(kinds)] for i, layer in enumerate(found.net.graph.layers)})


def types_of_layers(found: Case, data: bytes) -> dict[str, int]:
    """Layer -> the type its convolution or product writes, by ONNX's own inference."""
    model = shape_inference.infer_shapes(onnx.load_model_from_string(data), strict_mode=True)
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.output)}
    names = {layer.weight: layer.name for layer in found.net.graph.layers}
    written = {}
    for node in model.graph.node:
        weight = node.input[1].split("_")[0] if len(node.input) > 1 else ""
        if node.op_type in ("Conv", "Gemm", "MatMul") and weight in names:
            written[names[weight]] = kinds[node.output[0]]
    return written


@pytest.mark.parametrize("kinds", [(FP16,), (BF16,), (FP32, FP16), (INT8, FP16, FP32), (BF16, INT8, FP16)], ids=str)
def test_every_layer_computes_in_the_type_of_the_policy(resnet8: Case, kinds: tuple[Precision, ...]) -> None:
    policy = of_layers(resnet8, *kinds)
    data = resnet8.emit(policy)
    onnx.checker.check_model(data, full_check=True)
    expected = {layer.name: ONNX_TYPES[policy.precision(layer.name)] for layer in resnet8.net.graph.layers}
    assert types_of_layers(resnet8, data) == expected


def test_a_half_network_is_cast_at_its_ends_only(resnet8: Case) -> None:
    data = resnet8.emit(of_layers(resnet8, FP16))
    model = onnx.load_model_from_string(data)
    assert [node.output[0] for node in model.graph.node if node.op_type == "Cast"] == ["input_fp16", "logits"]
    assert model.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert initializer_bytes(data) < 0.55 * initializer_bytes(resnet8.emit(Policy()))
    assert structure_digest(data) != structure_digest(resnet8.emit(Policy()))


@pytest.mark.parametrize("make", [mobile, fire])
def test_fp16_is_the_model_to_half_precision(make) -> None:
    found = case(make())
    policy = of_layers(found, FP16)
    result, expected = exact(found.emit(policy), found.images), found.expected(Policy())
    error = np.linalg.norm(result - expected) / np.linalg.norm(expected)
    assert 1e-5 < error < 2e-3


def test_bf16_is_what_torch_computes_in_bfloat16(resnet8: Case) -> None:
    net = resnet8.net
    data = resnet8.emit(of_layers(resnet8, BF16))
    result = ReferenceEvaluator(onnx.load_model_from_string(data)).run(None, {"input": resnet8.images})[0]
    tensors = {name: torch.from_numpy(value).bfloat16() for name, value in net.tensors.items()}
    found = {"input": torch.from_numpy(resnet8.images).bfloat16()}
    for node in net.graph.nodes[1:]:
        found[node.name] = net.calls[node.name]([found[value] for value in node.inputs], tensors)
    halves, full = found[net.graph.output].float().numpy(), resnet8.expected(Policy())
    assert 1e-3 < np.linalg.norm(result - full) / np.linalg.norm(full) < 2e-2
    assert np.linalg.norm(result - halves) < 1.5 * np.linalg.norm(halves - full)


def test_a_dropped_last_branch_still_ends_in_float32(resnet8: Case) -> None:
    policy = resnet8.net.graph.normalise(Policy(dropped=frozenset({"layer3.0"}), precisions={"linear": FP16}))
    data = resnet8.emit(policy)
    onnx.checker.check_model(data, full_check=True)
    reference = resnet8.expected(Policy(dropped=policy.dropped))
    np.testing.assert_allclose(exact(data, resnet8.images), reference, rtol=1e-2, atol=5e-3)
