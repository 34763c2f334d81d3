"""What one pass of the unpruned model over calibration images tells every later policy."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from autocomp.compress.naming import value_of
from autocomp.compress.tracing import Traced
from autocomp.errors import CompressError, DataError
from autocomp.graph import Layer, LayerGraph
from autocomp.policy import Recipe

__all__ = ["Moments", "Ranges", "Statistics", "Watcher", "check_images", "collect"]

LIMIT_BYTES = 512 * 10**6  # of one layer's second moments; a larger one is pooled over kernel positions
BATCH = 64
MIN_ROWS, ROWS_PER_FEATURE = 16_384, 12  # sampled rows behind one layer's second moments
SAMPLES = 2**18  # of one value behind its percentiles


@dataclass(frozen=True)
class Moments:
    """Mean and centred second moment of what a layer reads, over images and sampled positions.

    The features are the layer's unfolded inputs, ordered as its weight's columns (channel, then kernel position);
    or, where their second moment would exceed 512 MB, its input channels alone, the kernel positions (of a layer
    behind a flattened map: the map's positions) pooled as further samples.

    Attributes:
        mean: (features,), float64.
        gram: (features, features), float32.
        pooled: weight columns that share one feature; 1 where none do.
    """

    mean: Tensor
    gram: Tensor
    pooled: int


@dataclass(frozen=True)
class Statistics:
    """Of the unpruned model on the calibration images.

    Attributes:
        moments: layer that reads a prunable group -> moments of its inputs.
        ranges: value -> its bounds, by the recipe's method.
        logits: (n, classes), in the images' order.
    """

    moments: Mapping[str, Moments]
    ranges: Mapping[str, tuple[float, float]]
    logits: Tensor


def check_images(images: Tensor, graph: LayerGraph) -> Tensor:
    """Images as CPU float32. Raises: DataError if their shape does not fit, or some are not finite."""
    if images.ndim != len(graph.input_shape) + 1 or len(images) == 0 or not images.is_floating_point():
        raise DataError(f"calibration needs float images of shape (n, *{graph.input_shape}), not {tuple(images.shape)}")
    images = images.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(images).all()):
        raise DataError("some calibration images hold NaN or infinity: clean the data or its normalisation")
    return images


def collect(traced: Traced, images: Tensor, recipe: Recipe) -> Statistics:
    """Run the unpruned model once over the calibration images.

    Args:
        images: (n, *input_shape); the first ``recipe.images`` are used.
        recipe: gives the range method and the seed of the sampled positions.

    Raises:
        DataError: the images do not fit the model, or hold NaN.
        CompressError: a layer's output is not finite on them; it is named.
    """
    graph = traced.graph
    images = check_images(images, graph)[: recipe.images]
    generator = torch.Generator().manual_seed(recipe.seed)
    sums = {layer.node: _Sums.of(layer, graph, len(images)) for layer in reading_layers(graph)}
    ranges = Ranges(recipe, (node.name for node in graph.nodes if node.shape), len(images))

    def watch(node: fx.Node, value: Any, read: Callable[[fx.Node], Any]) -> None:
        ranges.watch(value_of(node), value)
        if node.name in sums:
            sums[node.name].add(read(node.all_input_nodes[0]), generator)

    watcher = Watcher(traced.module, watch)
    with torch.no_grad():
        logits = torch.cat([watcher.run(part) for part in images.split(BATCH)])
    bounds = ranges.bounds(graph)
    moments = {graph.layer_by_node[node].name: found.moments() for node, found in sums.items()}
    return Statistics(moments, bounds, logits)


def reading_layers(graph: LayerGraph) -> tuple[Layer, ...]:
    """Layers whose input channels some group can take away (depthwise ones lose theirs with their outputs)."""
    read = {member.parameter for group in graph.groups for member in group.members if member.axis == 1}
    return tuple(layer for layer in graph.layers if layer.weight in read)


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


@dataclass
class _Sums:
    """Running sums behind `Moments`, shifted by the first batch's mean so that nothing cancels."""

    layer: Layer
    pooled: int
    rows: int  # aimed at, per image
    count: int = 0
    shift: Tensor | None = None
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    square: Tensor = field(default_factory=lambda: torch.zeros(()))

    @classmethod
    def of(cls, layer: Layer, graph: LayerGraph, images: int) -> "_Sums":
        inner = int(np.prod(layer.weight_shape[2:])) if layer.op == "conv" else _flattened(layer, graph)
        features = layer.weight_shape[1] * (inner if layer.op == "conv" else 1)
        pooled = inner if features**2 * 4 > LIMIT_BYTES else 1
        rows = max(MIN_ROWS, ROWS_PER_FEATURE * features // pooled)
        return cls(layer, pooled, max(1, -(-rows // images)))

    def add(self, value: Tensor, generator: torch.Generator) -> None:
        """Add the rows of one batch, float32 within the batch and float64 across batches."""
        patches = _patches(value, self.layer, self.rows, generator)
        if self.pooled > 1:
            patches = patches.reshape(len(patches), -1, self.pooled).transpose(1, 2).flatten(0, 1)
        if self.shift is None:
            self.shift = patches.mean(0)
            self.total = torch.zeros(patches.shape[1], dtype=torch.float64)
            self.square = torch.zeros(patches.shape[1], patches.shape[1], dtype=torch.float64)
        patches = patches - self.shift
        self.count += len(patches)
        self.total += patches.sum(0, dtype=torch.float64)
        self.square += patches.T @ patches

    def moments(self) -> Moments:
        assert self.shift is not None
        offset = self.total / self.count
        gram = (self.square / self.count).addr_(offset, offset, alpha=-1)
        return Moments(self.shift.double() + offset, gram.float(), self.pooled)


def _flattened(layer: Layer, graph: LayerGraph) -> int:
    """Positions per channel where a linear layer reads a whole flattened map, else 1."""
    members = [m for group in graph.groups for m in group.members if m.parameter == layer.weight and m.axis == 1]
    width = members[0].width
    runs = all(
        entry == tuple(range(entry[0], entry[0] + width)) and entry[0] % width == 0
        for m in members
        for entry in m.positions
    )
    return width if runs and layer.weight_shape[1] % width == 0 else 1


def _patches(value: Tensor, layer: Layer, rows: int, generator: torch.Generator) -> Tensor:
    """Unfolded inputs (samples, features) of a layer at random output positions, drawn anew for every image.

    Args:
        value: (n, channels, *spatial) for a conv, (n, ..., features) for a linear layer.
        rows: positions drawn for an image (with repetition); all of them where there are not more.
    """
    n = len(value)
    if layer.op == "linear":
        value = value.reshape(n, -1, value.shape[-1])
        if value.shape[1] <= rows:
            return value.flatten(0, 1)
        chosen = torch.randint(value.shape[1], (n, rows), generator=generator)
        return value.gather(1, chosen[..., None].expand(-1, -1, value.shape[-1])).flatten(0, 1)
    kernel = layer.weight_shape[2:]
    if any(layer.padding):
        value = nn.functional.pad(value, [entry for side in reversed(layer.padding) for entry in (side, side)])
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, layer.dilation, strict=True)]
    sizes = [(s - span) // step + 1 for s, span, step in zip(value.shape[2:], spans, layer.stride, strict=True)]
    positions = int(np.prod(sizes))
    if positions <= rows:
        chosen = torch.arange(positions).expand(n, -1)
    else:
        chosen = torch.randint(positions, (n, rows), generator=generator)
    flat = torch.arange(n)[:, None, None] * int(np.prod(value.shape[2:]))
    inner = torch.zeros(1, dtype=torch.long)
    divisor, stride = positions, int(np.prod(value.shape[2:]))
    for axis, size in enumerate(value.shape[2:]):  # row-major over the spatial axes
        divisor, stride = divisor // sizes[axis], stride // size
        start = (chosen // divisor) % sizes[axis] * layer.stride[axis]
        flat = flat + start[..., None] * stride
        step = torch.arange(kernel[axis]) * layer.dilation[axis] * stride
        inner = (inner[:, None] + step).flatten()
    rows_of = value.movedim(1, -1).reshape(-1, value.shape[1])
    found = rows_of[(flat + inner).flatten()].reshape(-1, len(inner), value.shape[1])
    return found.transpose(1, 2).flatten(1)


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
