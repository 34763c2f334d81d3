"""The file's operators in torch, which run on any device, and the engine of the GPU."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch

from autocomp.engines import BackendSpec, make_backend
from autocomp.engines.tensorrt.backend import NUMERICS
from autocomp.engines.torch_cuda import OnnxModule
from autocomp.errors import ConfigError, EngineError
from autocomp.policy import FP32, INT8, Policy, Precision
from tests.engines.conftest import Case, case
from tests.engines.nets import Net
from tests.engines.test_onnx_graph import convolutional, everywhere, exact, fire, mobile, vgg

FP16, BF16 = Precision.parse("fp16"), Precision.parse("bf16")


def computed(found: Case, data: bytes) -> np.ndarray:
    with torch.no_grad():
        return OnnxModule(data)(torch.from_numpy(found.images)).numpy()


@pytest.mark.parametrize("build", [vgg, mobile, fire, convolutional])
def test_operators_are_those_of_onnx(build: Callable[[], Net]) -> None:
    found = case(build())
    for policy in (Policy(), everywhere(found.net)):
        data = found.emit(policy, NUMERICS)
        expected = exact(data, found.images)
        # A rounding tie may fall to either side, which moves single codes.
        assert np.abs(computed(found, data) - expected).max() < 0.03 * expected.std()


def test_mixed_types_are_those_of_the_file(resnet8: Case) -> None:
    kinds = (FP32, FP16, INT8)
    policy = Policy(precisions={layer.name: kinds[i % 3] for i, layer in enumerate(resnet8.net.graph.layers)})
    data = resnet8.emit(policy, NUMERICS)
    expected = exact(data, resnet8.images)
    assert np.linalg.norm(computed(resnet8, data) - expected) < 0.02 * np.linalg.norm(expected)


def test_bfloat16_loses_what_bfloat16_loses(resnet8: Case) -> None:
    data = resnet8.emit(Policy(precisions={layer.name: BF16 for layer in resnet8.net.graph.layers}))
    expected = resnet8.expected(Policy())
    assert 1e-3 < np.linalg.norm(computed(resnet8, data) - expected) / np.linalg.norm(expected) < 2e-2


def test_a_file_is_compiled_as_one_graph(resnet8: Case) -> None:
    """A break would leave most of a network uncompiled without a word."""
    data = resnet8.emit(Policy(precisions={layer.name: FP16 for layer in resnet8.net.graph.layers}))
    module, images = OnnxModule(data).eval(), torch.from_numpy(resnet8.images)
    with torch.no_grad():
        found = torch.compile(module, backend="eager", fullgraph=True, dynamic=False)(images)
        assert torch.equal(found, module(images))


def test_every_operators_value_has_its_name_in_the_file(resnet8: Case) -> None:
    data = resnet8.emit(Policy())
    with torch.no_grad():
        names = [name for name, _ in OnnxModule(data).steps(torch.from_numpy(resnet8.images))]
    assert names == [node.output[0] for node in onnx.load_model_from_string(data).graph.node]


def test_an_unknown_operator_is_named(resnet8: Case) -> None:
    model = onnx.load_model_from_string(resnet8.emit(Policy()))
    model.graph.node[1].op_type = "Det"
    with pytest.raises(EngineError, match=f"no operator Det, which {model.graph.node[1].name} is"):
        OnnxModule(model.SerializeToString())


@pytest.mark.parametrize("name", ["torch-cuda", "torch-cuda-compiled"])
def test_without_a_gpu_it_says_what_is_missing(name: str) -> None:
    with pytest.raises(ConfigError, match="not on 'sm89': leave the hardware out"):
        make_backend(BackendSpec(name, hardware="sm89"))
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ConfigError, match=r"no CUDA device is found \((PyTorch finds none|this PyTorch is)"):
        make_backend(BackendSpec(name))
