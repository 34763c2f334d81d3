"""Whole networks: the file that is emitted builds for every architecture, and says what torch computes."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from autocomp.compress import Traced, collect, compress, export_onnx, logits_of, run, trace
from autocomp.compress.arrays import arrays_of
from autocomp.compress.naming import value_of
from autocomp.compress.quantize import quantize
from autocomp.compress.ranges import Ranges
from autocomp.compress.statistics import Statistics, Watcher
from autocomp.compress.surgery import rebuild, tensors_of
from autocomp.engines import Template, emit, load_template
from autocomp.engines.onnxruntime import exact_engine
from autocomp.engines.tensorrt import BuildOptions, build_plan, find_flavour, prepare
from autocomp.engines.tensorrt.backend import NUMERICS
from autocomp.engines.torch_cuda import OnnxModule
from autocomp.graph import LayerGraph
from autocomp.models.zoo import CifarResNet
from autocomp.policy import FP32, INT8, Policy, Precision, Recipe

pytest.importorskip("tensorrt_rtx_bindings", reason="not installed: pip install 'autocomp[tensorrt-rtx]'")

pytestmark = pytest.mark.slow

TARGETS = ("SM80", "SM89", "SM120")
FP16 = Precision.parse("fp16")
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def outputs(file: bytes, images: Tensor) -> NDArray[np.float32]:
    """What ONNX Runtime computes of the very file that TensorRT builds."""
    batch = len(images)
    with exact_engine(file, batch) as engine:
        return engine.run(images.numpy())


def build(file: bytes) -> int:
    """Bytes of an engine for all targets."""
    return len(build_plan(find_flavour("tensorrt-rtx"), file, BuildOptions(TARGETS, timeout_s=120)))


def settled(model: nn.Module, images: Tensor) -> nn.Module:
    """Random weights with batch norms that fit them, so that values neither vanish nor grow from layer to layer."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(images)
    return model.eval()


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0"])
def test_torchvision_networks(name: str) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 96, 96)
    model = settled(torchvision.models.get_model(name, weights=None), images)
    traced = trace(model, images[:2])
    graph, template = traced.graph, load_template(export_onnx(traced), traced.graph)
    tensors = arrays_of(tensors_of(traced.module))
    plain = prepare(emit(template, Policy(), tensors, {}, {}, NUMERICS), len(images))
    expected = run(traced.module, images).numpy()
    assert np.linalg.norm(outputs(plain, images) - expected) <= 1e-3 * np.linalg.norm(expected)
    with torch.no_grad():
        assert np.linalg.norm(OnnxModule(plain)(images).numpy() - expected) <= 1e-3 * np.linalg.norm(expected)
    assert build(plain) > sum(array.nbytes for array in tensors.values())

    policy = Policy(precisions={layer.name: INT8 for layer in graph.layers})
    ranges = Ranges(Recipe(), [node.name for node in graph.nodes if node.shape], len(images))
    with torch.no_grad():
        Watcher(traced.module, lambda node, value, read: ranges.watch(value_of(node), value)).run(images)
    quantized = quantize(
        traced.module, partial(rebuild, traced.module, graph), graph, policy, ranges.bounds(graph), Recipe(),
        NUMERICS, images, torch.from_numpy(expected),
    )  # fmt: skip
    parts = {**tensors, **quantized.biases}, quantized.weights, quantized.params
    file = prepare(emit(template, policy, *parts, NUMERICS), len(images))
    simulated = run(quantized.module, images).numpy()
    error = outputs(file, images) - simulated
    assert 10 * np.log10(np.sum(simulated**2) / np.sum(error**2)) >= 20
    assert build(file) > 0


@dataclass(frozen=True)
class Trained:
    """ResNet-56 on CIFAR-10, ready to be compressed."""

    traced: Traced
    template: Template
    statistics: Statistics
    calibration: Tensor
    test: Tensor


@pytest.fixture(scope="module")
def resnet56(shared: Path, cifar10_npz: Path) -> Trained:
    model = CifarResNet(56, 10)
    model.load_state_dict(load_file(shared / "weights" / "cifar10_resnet56.safetensors"))

    def ready(pixels: NDArray[np.uint8]) -> Tensor:
        return torch.from_numpy(((pixels / 255 - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32))

    with np.load(cifar10_npz) as data:
        calibration, test = ready(data["x_train"][:96]), ready(data["x_test"][:200])
    traced = trace(model, calibration[:2])
    template = load_template(export_onnx(traced), traced.graph)
    recipe = Recipe(importance="group_l2", images=96)
    return Trained(traced, template, collect(traced, calibration, recipe), calibration, test)


def mixed(graph: LayerGraph, seed: int) -> Policy:
    """Some channels pruned, and a random precision for every layer.

    Half of the stem's stream takes a quarter of the accuracy here, and with it the margins that agreement is about.
    """
    rng = np.random.default_rng(seed)
    inner = [group for group in graph.groups if group.name != graph.layers[0].name]
    kept = {group.name: group.channels - 8 for group in inner if rng.random() < 0.4}
    kinds = {layer.name: (FP32, FP16, INT8)[rng.integers(3)] for layer in graph.layers}
    return graph.normalise(Policy(kept, frozenset(), kinds))


def agreement(found: Trained, policy: Policy, images: Tensor) -> tuple[float, bytes]:
    """Share of images on which the file and the compressed torch model name the same class; and the file."""
    recipe = Recipe(importance="group_l2", recalibration="never", images=96)
    made = compress(found.traced, found.statistics, policy, recipe, NUMERICS, found.calibration)
    data = emit(found.template, made.policy, made.tensors, made.weights, made.params, NUMERICS)
    file = prepare(data, len(images))
    torches = logits_of(made.module, images.numpy())
    return float((outputs(file, images).argmax(1) == torches.argmax(1)).mean()), file


def test_trained_network_of_one_precision(resnet56: Trained) -> None:
    layers = resnet56.traced.graph.layers
    for kind in (FP16, INT8):
        share, file = agreement(resnet56, Policy(precisions={layer.name: kind for layer in layers}), resnet56.test)
        assert share >= 0.995
        assert build(file) > 0


def test_ten_random_mixed_policies(resnet56: Trained) -> None:
    for seed in range(10):
        policy = mixed(resnet56.traced.graph, seed)
        assert policy.kept and {str(kind) for kind in policy.precisions.values()} == {"fp16", "int8"}
        share, file = agreement(resnet56, policy, resnet56.test)
        assert share >= 0.985
        assert build(file) > 0
