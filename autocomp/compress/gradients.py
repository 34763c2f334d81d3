"""What one backward pass tells about the inputs of layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from autocomp.compress.moments import reading_layers
from autocomp.compress.surgery import batches
from autocomp.compress.tracing import Traced
from autocomp.graph import Layer

__all__ = ["Gradients", "gradients_of"]

BATCH = 64


@dataclass(frozen=True)
class Gradients:
    """Of the cross-entropy against the model's own predicted classes, so that no labels are needed.

    Attributes:
        gates: reading layer -> (n, inputs): derivative of each image's loss by a factor on each input of the layer,
            which is the sum over positions of activation times gradient.
        weights: reading layer -> gradient of the mean loss by its weight, in the weight's shape.
    """

    gates: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]


def gradients_of(traced: Traced, images: Tensor) -> Gradients:
    """One forward and backward pass; the model's own parameters stay frozen.

    Args:
        images: (n, *input_shape).
    """
    gates: dict[str, list[Tensor]] = {}
    weights: dict[str, Tensor] = {}
    layers = {layer.node: layer for layer in reading_layers(traced.graph)}
    for part in batches(images, BATCH):
        gated = _Gated(traced.module, layers)
        with torch.enable_grad():
            logits = gated.run(part)
            loss = F.cross_entropy(logits, logits.detach().argmax(1), reduction="sum")
        names = list(gated.gates)
        leaves = [gated.gates[name] for name in names] + [gated.weights[name] for name in names]
        found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True) if leaves else ()
        for name, gate, weight in zip(names, found, found[len(names) :], strict=False):
            gates.setdefault(name, []).append(gate)
            weights[name] = weights.get(name, torch.zeros(())) + weight / len(images)
    return Gradients({name: torch.cat(parts).flatten(1) for name, parts in gates.items()}, weights)


class _Gated(fx.Interpreter):
    """Runs a graph with a factor of one on every input of the given layers, and with weights that take gradients."""

    def __init__(self, module: fx.GraphModule, layers: Mapping[str, Layer]) -> None:
        super().__init__(module)
        self.layers = layers
        self.gates: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        layer = self.layers.get(n.name)
        if layer is None:
            return super().run_node(n)
        (value, weight, *rest), kwargs = self.fetch_args_kwargs_from_env(n)
        inner = (1,) * (value.ndim - 2)
        shape = (len(value), weight.shape[1], *inner) if layer.op == "conv" else (len(value), *inner, weight.shape[1])
        gate = self.gates[layer.name] = torch.ones(shape, requires_grad=True)
        own = self.weights[layer.name] = weight.detach().requires_grad_()
        return self.call_function(n.target, (value * gate, own, *rest), kwargs)
