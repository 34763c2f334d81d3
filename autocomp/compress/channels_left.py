"""Which of the unpruned model's channels each map of a compressed one still has."""

import numpy as np
from numpy.typing import NDArray

from autocomp.compress.surgery import Kept, kept_positions
from autocomp.graph import LayerGraph

__all__ = ["channels_left"]

MAP = 3  # axes of a map, its batch aside
ALONG = frozenset(
    {"relu", "relu6", "hardtanh", "clamp", "leaky_relu", "elu", "gelu", "silu", "sigmoid", "hardswish", "hardsigmoid"}
    | {"dropout", "max_pool2d", "avg_pool2d", "add"}
)
"""Operators whose output has the channels of its inputs."""


def channels_left(graph: LayerGraph, kept: Kept) -> dict[str, NDArray[np.int64]]:
    """Value -> the channels, ascending, that it has kept; for maps that convolutions write, behind activations, pooling
    and additions too.

    Args:
        graph: of the unpruned model.
        kept: pruned group -> channels that stay.
    """
    positions = kept_positions(graph, kept)
    found: dict[str, NDArray[np.int64]] = {}
    for node in graph.nodes:
        if len(node.shape) != MAP:
            continue
        layer = graph.layer_by_node.get(node.name)
        if layer is not None and layer.op == "conv":  # of a linear layer the last axis would be the channels
            found[node.name] = positions.get((layer.weight, 0), np.arange(layer.weight_shape[0]))
        elif node.op in ALONG:
            known = [found[value] for value in node.inputs if value in found]  # those added lose the same channels
            if known and all(graph.node_by_name[value].shape[0] == node.shape[0] for value in node.inputs):
                found[node.name] = known[0]
    return found
