"""Layers in fp8 (E4M3): codes against torch's own type, files against other evaluators, engines from the builder."""

from dataclasses import dataclass

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from autocomp.compress import Compressed, collect, compress, export_onnx, logits_of, structure, trace
from autocomp.compress.arrays import to_tensor
from autocomp.engines import BackendSpec, emit, load_template, make_backend, structure_digest
from autocomp.engines.onnxruntime import exact_engine
from autocomp.engines.tensorrt.backend import NUMERICS
from autocomp.engines.torch_cuda import torch_function
from autocomp.errors import InputError
from autocomp.fake_quant import fake_quantize_fp8
from autocomp.policy import FP8, INT8, Policy, Precision, Recipe
from autocomp.quantization import FP8_MAX, quantize_fp8
from autocomp.space.policy_space import widest_first
from autocomp.train.qat import learnable, learned
from tests import tiny

RECIPE = Recipe(images=32, reconstruction="closed_form")
KINDS = {
    "conv1": INT8, "blocks.0.conv1": FP8, "blocks.0.conv2": FP8, "blocks.1.conv1": INT8, "blocks.1.conv2": FP8,
    "blocks.1.shortcut.0": Precision("fp16", "fp16"), "head": FP8,
}  # fmt: skip
EIGHTS = [name for name, kind in KINDS.items() if kind == FP8]


@dataclass(frozen=True)
class Made:
    """A compressed model, its file, the skeleton of that structure, and images."""

    compressed: Compressed
    file: bytes
    skeleton: bytes
    images: NDArray[np.float32]


@pytest.fixture(scope="module")
def made() -> Made:
    model, images = tiny.model(), tiny.images(32, 5)
    traced = trace(model, images[:2])
    template = load_template(export_onnx(traced), traced.graph)
    statistics = collect(traced, images, RECIPE)
    policy = traced.graph.normalise(Policy({traced.graph.groups[0].name: 8}, precisions=KINDS))
    found = compress(traced, statistics, policy, RECIPE, NUMERICS, images)
    file = emit(template, policy, found.tensors, found.weights, found.params, NUMERICS)
    skeleton = emit(template, policy, *structure(traced, policy, statistics, NUMERICS, RECIPE), NUMERICS)
    return Made(found, file, skeleton, images.numpy())


@given(hnp.arrays(np.float32, (3, 5), elements=st.floats(-1e4, 1e4, width=32)))
def test_codes_are_those_of_torch(weight: NDArray[np.float32]) -> None:
    """Rounded to nearest, ties to even, nothing beyond the largest number."""
    found = quantize_fp8(weight)
    scaled = torch.from_numpy(weight / found.scale[0]).clamp(-FP8_MAX, FP8_MAX)
    codes = scaled.to(torch.float8_e4m3fn)
    np.testing.assert_array_equal(found.codes.astype(np.float32), codes.float().numpy())
    np.testing.assert_array_equal(found.real, codes.float().numpy() * found.scale[0])
    rounded = fake_quantize_fp8(torch.from_numpy(weight), float(found.scale[0]), FP8_MAX)
    np.testing.assert_array_equal(rounded.numpy(), found.real)
    if np.abs(weight).max() > 1e-30:
        assert np.abs(found.codes.astype(np.float32)).max() == pytest.approx(FP8_MAX, rel=0.04)
        # three bits of mantissa: half of a sixteenth, or half of the smallest step
        assert np.all(np.abs(found.real - weight) <= np.maximum(np.abs(weight) / 16, found.scale[0] * 2.0**-10) * 1.001)


def test_two_other_evaluators_compute_what_torch_does(made: Made) -> None:
    expected = logits_of(made.compressed.module, made.images)
    with exact_engine(made.file, len(made.images)) as engine:
        found = engine.run(made.images)
    assert np.linalg.norm(found - expected) <= 1e-3 * np.linalg.norm(expected)
    assert np.linalg.norm(torch_function(made.file)(made.images) - expected) <= 1e-3 * np.linalg.norm(expected)
    (reference,) = ReferenceEvaluator(onnx.load_model_from_string(made.file)).run(None, {"input": made.images[:2]})
    assert np.linalg.norm(reference - expected[:2]) <= 1e-3 * np.linalg.norm(expected[:2])


def test_every_fp8_layer_reads_codes_and_stores_them(made: Made) -> None:
    graph = onnx.load_model_from_string(made.file).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    writer = {node.output[0]: node for node in graph.node}
    for name in EIGHTS:
        layer = next(node for node in graph.node if f"{name}.weight_dq" in node.input)
        pair = writer[layer.input[0]]
        assert pair.op_type == "DequantizeLinear" and kinds[pair.input[2]] == TensorProto.FLOAT8E4M3FN
        assert kinds[f"{name}.weight_codes"] == TensorProto.FLOAT8E4M3FN and kinds[layer.input[2]] == TensorProto.FLOAT
    scales = {tensor.name: tensor.dims for tensor in graph.initializer if tensor.name.endswith("weight_scale")}
    assert all(len(scales[f"{name}.weight_scale"]) == 0 for name in EIGHTS)  # one for the whole tensor
    assert structure_digest(made.file) == structure_digest(made.skeleton)
    assert made.compressed.plan.fp8.keys() == set(EIGHTS)


def test_training_begins_with_the_calibrated_outputs_and_keeps_the_pattern(made: Made) -> None:
    module = learnable(made.compressed)
    images = to_tensor(made.images)
    outputs = module(images)
    np.testing.assert_array_equal(outputs.detach().numpy(), logits_of(made.compressed.module, made.images))
    weight = module.get_parameter("blocks.0.conv1.weight").requires_grad_()
    module(images).square().sum().backward()
    assert weight.grad is not None and float(weight.grad.abs().max()) > 0
    arrays = {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}
    _, weights, params = learned(made.compressed, arrays)
    assert params == made.compressed.params
    for name, before in made.compressed.weights.items():
        np.testing.assert_array_equal(weights[name].codes.astype(np.float32), before.codes.astype(np.float32))


def test_the_widest_comes_first() -> None:
    names = ("int8", "fp8", "fp32", "w4a8", "bf16", "fp16")
    assert [str(p) for p in widest_first({Precision.parse(name) for name in names})] == [
        "fp32", "fp16", "bf16", "fp8", "int8", "w4a8",
    ]  # fmt: skip


def test_engines_for_gpus_that_have_it(made: Made) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="not installed: pip install 'autocomp[tensorrt-rtx]'")
    from autocomp.engines.tensorrt import BuildOptions, build_plan, find_flavour, prepare

    file = prepare(made.file, 2)
    for target in ("SM89", "SM120"):
        assert len(build_plan(find_flavour("tensorrt-rtx"), file, BuildOptions((target,)))) > 10_000
    policy = made.compressed.policy
    make_backend(BackendSpec("tensorrt-rtx", hardware="sm89,sm120")).capabilities().validate(policy)
    for spec in (
        BackendSpec("tensorrt-rtx", hardware="sm86,sm89"),
        BackendSpec("onnxruntime"),
        BackendSpec("simulated"),
    ):
        with pytest.raises(InputError, match=r"cannot run as (fp8|fp16) on this engine: it runs fp32"):
            make_backend(spec).capabilities().validate(policy)
