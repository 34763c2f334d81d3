"""Graph modules as plain data: fx traces a module anew when it is unpickled, and calls its nodes something else."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx
from torch.fx.node import map_aggregate

from autocomp.compress.surgery import frozen, tensors_of

__all__ = ["Packed", "pack", "unpack"]


@dataclass(frozen=True, slots=True)
class _Value:
    """Another node's value among a node's arguments."""

    name: str


@dataclass(frozen=True, slots=True)
class _Operator:
    """An ATen operator, which does not pickle."""

    name: str
    overload: str


@dataclass(frozen=True, slots=True)
class Packed:
    """A module's nodes in order, each (op, name, target, args, kwargs), and its tensors by name."""

    nodes: tuple[tuple[str, str, Any, Any, Any], ...]
    tensors: Mapping[str, NDArray[Any]]


def pack(module: fx.GraphModule) -> Packed:
    """What `unpack` makes an equal module of."""

    def plain(argument: Any) -> Any:
        return _Value(argument.name) if isinstance(argument, fx.Node) else argument

    nodes = tuple(
        (node.op, node.name, _named(node.target), map_aggregate(node.args, plain), map_aggregate(node.kwargs, plain))
        for node in module.graph.nodes
    )
    return Packed(nodes, {name: tensor.numpy() for name, tensor in tensors_of(module).items()})


def unpack(packed: Packed) -> fx.GraphModule:
    """A module with the same nodes, names and tensors, frozen and in eval mode."""
    graph = fx.Graph()
    values: dict[str, fx.Node] = {}

    def linked(argument: Any) -> Any:
        return values[argument.name] if isinstance(argument, _Value) else argument

    for op, name, target, args, kwargs in packed.nodes:
        values[name] = graph.create_node(
            op, _found(target), map_aggregate(args, linked), map_aggregate(kwargs, linked), name
        )
    # In memory of its own: what came over a wire may be read-only.
    return frozen(graph, {name: torch.from_numpy(np.array(array)) for name, array in packed.tensors.items()})


def _named(target: Any) -> Any:
    if isinstance(target, torch._ops.OpOverload):
        return _Operator(target._schema.name, target._overloadname)
    return target


def _found(target: Any) -> Any:
    if not isinstance(target, _Operator):
        return target
    namespace, _, name = target.name.partition("::")
    return getattr(getattr(getattr(torch.ops, namespace), name), target.overload)
