"""Compression as editing of data: slicing tensors by a graph's groups, bypassing branches, running the result."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from autocomp.compress.naming import attribute_of, value_of
from autocomp.graph import Branch, Group, LayerGraph

__all__ = [
    "batches",
    "frozen",
    "kept_positions",
    "masked",
    "rebuild",
    "run",
    "shared_parameters",
    "slice_tensors",
    "tensors_of",
]

Kept = Mapping[str, tuple[int, ...]]


def kept_positions(graph: LayerGraph, kept: Kept) -> dict[tuple[str, int], NDArray[np.int64]]:
    """(parameter, axis) -> indices that stay, ascending, for every axis that a pruned group slices."""
    masks: dict[tuple[str, int], NDArray[np.bool_]] = {}
    for name, channels in kept.items():
        group = graph.group_by_name[name]
        gone = np.setdiff1d(np.arange(group.channels), np.asarray(channels, dtype=np.int64))
        for member in group.members:
            key = (member.parameter, member.axis)
            size = graph.parameters[member.parameter][member.axis]
            mask = masks.setdefault(key, np.ones(size, dtype=np.bool_))
            mask[np.asarray(member.positions, dtype=np.int64)[gone].ravel()] = False
    return {key: np.flatnonzero(mask) for key, mask in masks.items()}


def slice_tensors(
    tensors: Mapping[str, Tensor], positions: Mapping[tuple[str, int], NDArray[np.int64]]
) -> dict[str, Tensor]:
    """Tensors with only the given positions left on each listed axis."""
    result = dict(tensors)
    for (name, axis), indices in positions.items():
        if name in result:
            result[name] = result[name].index_select(axis, torch.from_numpy(indices))
    return result


def tensors_of(module: fx.GraphModule) -> dict[str, Tensor]:
    """Every tensor the graph reads, by name, detached."""
    names = dict.fromkeys(str(node.target) for node in module.graph.nodes if node.op == "get_attr")
    return {name: attribute_of(module, name).detach() for name in names}


def shared_parameters(module: fx.GraphModule) -> frozenset[str]:
    """Names of the tensors that more than one operator reads."""
    uses: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            uses[str(node.target)] = uses.get(str(node.target), 0) + len(node.users)
    return frozenset(name for name, count in uses.items() if count > 1)


def rebuild(
    module: fx.GraphModule, graph: LayerGraph, tensors: Mapping[str, Tensor], bypassed: Iterable[Branch] = ()
) -> fx.GraphModule:
    """A module of the same graph around other tensors, without the given branches.

    Node names stay. Grouped convolutions get as many groups as their weight has channels for. What no longer reaches
    the output is left out, its tensors too. ``module`` is not changed.
    """
    streams = {branch.add: branch.stream for branch in bypassed}
    grouped = {layer.node: layer for layer in graph.layers if layer.groups > 1}
    fresh = fx.Graph()
    by_value: dict[str, fx.Node] = {}
    env: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            (result,) = node.args
            fresh.output(env[result])
            continue
        if node.name in streams:
            env[node] = by_value[streams[node.name]]
        else:
            env[node] = fresh.node_copy(node, env.__getitem__)
            if node.name in grouped:
                layer = grouped[node.name]
                env[node].args = (*env[node].args[:6], layer.groups_of(tensors[layer.weight].shape[0]))
        by_value[value_of(node)] = env[node]
    fresh.eliminate_dead_code()
    return frozen(fresh, tensors)


def frozen(graph: fx.Graph, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """A module of a graph in eval mode, around those of the tensors that it reads, which are not to be trained."""
    used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    root = {
        name: nn.Parameter(tensor, requires_grad=False) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
        if name in used
    }
    return fx.GraphModule(root, graph).eval()


def masked(graph: LayerGraph, tensors: Mapping[str, Tensor], groups: Sequence[Group], kept: Kept) -> dict[str, Tensor]:
    """The unpruned tensors with everything that belongs to removed channels set to zero."""
    copies: dict[str, Tensor] = {}
    for group in groups:
        gone = np.setdiff1d(np.arange(group.channels), np.asarray(kept[group.name], dtype=np.int64))
        for member in group.members:
            if member.parameter.rpartition(".")[2] in ("weight", "bias"):
                index = torch.from_numpy(np.asarray(member.positions, dtype=np.int64)[gone].ravel())
                if member.parameter not in copies:
                    copies[member.parameter] = tensors[member.parameter].clone()
                copies[member.parameter].index_fill_(member.axis, index, 0.0)
    return {**tensors, **copies}


def batches(images: Tensor, size: int) -> Iterator[Tensor]:
    """Images in parts of ``size``, the last one smaller."""
    return (images[start : start + size] for start in range(0, len(images), size))


def run(module: nn.Module, images: Tensor, batch: int = 128) -> Tensor:
    """Logits (n, classes) of images (n, ...), computed in batches without gradients."""
    with torch.no_grad():
        return torch.cat([module(part) for part in batches(images, batch)])
