"""Layers of reduced rank as pairs of smaller ones."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from autocomp.compress.damping import damped_cholesky
from autocomp.compress.moments import Moments
from autocomp.compress.reconstruct import features_of
from autocomp.compress.statistics import Statistics
from autocomp.compress.surgery import frozen, kept_positions, rebuild, tensors_of
from autocomp.compress.tracing import Traced
from autocomp.graph import Layer, LayerGraph
from autocomp.policy import Policy

__all__ = ["energies", "factorized", "factors", "paired"]

JITTER = 1e-9  # of the inputs' mean variance, so that any second moment has a factor
FAINT = 1e-6  # of the largest variance of a response: what varies less is not magnified more


def factors(weight: Tensor, bias: Tensor, rank: int, moments: Moments | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights and biases of the two layers that come nearest to one at a rank.

    The responses y = W x + b are projected on their principal axes U: W' = U U'W, which minimises E|y - y'|^2 over the
    calibration images (Zhang et al., arXiv:1505.06798, section 3.1). Without moments x is taken for white, which is the
    truncated singular value decomposition of W (Denton et al., arXiv:1404.0736, section 3.1). Between the two layers
    every channel has mean 0 and variance 1, so that one range of codes fits all.

    Args:
        weight: (out, in, *kernel).
        bias: (out,).
        rank: at most out.
        moments: of what the layer reads.

    Returns:
        weight (rank, in, *kernel) and bias (rank,) of the first, (out, rank, 1, ...) and (out,) of the second.
    """
    flat = weight.flatten(1).double()
    mean = torch.zeros(flat.shape[1], dtype=torch.float64)
    if moments is not None:
        mean = moments.mean.double().repeat_interleave(moments.pooled)
    spread = _spread(weight, moments)
    variances, axes = torch.linalg.eigh(spread @ spread.T)
    variances, axes = variances.flip(0)[:rank], axes.flip(1)[:, :rank]
    least = float(variances[0]) * FAINT
    deviations = variances.clamp_min(least if least > 0 else 1.0).sqrt()
    first = axes.T @ flat / deviations[:, None]
    ones = [1] * (weight.ndim - 2)
    return (
        first.float().reshape(rank, *weight.shape[1:]),
        -(first @ mean).float(),
        (axes * deviations).float().reshape(-1, rank, *ones),
        (bias.double() + flat @ mean).float(),
    )


def energies(
    traced: Traced,
    statistics: Statistics,
    kept: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, NDArray[np.float32]],
    names: Iterable[str],
) -> dict[str, NDArray[np.float64]]:
    """Layer -> the share of its outputs' variance that every rank keeps, from 1 on, (out,).

    A layer without moments, such as the first, is taken to read white noise, as `factors` does.

    Args:
        kept, tensors: of a `Compressed` with these layers at full rank.
        names: of layers that a pair may stand for.
    """
    graph, found = traced.graph, {}
    positions = kept_positions(graph, kept)
    for layer in map(graph.layer_by_name.__getitem__, names):
        weight = torch.from_numpy(tensors[layer.weight])
        spread = _spread(weight, _stayed(layer, statistics.moments, positions))
        smaller = spread @ spread.T if len(spread) <= spread.shape[1] else spread.T @ spread
        sums = torch.linalg.eigvalsh(smaller).flip(0).clamp_min(0).cumsum(0).numpy()
        found[layer.name] = np.ones(len(weight))
        if sums[-1] > 0:
            found[layer.name][: len(sums)] = sums / sums[-1]
    return found


def _spread(weight: Tensor, moments: Moments | None) -> Tensor:
    """A, (out, inputs): what a layer gives, less its mean, has the second moment AA'."""
    if moments is None:
        return weight.flatten(1).double()
    parts = weight.reshape(len(weight), -1, moments.pooled).transpose(1, 2).double()  # (out, pooled, features)
    return (parts @ damped_cholesky(moments.gram.double(), JITTER)).flatten(1)


def _stayed(
    layer: Layer, moments: Mapping[str, Moments], positions: Mapping[tuple[str, int], NDArray[np.int64]]
) -> Moments | None:
    """Moments of the inputs that a layer still reads."""
    known, kept = moments.get(layer.name), positions.get((layer.weight, 1))
    if known is None or kept is None:
        return known
    stay = features_of(layer.weight_shape[1], kept, known)
    return Moments(known.mean[stay], known.gram[stay][:, stay], known.pooled)


def factorized(
    graph: LayerGraph,
    policy: Policy,
    tensors: Mapping[str, Tensor],
    moments: Mapping[str, Moments],
    positions: Mapping[tuple[str, int], NDArray[np.int64]],
) -> dict[str, Tensor]:
    """The tensors of `LayerGraph.paired`, of which every second layer of a pair computes what the policy's rank leaves.

    Args:
        graph: before.
        tensors: pruned and solved.
        moments: of what layers read in the unpruned model, by layer.
        positions: (parameter, axis) -> what stayed of it.
    """
    result = dict(tensors)
    for name, precision in policy.precisions.items():
        if precision.rank is None:
            continue
        layer = graph.layer_by_name[name]
        known = _stayed(layer, moments, positions)
        found = factors(tensors[layer.weight], tensors[layer.bias], precision.rank, known)
        names = (f"{name}.reduce.weight", f"{name}.reduce.bias", layer.weight, layer.bias)
        result.update(zip(names, found, strict=True))
    return result


def paired(module: fx.GraphModule, graph: LayerGraph, pairs: LayerGraph) -> fx.GraphModule:
    """A traced module with the layers of `LayerGraph.paired`; the tensors of those that are new hold nothing yet.

    Args:
        graph, pairs: before and after.
    """
    tensors = tensors_of(module)
    whole = rebuild(module, graph, tensors)
    for node in list(whole.graph.nodes):
        second = pairs.layer_by_node.get(node.name)
        if second is None or second == graph.layer_by_node[node.name]:
            continue
        first = pairs.layer_by_node[pairs.node_by_name[node.name].inputs[0]]
        with whole.graph.inserting_before(node):
            read = [whole.graph.create_node("get_attr", name) for name in (first.weight, first.bias)]
            reduced = whole.graph.create_node(
                "call_function", node.target, (node.args[0], *read, *node.args[3:]), name=first.node
            )
        geometry = (list(second.stride), list(second.padding), list(second.dilation), 1) if second.op == "conv" else ()
        node.args = (reduced, *node.args[1:3], *geometry)
        tensors |= {first.weight: torch.zeros(first.weight_shape), first.bias: torch.zeros(first.weight_shape[0])}
    return frozen(whole.graph, tensors)
