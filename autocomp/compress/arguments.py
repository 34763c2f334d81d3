"""Arguments of ATen operators, wherever a call gives them."""

from typing import Any

import torch
from torch import fx

from autocomp.compress.naming import op_of

__all__ = ["argument_of", "axes_of", "picked_axes"]


def argument_of(node: fx.Node, name: str) -> Any:
    """An operator's argument by its name, its default where it is not given."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.name == name:
            if position < len(node.args):
                return node.args[position]
            return node.kwargs.get(name, argument.default_value)
    return None


def axes_of(dims: Any, rank: int) -> list[int]:
    """Axes as a list, all of them where none is given."""
    if dims is None or dims == []:
        return list(range(rank))
    return [dims] if isinstance(dims, int) else list(dims)


def picked_axes(node: fx.Node) -> list[int]:
    """Axes on which an operator names positions."""
    if op_of(node) == "index":
        indices: Any = node.args[1]
        return [axis for axis, index in enumerate(indices) if index is not None]
    dims = argument_of(node, "dims") if op_of(node) in ("roll", "flip") else argument_of(node, "dim")
    return [0] if dims is None else axes_of(dims, 0)
