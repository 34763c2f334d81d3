"""Norms that are live while a model trains: against torch's own layers, folded exactly, and worth having."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocomp.compress import trace
from autocomp.outcome import Observer
from autocomp.parts import Layer
from autocomp.train import Training, TrainingRecipe, Tuned, finetune
from autocomp.train.norms import batch_norm, folded, normalised, samples
from tests.train.small import PLAIN, RECIPE, StopError, split, stopping, whole


class Net(nn.Module):
    """Norms behind a convolution, a depthwise one and none, and one that is not behind a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6)
        self.deep, self.deep_norm = nn.Conv2d(6, 6, 3, 1, 1, groups=6), nn.BatchNorm2d(6)
        self.plain, self.head = nn.Conv2d(6, 8, 3, 2, 1), nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.deep_norm(self.deep(self.norm(self.first(images)).relu())).relu()
        logits: Tensor = self.head(self.plain(maps).relu().mean((2, 3)))
        return logits


def network(seed: int = 0) -> Net:
    """As if trained: its norms know the images, and weigh some channels negatively."""
    torch.manual_seed(seed)
    net = Net()
    for norm in (net.norm, net.deep_norm):
        nn.init.uniform_(norm.weight, -1.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    for _ in range(100):
        net(whole(split())[0])
    return net.eval().requires_grad_(False)


def layers_of(net: nn.Module) -> tuple[torch.fx.GraphModule, list[Layer]]:
    traced = trace(net, torch.randn(2, 3, 8, 8))
    return traced.module, [layer for layer in traced.graph.layers if layer.normalised]


def images() -> Iterator[Tensor]:
    yield whole(split())[0]


def test_live_norms_compute_what_folded_ones_did() -> None:
    """On the whole batch that means and variances are of."""
    module, layers = layers_of(network())
    assert sorted(layer.name for layer in layers) == ["deep", "first"]
    live = normalised(module, layers, images())
    (pixels,) = images()
    torch.testing.assert_close(live(pixels), module(pixels), rtol=1e-4, atol=1e-4)
    assert (live(pixels[:8]) - module(pixels[:8])).abs().max() > 1e-3
    names = {name for name, _ in live.named_parameters()}
    assert {"first.norm_factor", "deep.norm_offset", "plain.bias"} <= names
    assert not {"first.bias", "deep.bias", "plain.norm_factor"} & names  # an offset's gradient would be theirs
    assert {node.name for node in module.graph.nodes if node.op == "call_function"} <= {
        node.name for node in live.graph.nodes
    }


def test_steps_are_those_of_a_model_with_torchs_norms() -> None:
    net = network()
    module, layers = layers_of(net)
    live = normalised(module, layers, images())
    twin = Net()
    twin.load_state_dict(net.state_dict())
    tensors = dict(live.named_parameters())
    with torch.no_grad():
        for name, layer, norm in (("first", twin.first, twin.norm), ("deep", twin.deep, twin.deep_norm)):
            layer.weight.copy_(tensors[f"{name}.weight"])
            norm.weight.copy_(tensors[f"{name}.norm_factor"])
            norm.bias.copy_(tensors[f"{name}.norm_offset"])
    pixels, labels = whole(split())
    twin.train()
    for model in (live, twin):
        for weight in model.parameters():
            weight.requires_grad_(True)
        torch.autograd.backward(F.cross_entropy(model(pixels), labels))
    for ours, theirs in (("first.weight", twin.first.weight), ("deep.weight", twin.deep.weight),
                         ("deep.norm_factor", twin.deep_norm.weight), ("first.norm_offset", twin.norm.bias),
                         ("head.weight", twin.head.weight)):  # fmt: skip
        torch.testing.assert_close(tensors[ours].grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_what_is_folded_again_is_what_was_there() -> None:
    module, layers = layers_of(network())
    found = folded(normalised(module, layers, images()), layers, images())
    assert found.keys() == dict(module.named_parameters()).keys()
    for name, weight in module.named_parameters():
        np.testing.assert_allclose(found[name], weight.detach().numpy(), rtol=1e-3, atol=1e-4)


def test_statistics_are_of_all_batches() -> None:
    module, layers = layers_of(network())
    (pixels,) = images()
    one = normalised(module, layers, iter([pixels]))
    several = normalised(module, layers, iter(torch.split(pixels, [20, 20, 8])))
    for (name, first), second in zip(one.named_parameters(), several.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5, msg=name)


def test_one_number_is_its_offset() -> None:
    offset = torch.tensor([0.5, -2.0])
    found = batch_norm(torch.tensor([[[[3.0]], [[4.0]]]]), torch.ones(2), offset)
    torch.testing.assert_close(found.flatten(), offset, rtol=0, atol=1e-3)


def trained(recipe: TrainingRecipe, checkpoint: Path | None = None, observer: Observer = lambda event: None) -> Tuned:
    module, layers = layers_of(network())
    return finetune(Training(module, None, split(), recipe, checkpoint, norms=layers), observer)


def test_a_stopped_training_with_live_norms_ends_with_the_same_bits(tmp_path: Path) -> None:
    recipe, path = replace(RECIPE, norms="batch", distillation=0.0), tmp_path / "state"
    expected = trained(recipe)
    with pytest.raises(StopError):
        trained(recipe, path, observer=stopping(7))
    found = trained(recipe, path)
    assert found.losses == expected.losses
    assert all(np.array_equal(found.tensors[name], value) for name, value in expected.tensors.items())


def test_live_norms_stand_rates_at_which_folded_ones_learn_nothing() -> None:
    module, _ = layers_of(network())
    recipe = replace(PLAIN, epochs=12, lr=1.0, momentum=0.9, distillation=0.0)
    assert trained(recipe).losses[-1] > 0.99 * np.log(4)  # of guesses among four classes
    found = trained(replace(recipe, norms="batch"))
    assert found.losses[-1] < 0.6 * np.log(4)
    module.load_state_dict({name: torch.from_numpy(value) for name, value in found.tensors.items()}, strict=False)
    pixels, labels = whole(split())
    assert F.cross_entropy(module(pixels), labels).item() < 0.6 * np.log(4)  # with the norms folded, too


def test_batches_that_statistics_are_of_mix_the_classes() -> None:
    pixels = split(64).take(np.argsort(np.arange(64) % 4, kind="stable"))  # ordered by class
    known, labels = whole(pixels)
    for batch in samples(pixels, 16, torch.device("cpu")):
        found = {int(labels[(known == image).flatten(1).all(1)][0]) for image in batch}
        assert len(batch) == 16 and len(found) == 4
