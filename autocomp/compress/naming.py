"""What nodes, operators and failures are called."""

import operator
from typing import Any

import torch
from torch import fx, nn

__all__ = ["attribute_of", "op_of", "reason_of", "value_of"]


def value_of(node: fx.Node) -> str:
    """The name of a node's value, as in the `LayerGraph` (fx itself cannot call a node ``input``)."""
    return "input" if node.op == "placeholder" else node.name


def attribute_of(module: nn.Module, path: str) -> Any:
    """What a module, or one inside it, has under a dotted name, as a ``get_attr`` node's target gives it."""
    return operator.attrgetter(path)(module)


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
