"""What one pass of the unpruned model over calibration images tells every later policy."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from autocomp.compress.importance import Evidence
from autocomp.compress.means import channel_means
from autocomp.compress.moments import Moments, Sums, reading_layers
from autocomp.compress.naming import value_of
from autocomp.compress.ordering import order_channels
from autocomp.compress.ranges import Ranges
from autocomp.compress.reconstruct import cross_moments
from autocomp.compress.surgery import batches, tensors_of
from autocomp.compress.tracing import Traced
from autocomp.errors import DataError
from autocomp.graph import LayerGraph
from autocomp.policy import Recipe

__all__ = ["BATCH", "Statistics", "Watcher", "check_images", "collect", "kept_outputs"]

BATCH = 64
OUTPUTS_BYTES = 256 * 10**6  # of values kept for later policies


@dataclass(frozen=True)
class Statistics:
    """Of the unpruned model on the calibration images.

    Attributes:
        moments: layer that reads a prunable group -> moments of its inputs.
        cross: such a layer -> `cross_moments` of its weight; none where moments are pooled.
        orders: group -> its channels by the recipe's importance, the most dispensable first.
        ranges: value -> its bounds, by the recipe's method.
        means: value -> mean of each channel, (channels,); only where the model has branches that can be dropped.
        logits: (n, classes), in the images' order.
        outputs: value -> what layers and additions give on the first ``BATCH`` images, so that trials which are solved
            in sequence need not run the unpruned model again; empty where that is never asked for, or too large.
    """

    moments: Mapping[str, Moments]
    cross: Mapping[str, Tensor]
    orders: Mapping[str, tuple[int, ...]]
    ranges: Mapping[str, tuple[float, float]]
    means: Mapping[str, Tensor]
    logits: Tensor
    outputs: Mapping[str, Tensor] = field(default_factory=dict)


def check_images(images: Tensor, graph: LayerGraph) -> Tensor:
    """Images as CPU float32. Raises: DataError if their shape does not fit, or some are not finite."""
    if tuple(images.shape[1:]) != graph.input_shape or len(images) == 0 or not images.is_floating_point():
        raise DataError(f"calibration needs float images of shape (n, *{graph.input_shape}), not {tuple(images.shape)}")
    images = images.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(images).all()):
        raise DataError("some calibration images hold NaN or infinity: clean the data or its normalisation")
    return images


def collect(traced: Traced, images: Tensor, recipe: Recipe) -> Statistics:
    """Run the unpruned model once over the calibration images.

    Args:
        images: (n, *input_shape); the first ``recipe.images`` are used.
        recipe: gives importance, range method and the seed of the sampled positions.

    Raises:
        DataError: the images do not fit the model, or hold NaN.
        CompressError: a layer's output, or a score of importance, is not finite on them; it is named.
    """
    graph = traced.graph
    images = check_images(images, graph)[: recipe.images]
    generator = torch.Generator().manual_seed(recipe.seed)
    sums = {layer.node: Sums.of(layer, graph, len(images)) for layer in reading_layers(graph)}
    shaped = frozenset(node.name for node in graph.nodes if node.shape)
    ranges = Ranges(recipe, shaped, len(images))
    totals: dict[str, Tensor] = {}

    def watch(node: fx.Node, value: Any, read: Callable[[fx.Node], Any]) -> None:
        if not isinstance(value, Tensor):
            return
        ranges.watch(value_of(node), value)
        if value_of(node) in shaped and graph.branches:
            totals[value_of(node)] = totals.get(value_of(node), torch.zeros(())) + channel_means(value) * (
                len(value) / len(images)
            )
        if node.name in sums:
            sums[node.name].add(read(node.all_input_nodes[0]), generator)

    watcher = Watcher(traced.module, watch)
    with torch.no_grad():
        logits = torch.cat([watcher.run(part) for part in batches(images, BATCH)])
    bounds = ranges.bounds(graph)
    moments = {graph.layer_by_node[node].name: sums.pop(node).moments() for node in list(sums)}  # freed one by one
    tensors = tensors_of(traced.module)
    cross = {
        name: cross_moments(tensors[graph.layer_by_name[name].weight], found)
        for name, found in moments.items()
        if found.pooled == 1
    }
    evidence = Evidence(traced, tensors, moments, images, recipe.ridge, recipe.seed)
    orders = order_channels(evidence, recipe.importance)
    return Statistics(moments, cross, orders, bounds, totals, logits, kept_outputs(traced, images))


def kept_outputs(traced: Traced, images: Tensor) -> dict[str, Tensor]:
    """The ``outputs`` of `Statistics`; one short pass, so that they need not travel.

    Args:
        images: as of `collect`.
    """
    images = images[:BATCH]
    kept = _worth_keeping(traced.graph, len(images))
    outputs: dict[str, Tensor] = {}

    def watch(node: fx.Node, value: Any, read: Callable[[fx.Node], Any]) -> None:
        if value_of(node) in kept:
            outputs[value_of(node)] = value

    if kept:
        with torch.no_grad():
            Watcher(traced.module, watch).run(images)
    return outputs


def _worth_keeping(graph: LayerGraph, images: int) -> frozenset[str]:
    """Values that are costly to compute again; none where no branch can be dropped, or together they are too large."""
    wanted = [node for node in graph.nodes if node.shape and (node.name in graph.layer_by_node or node.op == "add")]
    size = 4 * images * sum(math.prod(node.shape) for node in wanted)
    return frozenset(node.name for node in wanted) if graph.branches and size <= OUTPUTS_BYTES else frozenset()


class Watcher(fx.Interpreter):
    """Runs a graph and shows every value to a callback."""

    def __init__(self, module: nn.Module, watch: Callable[[fx.Node, Any, Callable[[fx.Node], Any]], None]) -> None:
        super().__init__(module)
        self._watch = watch

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op in ("placeholder", "call_function"):
            self._watch(n, value, self.env.__getitem__)
        return value
