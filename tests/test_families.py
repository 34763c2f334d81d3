"""Small networks of torchvision's families: pruned and quantized files against their torch twins."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.densenet import DenseNet
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
from torchvision.models.vision_transformer import VisionTransformer

from autocomp.capabilities import Numerics
from autocomp.compress import collect, compress, export_onnx, run, trace
from autocomp.compress.statistics import Statistics
from autocomp.compress.tracing import Traced
from autocomp.engines import BackendSpec, Template, emit, int8_layers, load_template
from autocomp.engines.onnxruntime import OnnxRuntimeBackend
from autocomp.policy import INT8, Policy, Recipe

SIZE = 32
RECIPE = Recipe(images=32, importance="group_l2", recalibration="never")


def mobile() -> nn.Module:
    block = partial(InvertedResidualConfig, width_mult=1.0)
    blocks = [block(16, 3, 16, 16, True, "RE", 2, 1), block(16, 5, 32, 16, True, "HS", 1, 1)]
    return MobileNetV3(blocks, 64, num_classes=10)


def efficient() -> nn.Module:
    return EfficientNet([MBConvConfig(1, 3, 1, 16, 16, 1), MBConvConfig(4, 3, 2, 16, 24, 2)], 0.0, num_classes=10)


def dense() -> nn.Module:
    return DenseNet(8, (2, 2), 16, num_classes=10)


def vision() -> nn.Module:
    return VisionTransformer(SIZE, 8, num_layers=1, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=10)


def windows() -> nn.Module:
    return SwinTransformer(
        [4, 4], 16, [2], [2], [4, 4], num_classes=10, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2
    )


def modern() -> nn.Module:
    return ConvNeXt([CNBlockConfig(16, None, 2)], num_classes=10)


class Case:
    """A network with random weights and statistics of its own, traced, and its template."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        torch.manual_seed(0)
        self.images = torch.randn(32, 3, SIZE, SIZE)
        model = make().train()
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)  # torchvision's head begins with zeros
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = None
        with torch.no_grad():
            model(self.images)
        self.traced: Traced = trace(model.eval(), self.images[:2])
        self.statistics: Statistics = collect(self.traced, self.images, RECIPE)
        self.template: Template = load_template(export_onnx(self.traced), self.traced.graph)

    def written(self, policy: Policy, numerics: Numerics) -> tuple[bytes, np.ndarray]:
        """The edited file, and what the torch twin gives on fresh images."""
        found = compress(self.traced, self.statistics, policy, RECIPE, numerics, self.images)
        data = emit(self.template, found.policy, found.tensors, found.weights, found.params, numerics)
        return data, run(found.module, self.fresh).numpy()

    @property
    def fresh(self) -> Tensor:
        return torch.randn(16, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module", params=[mobile, efficient, dense, vision], ids=lambda make: make.__name__)
def family(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def half(case: Case) -> Policy:
    return Policy({group.name: max(1, group.channels // 2) for group in case.traced.graph.groups})


def pruned_error(case: Case) -> float:
    data, expected = case.written(half(case), Numerics(False, False, 127))
    (found,) = onnxruntime.InferenceSession(data).run(None, {"input": case.fresh.numpy()})
    return error(found, expected)


def test_a_pruned_file_is_its_twin(family: Case) -> None:
    assert family.traced.graph.macs(half(family)) < 0.8 * family.traced.graph.macs(Policy())
    assert pruned_error(family) < 1e-5


@pytest.mark.parametrize("make", [windows, modern], ids=lambda make: make.__name__)
def test_windows_and_scaled_branches_are_edited(make: Callable[[], nn.Module]) -> None:
    assert pruned_error(Case(make)) < 1e-5


def test_every_int8_layer_runs_as_int8_and_agrees_with_torch(family: Case, tmp_path: Path) -> None:
    backend = OnnxRuntimeBackend(BackendSpec(batch=16))
    policy = Policy(precisions={layer.name: INT8 for layer in family.traced.graph.layers})
    data, expected = family.written(policy, backend.capabilities().numerics)
    optimized = backend.optimized(data, tmp_path / "optimized.onnx")
    assert int8_layers(optimized, family.traced.graph) == policy.precisions.keys()
    with backend.build(data) as engine:
        found = engine.run(family.fresh.numpy())
    assert error(found, expected) < 0.02
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 15 / 16
    assert error(expected, run(family.traced.module, family.fresh).numpy()) < 0.2


def operators(case: Case, folder: Path) -> list[str]:
    backend = OnnxRuntimeBackend(BackendSpec(batch=16))
    policy = Policy(precisions={layer.name: INT8 for layer in case.traced.graph.layers})
    data, _ = case.written(policy, backend.capabilities().numerics)
    model = onnx.load_model_from_string(backend.optimized(data, folder / "optimized.onnx"))
    return [node.op_type for node in model.graph.node]


def test_what_lies_between_int8_layers(family: Case, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """SiLU, the scales of squeeze-and-excitation blocks and concatenations run in int8; norms and softmax do not."""
    found = operators(family, tmp_path)
    name = request.node.callspec.id
    if name == "efficient":
        assert {"QLinearSigmoid", "QLinearMul", "QLinearAdd"} <= set(found)
        assert not {"Sigmoid", "Mul", "Add", "Conv"} & set(found)
    if name == "mobile":
        assert {"QLinearMul", "QLinearAdd"} <= set(found) and "Conv" not in found
    if name == "dense":
        assert "QLinearConcat" in found and "BatchNormalization" in found
    if name == "vision":
        assert {"LayerNormalization", "Softmax", "Gelu"} <= set(found) and "Gemm" not in found
