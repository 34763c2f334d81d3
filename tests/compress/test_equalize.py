"""Equalization keeps the function, evens the ranges, and makes int8 better where they were bad."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autocomp.compress import Traced, collect, compress, equalize, run, trace
from autocomp.compress.equalize import pairs_of
from autocomp.compress.recalibrate import recalibrated
from autocomp.policy import INT8, Policy, Recipe
from tests.compress.conftest import UNSIGNED, Case
from tests.compress.nets import images, trained

ALWAYS = Recipe(equalization="always", bias_correction="never")


class Inverted(nn.Module):
    """Two inverted residuals as in MobileNetV2, with an activation of one's own. Input (n, 3, 16, 16)."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, stride: int) -> nn.Module:
            wide = 4 * inputs
            return nn.Sequential(
                nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), activation(),
                nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), activation(),
                nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
            )  # fmt: skip

        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), activation())
        self.first, self.second = block(8, 8, 1), block(8, 12, 2)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.first(x)
        return self.head(self.second(x).mean((2, 3)))


class Grouped(nn.Module):
    """A grouped convolution, a pooling between layers, linear layers, and one that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, groups=2)
        self.c, self.d = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(nn.functional.leaky_relu(self.a(x)), 2)
        x = self.b(x).mean((2, 3))
        return self.d(torch.relu(self.c(torch.relu(self.c(x)))))


def spoiled(model: nn.Module) -> Traced:
    """A traced model whose channels differ in weight range by a factor of a thousand, its function unchanged."""
    traced = trace(trained(model), images(2, 16))
    generator = torch.Generator().manual_seed(1)
    for pair in pairs_of(traced):
        factor = 10 ** (3 * torch.rand(pair.writer.weight_shape[0], generator=generator) - 1.5)
        writer, reader = (traced.module.get_parameter(layer.weight) for layer in (pair.writer, pair.reader))
        writer.data *= factor.reshape(-1, 1, 1, 1)
        traced.module.get_parameter(pair.writer.bias).data *= factor
        # a depthwise layer reads channel i with row i
        reader.data /= factor.reshape(-1, 1, 1, 1) if pair.reader.depthwise else factor.reshape(1, -1, 1, 1)
        norm = traced.norms[pair.writer.name]
        scaled = replace(norm, beta=norm.beta * factor, gamma=norm.gamma * factor, epsilon=norm.epsilon * factor**2)
        traced.norms[pair.writer.name] = scaled
    return traced


@pytest.fixture(scope="module")
def bad() -> Traced:
    return spoiled(Inverted(nn.ReLU))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_the_function_stays(bad: Traced) -> None:
    data = images(32, 16, seed=3)
    even = equalize(bad, Recipe())
    assert even is not bad and even.graph == bad.graph
    assert relative(run(even.module, data), run(bad.module, data)) < 1e-5
    pairs = [(pair.writer.name, pair.reader.name) for pair in pairs_of(bad)]
    assert pairs == [(f"{block}.{a}", f"{block}.{a + 3}") for block in ("first", "second") for a in (0, 3)]


def test_both_sides_end_with_equal_ranges(bad: Traced) -> None:
    even = equalize(bad, Recipe())
    for block in ("first", "second"):
        expand, depth, project = (even.module.get_parameter(f"{block}.{i}.weight").detach() for i in (0, 3, 6))
        rows = depth.abs().amax((1, 2, 3))
        torch.testing.assert_close(expand.abs().amax((1, 2, 3)), rows, rtol=0.01, atol=0)
        torch.testing.assert_close(project.abs().amax((0, 2, 3)), rows, rtol=0.01, atol=0)


def test_norms_follow_their_layers(bad: Traced) -> None:
    """Recalibration must give the same function before and after."""
    data = images(64, 16, seed=4) * 1.5
    even = equalize(bad, Recipe())
    outputs = []
    for traced in (bad, even):
        fresh = recalibrated(traced.module, traced.graph, traced.norms, data)
        module = trace(trained(Inverted(nn.ReLU)), images(2, 16)).module
        for name, tensor in fresh.items():
            module.get_parameter(name).data.copy_(tensor)
        for name in ("head.weight", "head.bias"):
            module.get_parameter(name).data.copy_(traced.module.get_parameter(name))
        outputs.append(run(module, data))
    assert relative(outputs[1], outputs[0]) < 1e-4


def test_int8_error_falls(bad: Traced) -> None:
    data = images(256, 16, seed=5)
    expected = run(bad.module, data)
    errors = []
    for recipe in (replace(ALWAYS, equalization="never"), Recipe(bias_correction="never")):
        traced = equalize(bad, recipe)
        policy = Policy(precisions={layer.name: INT8 for layer in traced.graph.layers})
        found = compress(traced, collect(traced, data, recipe), policy, recipe, UNSIGNED, data)
        errors.append(relative(run(found.module, data), expected))
    assert errors[1] < 0.1 * errors[0]
    assert errors[1] < 0.05


def test_auto_is_for_depthwise_layers(chain: Case) -> None:
    assert equalize(chain.traced, Recipe()) is chain.traced
    even = equalize(chain.traced, ALWAYS)
    assert even is not chain.traced
    assert relative(run(even.module, chain.images), run(chain.traced.module, chain.images)) < 1e-5
    with_depthwise = spoiled(Inverted(nn.ReLU))
    assert equalize(with_depthwise, Recipe(equalization="never")) is with_depthwise


def test_bounded_activations_are_left_and_told() -> None:
    traced = trace(trained(Inverted(nn.ReLU6)), images(2, 16))
    even = equalize(traced, Recipe())
    assert pairs_of(traced) == ()
    assert "bounded (ReLU6)" in even.notes[-1] and "first.0" in even.notes[-1]
    data = images(8, 16)
    assert torch.equal(run(even.module, data), run(traced.module, data))


def test_groups_pools_linear_layers_and_dead_channels() -> None:
    model = trained(Grouped())
    with torch.no_grad():
        model.a.weight[2] = 0.0
        model.b.weight[:6, 1] = 0.0
    traced = trace(model, images(2, 16))
    names = [(pair.writer.name, pair.reader.name) for pair in pairs_of(traced)]
    assert names == [("a", "b")]  # the layer that is used twice stays as it is
    even = equalize(traced, ALWAYS)
    data = images(16, 16, seed=2)
    assert relative(run(even.module, data), run(traced.module, data)) < 1e-5
    a, b = (even.module.get_parameter(f"{name}.weight").detach().numpy() for name in "ab")
    read = np.abs(b.reshape(2, 6, 4, -1)).max(axis=(1, 3)).ravel()
    live = np.array([0, 3, 4, 5, 6, 7])
    np.testing.assert_allclose(np.abs(a).max(axis=(1, 2, 3))[live], read[live], rtol=1e-3)
    assert np.isfinite(a).all() and np.isfinite(b).all()
