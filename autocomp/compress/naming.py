"""What nodes, operators and failures are called."""

import torch
from torch import fx

__all__ = ["op_of", "reason_of", "value_of"]


def value_of(node: fx.Node) -> str:
    """The name of a node's value, as in the `LayerGraph` (fx itself cannot call a node ``input``)."""
    return "input" if node.op == "placeholder" else node.name


def op_of(node: fx.Node) -> str:
    """ATen's short name of an operator, without overload and in-place mark."""
    if node.op != "call_function":
        return node.op
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.rpartition("::")[2]
    return str(getattr(node.target, "__name__", node.target))


def reason_of(error: BaseException) -> str:
    """The first line of an error's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
