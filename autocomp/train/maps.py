"""What a compressed model sees, and where it looks, taught by the maps of the uncompressed one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from autocomp.errors import ModelError

__all__ = ["attention_distance", "hint_distance", "stages", "tapped"]

LEAST = 1e-3
"""Part of the maps' mean square that each image is taken to have at least."""


def stages(student: nn.Module, teacher: nn.Module, images: Tensor) -> list[str]:
    """Names of the last maps of every resolution that both modules compute: what the groups of a network's blocks give.

    Args:
        images: (n, c, h, w), run through both once.

    Raises:
        ModelError: there are none, as in a network without maps.
    """
    own, theirs = (_maps(module, images) for module in (student, teacher))
    last = {shape: name for name, shape in theirs.items() if own.get(name) == shape}
    if not last:
        raise ModelError("attention and hints need maps of more than one place: leave --attention and --hints out")
    return list(last.values())


def tapped(module: nn.Module, names: Sequence[str]) -> fx.GraphModule:
    """A module that gives its logits and the values of these names, with the same parameters."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    logits: Any = graph.graph_copy(_traced(module).graph, copies)
    values = {node.name: copy for node, copy in copies.items()}
    graph.output((logits, tuple(values[name] for name in names)))
    return fx.GraphModule(module, graph)


def attention_distance(own: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Sum over maps of the mean squared distance between attention maps.

    Attention is the sum of squares over channels, each image's scaled to length 1 (Zagoruyko and Komodakis,
    arXiv:1612.03928, section 3.1, equation 2, squared as in the authors' code), so that maps of a pruned model compare
    with those of the unpruned one, whatever their channels.

    Args:
        own, theirs: of each name, (n, c, h, w) with channels of their own.
    """
    parts = [(_attention(a) - _attention(b)).square().sum(1).mean() for a, b in zip(own, theirs, strict=True)]
    return torch.stack(parts).sum()


def hint_distance(own: Sequence[Tensor], theirs: Sequence[Tensor], channels: Sequence[Tensor | None]) -> Tensor:
    """Sum over maps of the squared distance between them, relative to the teacher's square, mean over images.

    Hints as of Romero et al. (FitNets, arXiv:1412.6550, section 2.2), without the layer that they put between: a pruned
    model has some of its teacher's channels, and it is known which.

    Args:
        own, theirs: of each name, (n, c, h, w).
        channels: of each name, those of the teacher's that ``own`` has; None for all.

    Raises:
        ModelError: maps are not of one shape.
    """
    parts = []
    for a, b, left in zip(own, theirs, channels, strict=True):
        a, b = a.float(), (b if left is None else b.index_select(1, left)).float()  # squares overflow half precision
        if a.shape != b.shape:
            raise ModelError(f"a map of shape {tuple(a.shape)} cannot be taught by one of {tuple(b.shape)}")
        energy = b.square().sum((1, 2, 3))
        least = LEAST * energy.mean()  # an image in whose map there is nothing would count for all others
        parts.append(((a - b).square().sum((1, 2, 3)) / energy.maximum(torch.where(least > 0, least, 1.0))).mean())
    return torch.stack(parts).sum()


def _attention(maps: Tensor) -> Tensor:
    return F.normalize(maps.float().square().sum(1).flatten(1), dim=1)


def _maps(module: nn.Module, images: Tensor) -> dict[str, tuple[int, int]]:
    """Value -> (height, width) of its maps."""
    found: dict[str, tuple[int, int]] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.op == "call_function" and isinstance(value, Tensor) and value.ndim == 4 and value[0, 0].numel() > 1:
                found[n.name] = value.shape[2], value.shape[3]
            return value

    with torch.no_grad():
        Watch(_traced(module)).run(images)
    return found


def _traced(module: nn.Module) -> fx.GraphModule:
    if not isinstance(module, fx.GraphModule):
        raise ModelError("attention and hints need traced models: leave --attention and --hints out")
    return module
