"""The mean of a dropped branch, handed to the layers behind it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from autocomp.compress.naming import value_of
from autocomp.compress.surgery import shared_parameters
from autocomp.compress.tracing import Traced
from autocomp.graph import Layer, Node
from autocomp.policy import Policy

__all__ = ["FoldedMeans", "channel_means", "fold_means"]

_LINEAR = frozenset(
    {"slice", "pad", "constant_pad_nd", "flatten", "view", "reshape", "mean", "avg_pool2d", "adaptive_avg_pool2d"}
    | {"max_pool2d"}
)


@dataclass(frozen=True)
class FoldedMeans:
    """What makes up for the means of dropped branches.

    Attributes:
        biases: parameter name -> new bias.
        added: layer that is added to a stream -> what it gives the stream beside its own output, (out,).
    """

    biases: dict[str, Tensor] = field(default_factory=dict)
    added: dict[str, Tensor] = field(default_factory=dict)


def fold_means(
    traced: Traced,
    policy: Policy,
    means: Mapping[str, Tensor],
    ranges: Mapping[str, tuple[float, float]],
    tensors: Mapping[str, Tensor],
    positions: Mapping[tuple[str, int], NDArray[np.int64]],
) -> FoldedMeans:
    """Biases that make up for what dropped branches gave on average.

    Without a branch its stream lacks the branch's mean. Every layer that reads the stream gets the mean's image under
    its weight, and the next branch that is added to the stream gets the mean itself, so that the stream is as it was
    from there on. Between them operators that are linear or only pick values are followed on maps that hold the mean
    everywhere, and so is the ReLU of a stream that is not negative.

    Args:
        means: value -> mean of each channel in the unpruned model, (channels,).
        ranges: value -> its bounds there.
        tensors: of the compressed model.
        positions: what stays on the sliced axes.
    """
    if not policy.dropped:
        return FoldedMeans()
    return _Walk(traced, policy, means, ranges, tensors, positions).run()


class _Walk:
    """Follows what each value lacks on average, in topological order."""

    def __init__(
        self,
        traced: Traced,
        policy: Policy,
        means: Mapping[str, Tensor],
        ranges: Mapping[str, tuple[float, float]],
        tensors: Mapping[str, Tensor],
        positions: Mapping[tuple[str, int], NDArray[np.int64]],
    ) -> None:
        self._graph = traced.graph
        self._nodes = {value_of(node): node for node in traced.module.graph.nodes}
        self._policy = policy
        self._means = means
        self._ranges = ranges
        self._tensors = tensors
        self._positions = positions
        self._stream = {
            branch.add: branch.stream for branch in map(traced.graph.branch_by_name.__getitem__, policy.dropped)
        }
        self._shared = shared_parameters(traced.module)
        self._lack: dict[str, Tensor] = {}
        self._found = FoldedMeans()

    def run(self) -> FoldedMeans:
        removed = self._graph.removed_layers(self._policy)
        for node in self._graph.nodes:
            layer = self._graph.layer_by_node.get(node.name)
            if layer is not None and layer.name in removed:
                continue
            if node.name in self._stream:
                stream = self._stream[node.name]
                if node.name in self._means and stream in self._means:
                    self._lack[node.name] = self._means[node.name] - self._reached(stream)
            elif any(value in self._lack for value in node.inputs):
                self._follow(node)
        return self._found

    def _reached(self, value: str) -> Tensor:
        """Mean of a value in the compressed model."""
        mean = self._means[value]
        return mean - self._lack[value] if value in self._lack else mean

    def _follow(self, node: Node) -> None:
        layer = self._graph.layer_by_node.get(node.name)
        if layer is not None and self._corrects(layer):
            self._add(layer.bias, self._read(layer, self._lack[node.inputs[0]]))
        if node.op == "add":
            if any(self._graph.node_by_name[value].shape != node.shape for value in node.inputs):
                return  # spread over axes that the means do not tell apart
            lack = torch.stack([self._lack[value] for value in node.inputs if value in self._lack]).sum(0)
            writers = [self._graph.layer_by_node[value] for value in node.inputs if value in self._graph.layer_by_node]
            alone = [
                layer
                for layer in writers
                if self._graph.consumers[layer.node] == (node.name,) and self._corrects(layer)
            ]
            if alone and len(node.inputs) > 1:
                kept = self._positions.get((alone[0].weight, 0))
                missing = lack if kept is None else lack[torch.from_numpy(kept)]
                self._add(alone[0].bias, missing)
                self._found.added[alone[0].name] = missing
            else:
                self._lack[node.name] = lack
        elif node.name in self._means and self._passes(node):
            self._lack[node.name] = self._through(node, self._means.__getitem__) - self._through(node, self._reached)

    def _corrects(self, layer: Layer) -> bool:
        """Whether a layer's bias can make up for a mean: it is read once, and means are those of its channels."""
        own = not {layer.weight, layer.bias} & self._shared
        return own and (layer.op == "conv" or len(self._graph.node_by_name[layer.node].shape) == 1)

    def _read(self, layer: Layer, lack: Tensor) -> Tensor:
        """What a layer makes of a mean of its inputs, (out,)."""
        weight = self._tensors[layer.weight]
        kept = self._positions.get((layer.weight, 0 if layer.groups > 1 else 1))
        groups = layer.groups_of(len(weight))
        if kept is not None and layer.groups > 1:  # whole groups went
            left = np.unique(kept * layer.groups // layer.weight_shape[0])
            lack = lack.reshape(layer.groups, -1)[torch.from_numpy(left)]
        elif kept is not None:
            lack = lack[torch.from_numpy(kept)]
        each = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1).sum(3)
        return (each @ lack.reshape(groups, -1, 1)).flatten()

    def _add(self, bias: str, lack: Tensor) -> None:
        self._found.biases[bias] = self._found.biases.get(bias, self._tensors[bias]) + lack

    def _through(self, node: Node, mean_of: Callable[[str], Tensor]) -> Tensor:
        """Mean of an operator's output, of maps that hold each input's mean everywhere."""

        def constant(read: fx.Node) -> Tensor:
            if read.op == "get_attr":
                return self._tensors[str(read.target)]
            shape = self._graph.node_by_name[value_of(read)].shape
            return mean_of(value_of(read)).reshape(1, -1, *[1] * (len(shape) - 1)).expand(1, *shape)

        found = self._nodes[node.name]
        args, kwargs = fx.node.map_arg((found.args, found.kwargs), constant)
        assert callable(found.target)
        return channel_means(found.target(*args, **kwargs))

    def _passes(self, node: Node) -> bool:
        """Whether means go through an operator as through the operator on means."""
        if node.op == "relu":
            value = node.inputs[0]
            while value in self._stream:
                value = self._stream[value]
            return self._ranges[value][0] >= 0
        values = [entry for entry in self._nodes[node.name].all_input_nodes if entry.op != "get_attr"]
        return node.op in _LINEAR and all(value_of(entry) in self._means for entry in values)


def channel_means(value: Tensor) -> Tensor:
    """Mean of each channel of a batch (n, channels, ...), (channels,)."""
    return value.flatten(2).mean((0, 2)) if value.ndim > 2 else value.mean(0)
