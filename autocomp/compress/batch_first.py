"""Linear operators written over values whose first axis is the batch, and sizes of one sample's part of a value.

PyTorch's attention computes with the sequence before the batch, or with both as one axis. What is known of a layer
would otherwise depend on where a model has its batch.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from autocomp.compress.naming import op_of

__all__ = ["batch_first", "sample_shape"]

_RESHAPES = frozenset({"reshape", "view", "flatten"})


def sample_shape(value: Tensor, batch: Any) -> tuple[int, ...]:
    """Sizes of a value for a batch of one, without the axis that is the batch alone.

    Args:
        value: as an exported graph has it in its metadata.
        batch: the symbolic size of the batch.
    """
    sizes = [_alone(size, batch) for size in value.shape]
    places = [axis for axis, size in enumerate(value.shape) if _is(size, batch)]
    return tuple(size for axis, size in enumerate(sizes) if axis not in places[:1])


def _is(size: Any, batch: Any) -> bool:
    return not isinstance(size, int) and bool(size.node.expr == batch.node.expr)


def _alone(size: Any, batch: Any) -> int:
    return size if isinstance(size, int) else int(size.node.expr.subs(batch.node.expr, 1))


def batch_first(graph: fx.Graph, source: fx.Node) -> None:
    """Turn the values that linear operators read, and back what they write; turns that meet cancel out. In place.

    Args:
        graph: its nodes have values as metadata ``val``.
        source: the model's input, whose first axis is the batch.
    """
    batch = source.meta["val"].shape[0]
    for node in [node for node in graph.nodes if op_of(node) == "linear"]:
        _turn(node, source, batch)
    for node in graph.nodes:
        before = node.args[0] if node.args else None
        if isinstance(before, fx.Node) and before.op == "call_function" and _undoes(node, before):
            node.replace_all_uses_with(before.args[0])
    graph.eliminate_dead_code()


def _turn(node: fx.Node, source: fx.Node, batch: Any) -> None:
    read: Any = node.args[0]
    sizes = read.meta["val"].shape
    if _is(sizes[0], batch):
        return
    if len(sizes) == 2 and op_of(read) in _RESHAPES:
        (before, *_) = read.args
        lead = _leading(before.meta["val"].shape, sizes[1])
        if lead is None or not any(_is(size, batch) for size in lead):
            return
        with node.graph.inserting_before(node):
            count = _new(node.graph, torch.ops.aten.sym_size.int, source, 0)
            whole = [count if _is(size, batch) else size for size in lead]
            read = _new(node.graph, torch.ops.aten.reshape.default, before, [*whole, sizes[1]])
        _read(node, read)
        _behind(node, torch.ops.aten.reshape.default, [-1, node.meta["val"].shape[-1]])
        sizes = read.meta["val"].shape
    place = next((axis for axis, size in enumerate(sizes[:-1]) if _is(size, batch)), 0)
    if place == 0:
        return
    with node.graph.inserting_before(node):
        turned = _new(node.graph, torch.ops.aten.transpose.int, read, 0, place)
    _read(node, turned)
    _behind(node, torch.ops.aten.transpose.int, 0, place)


def _read(node: fx.Node, value: fx.Node) -> None:
    """Let a linear operator read another value."""
    node.args = (value, *node.args[1:])
    node.meta["val"] = value.meta["val"].new_empty((*value.meta["val"].shape[:-1], node.meta["val"].shape[-1]))


def _leading(shape: Sequence[Any], features: Any) -> Sequence[Any] | None:
    """The sizes before those that make up the features; None where no such axes do."""
    for axis in range(len(shape) - 1, 1, -1):
        if all(isinstance(size, int) for size in shape[axis:]) and prod(shape[axis:]) == features:
            return shape[:axis]
    return None


def _new(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.map_arg(args, lambda entry: entry.meta["val"]))
    return node


def _behind(node: fx.Node, target: Any, *rest: Any) -> fx.Node:
    """An operator on a node's value, read in its place."""
    with node.graph.inserting_after(node):
        new = _new(node.graph, target, node, *rest)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return new


def _undoes(node: fx.Node, before: fx.Node) -> bool:
    """Whether a node gives what the one before it read."""
    if op_of(node) == op_of(before) == "transpose":
        rank = node.meta["val"].ndim
        return {int(axis) % rank for axis in node.args[1:3]} == {int(axis) % rank for axis in before.args[1:3]}  # type: ignore[arg-type]
    if op_of(node) in _RESHAPES and op_of(before) in _RESHAPES:
        first: Any = before.args[0]
        return [str(size) for size in node.meta["val"].shape] == [str(size) for size in first.meta["val"].shape]
    return False
