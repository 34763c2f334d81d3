"""Compression of a really trained network: the CIFAR-10 ResNet-20."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from autocomp.compress import Traced, collect, compress, run, trace
from autocomp.models.zoo import CifarResNet
from autocomp.policy import INT8, Policy, Precision, Recipe
from tests.compress.conftest import UNSIGNED

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@dataclass(frozen=True)
class Trained:
    traced: Traced
    calibration: Tensor
    test: Tensor
    labels: Tensor

    def accuracy(self, policy: Policy, recipe: Recipe) -> float:
        """Top-1 on 1,000 test images, in percent."""
        statistics = collect(self.traced, self.calibration, recipe)
        compressed = compress(self.traced, statistics, policy, recipe, UNSIGNED, self.calibration)
        return 100 * float((run(compressed.module, self.test).argmax(1) == self.labels).float().mean())


@pytest.fixture(scope="module")
def trained(shared: Path, cifar10_npz: Path) -> Trained:
    model = CifarResNet(20, 10)
    model.load_state_dict(load_file(shared / "weights" / "cifar10_resnet20.safetensors"))

    def ready(pixels: NDArray[np.uint8]) -> Tensor:
        return torch.from_numpy(((pixels / 255 - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32))

    with np.load(cifar10_npz) as data:
        chosen = np.random.default_rng(0).permutation(len(data["x_train"]))[:512]
        calibration, test = ready(data["x_train"][chosen]), ready(data["x_test"][:1000])
        labels = torch.from_numpy(data["y_test"][:1000].astype(np.int64).ravel())
    return Trained(trace(model, calibration[:2]), calibration, test, labels)


def test_accuracy_of_half_the_inner_channels(trained: Trained) -> None:
    policy = Policy({group.name: group.channels // 2 for group in trained.traced.graph.groups if "layer" in group.name})
    assert len(policy.kept) == 9  # one inner group a block, without the stream
    recipe = Recipe(importance="group_l2", images=512)
    sliced = trained.accuracy(policy, replace(recipe, reconstruction="none", recalibration="never"))
    solved = trained.accuracy(policy, recipe)
    ordered = trained.accuracy(policy, replace(recipe, importance="least_error"))
    assert sliced < 40 < 60 < solved < ordered
    assert ordered > 72


def test_int8_costs_almost_nothing(trained: Trained) -> None:
    whole = 100 * float((run(trained.traced.module, trained.test).argmax(1) == trained.labels).float().mean())
    policy = Policy(precisions={layer.name: INT8 for layer in trained.traced.graph.layers})
    assert whole > 90
    assert abs(trained.accuracy(policy, Recipe(images=512)) - whole) <= 1.0


def test_learned_rounding_saves_weights_of_two_bits(trained: Trained) -> None:
    """Two layers of ternary weights, a quarter of all there are."""
    few = ["layer3.1.conv1", "layer3.1.conv2"]
    kinds = {layer.name: INT8 for layer in trained.traced.graph.layers} | dict.fromkeys(few, Precision("int2", "int8"))
    policy, recipe = Policy(precisions=kinds), Recipe(images=512)
    nearest, learned = (trained.accuracy(policy, replace(recipe, rounding=kind)) for kind in ("nearest", "adaround"))
    assert learned > 90 and learned > nearest
