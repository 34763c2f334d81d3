"""Sizes that operators state, written so that they follow the sizes of tensors: channels can then be cut anywhere."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from autocomp.compress.channels import cut_axis
from autocomp.compress.following import Followed
from autocomp.compress.naming import attribute_of, op_of

__all__ = ["Pieces", "free_sizes", "pieces_of"]

_VIEWS = frozenset({"view", "reshape", "expand", "unflatten"})
_SPLITS = frozenset({"split", "split_with_sizes", "chunk"})


@dataclass(frozen=True)
class Pieces:
    """An axis that a node splits, or picks a part of, between channels that can be cut.

    Attributes:
        node: the operator.
        axis: which one.
        names: of the tensors whose lengths will be the pieces' sizes.
        labels: classes of each piece's channels.
    """

    node: fx.Node
    axis: int
    names: tuple[str, ...]
    labels: tuple[Tensor, ...]


def split(value: Tensor, pieces: Sequence[Tensor], axis: int) -> tuple[Tensor, ...]:
    """Parts of a value along an axis, each as long as its piece is."""
    return value.split_with_sizes([len(piece) for piece in pieces], axis)


def slice(value: Tensor, pieces: Sequence[Tensor], axis: int) -> Tensor:  # named as the operator it stands for
    """The part of a value along an axis that is as long as the second piece and begins behind the first."""
    before, own = pieces
    return value.narrow(axis, len(before), len(own))


def pieces_of(followed: Followed) -> list[Pieces]:
    """The splits and slices of axes that can be cut."""
    found = []
    for node, labels in followed.values.items():
        op = op_of(node)
        source = node.args[0]
        given = followed.values.get(source) if isinstance(source, fx.Node) else None
        if labels is None or given is None or op not in _SPLITS | {"slice"}:
            continue
        classes = followed.channels.classes(given)
        arguments: tuple[Any, ...] = (*node.args, *[None] * 4)
        position = 1 if op == "slice" else 2
        axis = int(node.kwargs.get("dim", arguments[position]) or 0) % classes.ndim
        if cut_axis(classes) != axis:
            continue
        vector = classes.movedim(axis, 0).flatten(1)[:, 0]
        if op == "slice":
            start, end = (_bound(arguments[index], len(vector)) for index in (2, 3))
            parts: Sequence[Tensor] = (vector[: start or 0], vector[start or 0 : end])
        else:
            parts = torch.split_with_sizes(vector, [part.shape[axis] for part in labels])
        names = tuple(f"{node.name}.{index}" for index in range(len(parts)))
        found.append(Pieces(node, axis, names, tuple(parts)))
    return found


def _bound(value: Any, size: int) -> int | None:
    if value is None or not isinstance(value, int):
        return None
    return min(value + size, size) if value < 0 else min(value, size)


def free_sizes(module: fx.GraphModule, followed: Followed, pieces: Sequence[Pieces]) -> fx.GraphModule:
    """A module that computes the same, in which no size of an axis that can be cut is written down.

    Views get -1 there; splits and slices take the lengths of tensors, which a policy slices as it does weights.
    """
    by_node = {entry.node: entry for entry in pieces}
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    root: dict[str, Any] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], env.__getitem__))
            continue
        if node.op == "get_attr":
            root[str(node.target)] = attribute_of(module, str(node.target))
        entry = by_node.get(node)
        if entry is None:
            env[node] = graph.node_copy(node, env.__getitem__)
            _loosen(env[node], node, followed)
            continue
        tensors = []
        for name, labels in zip(entry.names, entry.labels, strict=True):
            root[name] = nn.Parameter(torch.zeros(len(labels)), requires_grad=False)
            tensors.append(graph.create_node("get_attr", name, name="p_" + name.replace(".", "_")))
        target = slice if op_of(node) == "slice" else split
        args = (env[node.args[0]], tensors, entry.axis)
        env[node] = graph.create_node("call_function", target, args, name=node.name)
    return fx.GraphModule(root, graph).eval()


def _loosen(new: fx.Node, node: fx.Node, followed: Followed) -> None:
    """Write -1 for the size of a view's axis that can be cut. In place."""
    labels = followed.values.get(node)
    if op_of(node) not in _VIEWS or not isinstance(labels, Tensor):
        return
    axis = cut_axis(followed.channels.classes(labels))
    if axis is None:
        return
    first = 2 if op_of(node) == "unflatten" else 1
    sizes: list[Any] = list(new.args[first])  # type: ignore[arg-type]
    inner = axis
    if op_of(node) == "unflatten":
        inner -= int(node.args[1]) % (labels.ndim - len(sizes) + 1)  # type: ignore[arg-type]
    if not 0 <= inner < len(sizes) or sizes[inner] == -1:
        return
    if op_of(node) != "expand" and -1 in sizes:
        place = sizes.index(-1)
        before = prod(labels.shape[: axis - inner + place])
        source = followed.values[node.args[0]]  # type: ignore[index]
        sizes[place] = _product_of(new, source.shape, before, labels.shape[axis - inner + place])
    sizes[inner] = -1
    new.args = (*new.args[:first], sizes, *new.args[first + 1 :])


def _product_of(new: fx.Node, shape: Sequence[int], before: int, size: int) -> Any:
    """The size of an output axis, from the input's axes that it is made of: those between two products of sizes."""
    (source, *_) = new.args
    assert isinstance(source, fx.Node)
    result: Any = None
    with new.graph.inserting_before(new):
        for axis in range(len(shape)):
            reached = prod(shape[:axis])
            if before <= reached < before * size and shape[axis] > 1:
                own = new.graph.call_function(torch.ops.aten.sym_size.int, (source, axis))
                result = own if result is None else new.graph.call_function(operator.mul, (result, own))
    return size if result is None else result
