"""Second moments of what layers read, gathered at sampled positions."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from autocomp.graph import Layer, LayerGraph

__all__ = ["Moments", "Sums", "draw_positions", "inner_products", "outputs_at", "patches_at", "reading_layers"]

LIMIT_BYTES = 128 * 10**6  # of one layer's second moments; a larger one is pooled over kernel positions
CONSTANT = 1e-6  # deviation, as a fraction of the mean, that rounding explains
VANISHED = float(torch.finfo(torch.float32).tiny)  # variance that float32 holds to fewer digits
BLOCK = 144  # columns of inner products at a time
MIN_ROWS, ROWS_PER_FEATURE = 16_384, 12  # sampled rows behind one layer's second moments


@dataclass(frozen=True)
class Moments:
    """Mean and centred second moment of what a layer reads, over images and sampled positions.

    The features are the layer's unfolded inputs, ordered as its weight's columns (channel, then kernel position);
    or, where their second moment would exceed 128 MB, its input channels alone, the kernel positions (of a layer
    behind a flattened map: the map's positions) pooled as further samples.

    Attributes:
        mean: (features,), float64.
        gram: (features, features), float32.
        pooled: weight columns that share one feature; 1 where none do.
    """

    mean: Tensor
    gram: Tensor
    pooled: int


def reading_layers(graph: LayerGraph) -> tuple[Layer, ...]:
    """Layers whose input channels some group can take away (depthwise ones lose theirs with their outputs)."""
    read = {member.parameter for group in graph.groups for member in group.members if member.axis == 1}
    return tuple(layer for layer in graph.layers if layer.weight in read)


@dataclass
class Sums:
    """Running sums behind `Moments`, shifted by the first batch's mean so that nothing cancels."""

    layer: Layer
    pooled: int
    rows: int  # aimed at, per image
    count: int = 0
    shift: Tensor | None = None
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    square: Tensor = field(default_factory=lambda: torch.zeros(()))

    @classmethod
    def of(cls, layer: Layer, graph: LayerGraph, images: int) -> "Sums":
        inner = int(np.prod(layer.weight_shape[2:])) if layer.op == "conv" else _flattened(layer, graph)
        features = layer.weight_shape[1] * (inner if layer.op == "conv" else 1)
        pooled = inner if features**2 * 4 > LIMIT_BYTES else 1
        rows = max(MIN_ROWS, ROWS_PER_FEATURE * features // pooled)
        return cls(layer, pooled, max(1, -(-rows // images)))

    def add(self, value: Tensor, generator: torch.Generator) -> None:
        """Add the rows of one batch, float32 within the batch and float64 across batches."""
        patches = patches_at(value, self.layer, draw_positions(value, self.layer, self.rows, generator))
        if self.pooled > 1:
            patches = patches.reshape(len(patches), -1, self.pooled).transpose(1, 2).flatten(0, 1)
        if self.shift is None:
            self.shift = patches.mean(0)
            self.total = torch.zeros(patches.shape[1], dtype=torch.float64)
            self.square = torch.zeros(patches.shape[1], patches.shape[1], dtype=torch.float64)
        patches = patches - self.shift
        self.count += len(patches)
        self.total += patches.sum(0, dtype=torch.float64)
        self.square += inner_products(patches)

    def moments(self) -> Moments:
        """Once: the sums are used up, for they may be large."""
        assert self.shift is not None
        offset = self.total / self.count
        gram = self.square.div_(self.count).addr_(offset, offset, alpha=-1)
        mean = self.shift.double() + offset
        constant = gram.diagonal() <= (CONSTANT * mean).square().clamp_min(VANISHED)
        gram[constant], gram[:, constant] = 0.0, 0.0  # else a solve would read rounding
        return Moments(mean, gram.float(), self.pooled)


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


def inner_products(rows: Tensor) -> Tensor:
    """x'x of rows (..., n, features), (..., features, features).

    Only the blocks on and below the diagonal are computed, for most of the time of gathering and solving goes here.
    """
    features = rows.shape[-1]
    found = rows.new_empty(*rows.shape[:-2], features, features)
    for start in range(0, features, BLOCK):
        stop = min(start + BLOCK, features)
        found[..., start:, start:stop] = rows[..., start:].transpose(-1, -2) @ rows[..., start:stop]
        found[..., start:stop, stop:] = found[..., stop:, start:stop].transpose(-1, -2)
    return found


def draw_positions(value: Tensor, layer: Layer, rows: int, generator: torch.Generator) -> Tensor:
    """Output positions of a layer, drawn anew for every image.

    Args:
        value: what it reads, (n, channels, *spatial) for a conv, (..., features) with n x positions rows in the
            order of the images for a linear layer.
        rows: positions drawn for an image (with repetition); all of them where there are not more.

    Returns:
        (n, rows), indices into the flattened output positions.
    """
    n, positions = _counts(value, layer)
    if positions <= rows:
        return torch.arange(positions).expand(n, -1)
    return torch.randint(positions, (n, rows), generator=generator)


def patches_at(value: Tensor, layer: Layer, chosen: Tensor) -> Tensor:
    """Unfolded inputs (n * rows, features) of a layer at output positions, ordered as its weight's columns."""
    n = _counts(value, layer)[0]
    if layer.op == "linear":
        value = value.reshape(n, -1, value.shape[-1])
        return value.gather(1, chosen[..., None].expand(-1, -1, value.shape[-1])).flatten(0, 1)
    sizes = _output_sizes(value, layer)
    if any(layer.padding):
        value = nn.functional.pad(value, [entry for side in reversed(layer.padding) for entry in (side, side)])
    flat = torch.arange(n)[:, None, None] * int(np.prod(value.shape[2:]))
    inner = torch.zeros(1, dtype=torch.long)
    divisor, stride = int(np.prod(sizes)), int(np.prod(value.shape[2:]))
    for axis, size in enumerate(value.shape[2:]):  # row-major over the spatial axes
        divisor, stride = divisor // sizes[axis], stride // size
        start = (chosen // divisor) % sizes[axis] * layer.stride[axis]
        flat = flat + start[..., None] * stride
        step = torch.arange(layer.weight_shape[2:][axis]) * layer.dilation[axis] * stride
        inner = (inner[:, None] + step).flatten()
    rows_of = value.movedim(1, -1).reshape(-1, value.shape[1])
    found = rows_of[(flat + inner).flatten()].reshape(-1, len(inner), value.shape[1])
    return found.transpose(1, 2).flatten(1)


def outputs_at(value: Tensor, layer: Layer, chosen: Tensor) -> Tensor:
    """A layer's outputs (n * rows, channels) at output positions."""
    if layer.op == "conv":
        value = value.flatten(2).transpose(1, 2)
    value = value.reshape(len(chosen), -1, value.shape[-1])
    return value.gather(1, chosen[..., None].expand(-1, -1, value.shape[-1])).flatten(0, 1)


def _counts(value: Tensor, layer: Layer) -> tuple[int, int]:
    """Images in what a layer reads, and its outputs per channel for each."""
    if layer.op == "linear":
        return value.numel() // (value.shape[-1] * layer.positions), layer.positions
    return len(value), int(np.prod(_output_sizes(value, layer)))


def _output_sizes(value: Tensor, layer: Layer) -> tuple[int, ...]:
    """Spatial sizes of a convolution's output."""
    spans = [(k - 1) * d + 1 for k, d in zip(layer.weight_shape[2:], layer.dilation, strict=True)]
    padded = [size + 2 * side for size, side in zip(value.shape[2:], layer.padding, strict=True)]
    return tuple((s - span) // step + 1 for s, span, step in zip(padded, spans, layer.stride, strict=True))
