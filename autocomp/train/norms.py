"""Batch normalisation while a model trains whose norms were folded into its layers, folded again at the end."""

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from autocomp.channel_moments import channel_moments
from autocomp.data import Indexed
from autocomp.data.splits import permutation
from autocomp.parts import Layer
from autocomp.train.augment import pixels_of
from autocomp.train.qat import positive, step_of

__all__ = ["batch_norm", "folded", "normalised", "samples"]

EPSILON = 1e-5
IMAGES = 2048
"""Images that means and variances are taken over."""


def normalised(module: fx.GraphModule, layers: Collection[Layer], images: Iterator[Tensor]) -> fx.GraphModule:
    """A module that normalises by each batch what these layers give, and computes what it did on batches like these.

    Training so stands higher learning rates (Ioffe and Szegedy, arXiv:1502.03167, section 3.3). Factors and offsets are
    those of the data, so that the layers' weights stay what they were; offsets take the biases' place.

    Args:
        module: with its norms folded.
        layers: those that had a norm.
        images: batches (n, c, h, w).
    """
    root: dict[str, Any] = dict(module.named_parameters()) | dict(module.named_buffers())
    known = {layer.node: layer for layer in layers}
    found = _moments(module, known, images)
    fresh, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in module.graph.nodes:
        layer = known.get(node.name)
        if layer is None:
            env[node] = fresh.node_copy(node, env.__getitem__)
            continue
        mean, variance = found[node.name]
        root[_factor(layer)] = nn.Parameter((variance + EPSILON).sqrt().float())
        root[_offset(layer)] = nn.Parameter(mean.float())
        read, weight, _, *rest = fx.map_arg(node.args, env.__getitem__)
        given = (read, weight, None, *rest)
        plain = fresh.create_node(node.op, node.target, given, dict(node.kwargs), name=_plain(layer))
        parts = (plain, fresh.get_attr(_factor(layer)), fresh.get_attr(_offset(layer)))
        env[node] = fresh.create_node("call_function", batch_norm, parts, {}, name=node.name)
    fresh.eliminate_dead_code()
    return fx.GraphModule(root, fresh).eval()


def folded(
    module: fx.GraphModule, layers: Collection[Layer], images: Iterator[Tensor]
) -> dict[str, NDArray[np.float32]]:
    """Parameters of the module that `normalised` was given, which compute what this one does on batches like these.

    A layer of integers keeps its codes: a channel's factor goes into its step (but where that is then below the least
    that steps may be beside the largest). Float8 is rounded anew.
    """
    tensors = {name: weight.detach().cpu() for name, weight in module.named_parameters()}
    found = _moments(module, [_plain(layer) for layer in layers], images)
    for layer in layers:
        mean, variance = (moment.cpu() for moment in found[_plain(layer)])
        factor = tensors.pop(_factor(layer)) / (variance + EPSILON).sqrt().float()
        weight, step = tensors[layer.weight], step_of(layer.weight)
        tensors[layer.weight] = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
        if step in tensors:
            tensors[step] = positive(tensors[step]) * factor.abs()
        tensors[layer.bias] = tensors.pop(_offset(layer)) - mean.float() * factor
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def batch_norm(value: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    """Each channel with the mean and variance of the batch (n, c, ...) itself; where that is one number, its offset."""
    known = (None, None)  # torch.nn.functional's refuses one number
    return torch.batch_norm(value, factor, offset, *known, True, 0.0, EPSILON, torch.backends.cudnn.enabled)


def samples(images: Indexed, batch: int, device: torch.device) -> Iterator[Tensor]:
    """Images as they are, classes mixed however they are ordered: each batch is normalised by itself."""
    return pixels_of(images.take(permutation(len(images), 0)[:IMAGES]), batch, device)


def _moments(
    module: fx.GraphModule, values: Collection[str], images: Iterator[Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Value -> means and variances of its channels, (c,) each, in double precision."""
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.name in values:
                mean, variance, size = channel_moments(value.float())
                one, two, count = sums.get(n.name, (0.0, 0.0, 0))
                sums[n.name] = one + size * mean, two + size * (variance + mean.square()), count + size
            return value

    with torch.no_grad():
        for batch in images:
            Watch(module).run(batch)
    return {
        name: (one / count, (two / count - (one / count).square()).clamp_min(0.0))
        for name, (one, two, count) in sums.items()
    }


def _factor(layer: Layer) -> str:
    return f"{layer.name}.norm_factor"


def _offset(layer: Layer) -> str:
    return f"{layer.name}.norm_offset"


def _plain(layer: Layer) -> str:
    """Its value before it is normalised."""
    return f"{layer.node}_plain"
