"""What one pass of the unpruned model over calibration images tells every later policy."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from autocomp.compress.importance import Evidence
from autocomp.compress.means import channel_means
from autocomp.compress.moments import Moments, Sums, reading_layers
from autocomp.compress.naming import value_of
from autocomp.compress.ordering import order_channels
from autocomp.compress.surgery import batches, tensors_of
from autocomp.compress.tracing import Traced
from autocomp.errors import CompressError, DataError
from autocomp.graph import LayerGraph
from autocomp.policy import Recipe

__all__ = ["Ranges", "Statistics", "Watcher", "check_images", "collect"]

BATCH = 64
SAMPLES = 2**18  # of one value behind its percentiles


@dataclass(frozen=True)
class Statistics:
    """Of the unpruned model on the calibration images.

    Attributes:
        moments: layer that reads a prunable group -> moments of its inputs.
        orders: group -> its channels by the recipe's importance, the most dispensable first.
        ranges: value -> its bounds, by the recipe's method.
        means: value -> mean of each channel, (channels,); only where the model has branches that can be dropped.
        logits: (n, classes), in the images' order.
    """

    moments: Mapping[str, Moments]
    orders: Mapping[str, tuple[int, ...]]
    ranges: Mapping[str, tuple[float, float]]
    means: Mapping[str, Tensor]
    logits: Tensor


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
    moments = {graph.layer_by_node[node].name: found.moments() for node, found in sums.items()}
    evidence = Evidence(traced, tensors_of(traced.module), moments, images, recipe.ridge, recipe.seed)
    orders = order_channels(evidence, recipe.importance)
    return Statistics(moments, orders, bounds, totals, logits)


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


class Ranges:
    """Bounds of values seen in one pass: smallest and largest, or the percentiles that keep a recipe's share."""

    def __init__(self, recipe: Recipe, values: Iterable[str], images: int) -> None:
        self._recipe = recipe
        self._bounds: dict[str, tuple[float, float]] = {}
        self._samples: dict[str, list[NDArray[np.float32]]] = {}
        self._wanted = frozenset(values)
        self._per_image = -(-SAMPLES // images)

    def watch(self, name: str, value: Any) -> None:
        """Take in one batch of a value, (n, ...)."""
        if name not in self._wanted or not isinstance(value, Tensor) or not value.is_floating_point():
            return
        low, high = (float(bound) for bound in torch.aminmax(value))
        before = self._bounds.get(name, (low, high))
        # written so that a NaN stays
        self._bounds[name] = (low if not low >= before[0] else before[0], high if not high <= before[1] else before[1])
        if self._recipe.ranges == "percentile":
            flat = value.reshape(-1)
            step = max(1, flat.numel() // (self._per_image * len(value)))
            step += step % 2 == 0 and step > 1  # an odd stride does not stay in the even columns of a map
            self._samples.setdefault(name, []).append(flat[::step].numpy().copy())

    def bounds(self, graph: LayerGraph) -> dict[str, tuple[float, float]]:
        """Value -> (low, high), in the graph's order. Raises: CompressError if a value is not finite."""
        for node in graph.nodes:
            if node.name in self._bounds and not np.isfinite(self._bounds[node.name]).all():
                layer = graph.layer_by_node.get(node.name)
                name = layer.name if layer else node.name
                raise CompressError(
                    f"the output of {name} is NaN or infinite on the calibration images: check the model's weights "
                    "and that the images are normalised as in its training"
                )
        if self._recipe.ranges == "minmax":
            return dict(self._bounds)
        tail = (100.0 - self._recipe.percentile) / 2
        return {name: _percentiles(parts, tail) for name, parts in self._samples.items()}


def _percentiles(parts: Sequence[NDArray[np.float32]], tail: float) -> tuple[float, float]:
    low, high = np.percentile(np.concatenate(parts), (tail, 100.0 - tail))
    return float(low), float(high)
