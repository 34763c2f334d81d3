"""Layers of reduced rank as pairs of smaller ones."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from autocomp.compress.moments import Moments
from autocomp.compress.reconstruct import features_of
from autocomp.compress.surgery import frozen, rebuild, tensors_of
from autocomp.graph import LayerGraph
from autocomp.policy import Policy

__all__ = ["factorized", "factors", "paired"]

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
    if moments is None:
        mean, responses = torch.zeros(flat.shape[1], dtype=torch.float64), flat @ flat.T
    else:
        mean = moments.mean.double().repeat_interleave(moments.pooled)
        parts = weight.reshape(len(weight), -1, moments.pooled).transpose(1, 2).double()  # (out, pooled, features)
        responses = (parts @ moments.gram.double()).flatten(1) @ parts.flatten(1).T
    variances, axes = torch.linalg.eigh(responses)
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
        layer, known = graph.layer_by_name[name], moments.get(name)
        kept = positions.get((layer.weight, 1))
        if known is not None and kept is not None:
            stay = features_of(layer.weight_shape[1], kept, known)
            known = Moments(known.mean[stay], known.gram[stay][:, stay], known.pooled)
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
