"""Fresh statistics for batch norms that were folded away, and how far a model's outputs are from the original's."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from autocomp.channel_moments import channel_moments
from autocomp.compress.affine import Norm
from autocomp.compress.surgery import batches
from autocomp.graph import LayerGraph

__all__ = ["divergence", "recalibrated"]


def recalibrated(
    module: fx.GraphModule, graph: LayerGraph, norms: Mapping[str, Norm], images: Tensor, batch: int = 128
) -> dict[str, Tensor]:
    """Weights and biases of the normalised layers after one pass in what would be the batch norms' training mode.

    Each such layer's output is normalised with its own batch's mean and variance to the mean and deviation the batch
    norm had, layers behind it see that, and the averages over the batches are folded into weight and bias. This is
    recalibration of batch norm with a cumulative average (Li et al., EagleEye, ECCV 2020, section 3.3), done on a
    folded model.

    Args:
        norms: layer -> its batch norm, already sliced like the layer's outputs.
        images: (n, *input_shape).

    Returns:
        parameter name -> tensor, for ``{layer}.weight`` and ``{layer}.bias`` of every normalised layer in the module.
    """
    present = {node.name for node in module.graph.nodes}
    nodes = {graph.layer_by_name[name].node: norm for name, norm in norms.items()}
    interpreter = _Normalising(module, {node: _Average(norm) for node, norm in nodes.items() if node in present})
    with torch.no_grad():
        for part in batches(images, batch):
            interpreter.run(part)
    result = {}
    for node, average in interpreter.averages.items():
        layer = graph.layer_by_node[node]
        scale, mean = average.fold()
        weight, bias = module.get_parameter(layer.weight).detach(), module.get_parameter(layer.bias).detach()
        result[layer.weight] = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        result[layer.bias] = (bias - mean) * scale + average.norm.beta
    return result


def divergence(reference: Tensor, logits: Tensor) -> float:
    """Mean Kullback-Leibler divergence in nats of softmax(logits) from softmax(reference), both (n, classes)."""
    p, q = reference.double().log_softmax(1), logits.double().log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


@dataclass
class _Average:
    norm: Norm
    batches: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    variance: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, output: Tensor) -> Tensor:
        """Take in one batch of a layer's output (n, channels, ...) and return it normalised."""
        mean, variance, count = channel_moments(output)
        mean, variance = mean.float(), variance.float()
        self.batches += 1
        self.mean = self.mean + mean
        self.variance = self.variance + variance * (count / max(count - 1, 1))
        scale = self.norm.gamma / torch.sqrt(variance + self.norm.epsilon)
        shape = (1, -1, *[1] * (output.ndim - 2))
        scale = torch.nan_to_num(scale, nan=0.0)  # a channel of gamma 0 is constant
        return output * scale.reshape(shape) + (self.norm.beta - mean * scale).reshape(shape)

    def fold(self) -> tuple[Tensor, Tensor]:
        """Factor on the layer's weight, and the mean to take off before it."""
        scale = self.norm.gamma / torch.sqrt(self.variance / self.batches + self.norm.epsilon)
        return torch.nan_to_num(scale, nan=0.0), self.mean / self.batches


class _Normalising(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, averages: Mapping[str, _Average]) -> None:
        super().__init__(module)
        self.averages = averages

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        return self.averages[n.name].add(value) if n.name in self.averages else value
