"""Gradients behind importance, against finite differences and plain autograd."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocomp.compress import run
from autocomp.compress.importance import CRITERIA, Evidence


def losses(module: nn.Module, tensors: dict[str, Tensor], data: Tensor, classes: Tensor) -> Tensor:
    logits = torch.func.functional_call(module, tensors, (data,))
    return F.cross_entropy(logits, classes, reduction="none")


def test_taylor_is_the_slope_of_each_images_loss_along_a_channels_gate(mixture: Evidence) -> None:
    graph, module, step = mixture.traced.graph, mixture.traced.module, 1e-4
    tensors = {name: tensor.double() for name, tensor in module.state_dict().items()}
    data = mixture.images.double()
    classes = run(module, mixture.images).argmax(1)
    for group in graph.groups:
        expected = []
        for channel in range(group.channels):
            found = []
            for factor in (1 - step, 1 + step):
                gated = dict(tensors)
                for member in group.members:
                    if member.axis == 1:
                        weight = gated[member.parameter].clone()
                        weight[:, list(member.positions[channel])] *= factor
                        gated[member.parameter] = weight
                found.append(losses(module, gated, data, classes))
            expected.append(float(((found[1] - found[0]) / (2 * step)).abs().mean()))
        scores = CRITERIA["taylor"](group, mixture)
        np.testing.assert_allclose(scores, expected, rtol=0.02, atol=1e-4 * max(expected))


def test_discrimination_is_the_squared_gradient_of_the_readers_columns(mixture: Evidence) -> None:
    graph, module = mixture.traced.graph, mixture.traced.module
    classes = run(module, mixture.images).argmax(1)
    tensors = {name: tensor.double() for name, tensor in module.state_dict().items()}
    for layer in graph.layers:
        tensors[layer.weight].requires_grad_()
    losses(module, tensors, mixture.images.double(), classes).mean().backward()  # type: ignore[no-untyped-call]
    for group in graph.groups:
        expected = np.zeros(group.channels)
        for member in group.members:
            if member.axis == 1:
                gradient = tensors[member.parameter].grad
                assert gradient is not None
                for channel, positions in enumerate(member.positions):
                    expected[channel] += float(gradient[:, list(positions)].square().sum())
        scores = CRITERIA["discrimination"](group, mixture)
        np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-5 * expected.max())


def test_gradients_leave_the_model_alone(mixture: Evidence) -> None:
    parameters = list(mixture.traced.module.parameters())
    assert mixture.gradients.gates
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in parameters)
