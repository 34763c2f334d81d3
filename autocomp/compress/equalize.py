"""Weight ranges equalized across layers: what per-tensor activations and coarse weights need in depthwise nets."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autocomp.compress.affine import Norm
from autocomp.compress.surgery import rebuild, shared_parameters, tensors_of
from autocomp.compress.tracing import Traced
from autocomp.graph import Layer, LayerGraph
from autocomp.policy import Recipe

__all__ = ["equalize", "pairs_of"]

# f(s x) = s f(x) for s > 0, each channel by itself, so that a factor can pass.
_HOMOGENEOUS = frozenset({"relu", "leaky_relu", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"})
_CLAMPS = frozenset({"relu6", "hardtanh", "clamp"})
_ROUNDS, _SETTLED = 50, 1e-3


@dataclass(frozen=True, slots=True)
class _Pair:
    """A layer and the only one that reads its output."""

    writer: Layer
    reader: Layer


def equalize(traced: Traced, recipe: Recipe) -> Traced:
    """Scale channels between layers so that both sides use their weight range alike; the function stays.

    Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction (arXiv:1906.04721), section
    4.1: a factor s goes through an activation with f(s x) = s f(x), so channel i of a layer may be divided by s_i
    and the column that reads it multiplied; s_i = sqrt(r1_i / r2_i), with r the largest weight of the row and of the
    column, makes both ranges equal. Chains are repeated until the factors settle.

    Args:
        recipe: ``auto`` equalizes models with depthwise layers only.

    Returns:
        the same graph around other weights and norms, with a note where clamped activations kept layers apart; or
        ``traced`` itself where there is nothing to do.
    """
    graph = traced.graph
    depthwise = any(layer.depthwise for layer in graph.layers)
    if recipe.equalization == "never" or (recipe.equalization == "auto" and not depthwise):
        return traced
    pairs = pairs_of(traced)
    notes = tuple(_clamped(graph))
    if not pairs:
        return replace(traced, notes=(*traced.notes, *notes))
    tensors = tensors_of(traced.module)
    total = {pair.writer.name: torch.ones(pair.writer.weight_shape[0]) for pair in pairs}
    for _ in range(_ROUNDS):
        change = 0.0
        for pair in pairs:
            factor = _factor(pair, tensors)
            _apply(pair, factor, tensors)
            total[pair.writer.name] *= factor
            change = max(change, float(factor.log().abs().max()))
        if change < _SETTLED:
            break
    norms = {name: _scaled(norm, total[name]) if name in total else norm for name, norm in traced.norms.items()}
    module = rebuild(traced.module, graph, tensors)
    return replace(traced, module=module, norms=norms, notes=(*traced.notes, *notes))


def pairs_of(traced: Traced) -> tuple[_Pair, ...]:
    """Layers whose output only one other layer reads, through homogeneous operators; in topological order."""
    graph, shared = traced.graph, shared_parameters(traced.module)
    found = []
    for writer in graph.layers:
        reader = graph.layer_by_node.get(_behind(graph, writer))
        if reader is None:
            continue
        own = {name for layer in (writer, reader) for name in (layer.weight, layer.bias)}
        if not own & shared and _channels_read(reader) == writer.weight_shape[0]:
            found.append(_Pair(writer, reader))
    return tuple(found)


def _behind(graph: LayerGraph, layer: Layer) -> str:
    """The first node behind a layer's homogeneous operators, or the layer's own where several nodes read."""
    value = layer.node
    while value != graph.output and len(graph.consumers[value]) == 1:
        (following,) = graph.consumers[value]
        if graph.node_by_name[following].op not in _HOMOGENEOUS:
            return following
        value = following
    return ""


def _channels_read(layer: Layer) -> int:
    return layer.weight_shape[1] * layer.groups


def _columns(reader: Layer, weight: Tensor) -> Tensor:
    """The weights that read each input channel: (channels, many)."""
    grouped = weight.reshape(reader.groups, weight.shape[0] // reader.groups, weight.shape[1], -1)
    return grouped.transpose(1, 2).reshape(_channels_read(reader), -1)


def _factor(pair: _Pair, tensors: Mapping[str, Tensor]) -> Tensor:
    """What each channel of the writer is divided by; 1 where a side is all zero."""
    written = tensors[pair.writer.weight].flatten(1).abs().amax(1)
    read = _columns(pair.reader, tensors[pair.reader.weight]).abs().amax(1)
    factor = torch.sqrt(written / read)
    usable = (written > 0) & (read > 0) & torch.isfinite(factor) & (factor > 0)
    return torch.where(usable, factor, torch.ones_like(factor))


def _apply(pair: _Pair, factor: Tensor, tensors: dict[str, Tensor]) -> None:
    """Divide the writer's channels and multiply the reader's columns. In place of the entries, not the tensors."""
    writer, reader = pair.writer, pair.reader
    weight = tensors[writer.weight]
    tensors[writer.weight] = weight / factor.reshape(-1, *[1] * (weight.ndim - 1))
    tensors[writer.bias] = tensors[writer.bias] / factor
    weight = tensors[reader.weight]
    columns = factor.reshape(reader.groups, 1, weight.shape[1]).expand(-1, weight.shape[0] // reader.groups, -1)
    shape = (weight.shape[0], weight.shape[1], *[1] * (weight.ndim - 2))
    tensors[reader.weight] = weight * columns.reshape(shape)


def _scaled(norm: Norm, factor: Tensor) -> Norm:
    """A norm whose layer's output was divided."""
    return Norm(norm.beta / factor, norm.gamma / factor, norm.epsilon / factor.square())


def _clamped(graph: LayerGraph) -> Iterator[str]:
    """A note if activations with an upper bound stand between layers: a factor does not pass them."""
    names = []
    for layer in graph.layers:
        following = graph.node_by_name.get(_behind(graph, layer))
        if following is not None and following.op in _CLAMPS:
            names.append(layer.name)
    if names:
        shown = ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")
        yield f"weights behind {shown} are not equalized: their activation is bounded (ReLU6), ReLU would allow it"
