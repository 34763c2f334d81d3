"""Operators with sizes of channels, written so that an ONNX file can be edited for other numbers of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, fx

from autocomp.compress.arguments import argument_of
from autocomp.compress.naming import op_of, value_of
from autocomp.compress.shapes import Shapes
from autocomp.compress.sizes import slice, split
from autocomp.graph import LayerGraph

__all__ = ["renew_sizes", "write_products", "write_sizes"]

_BROADCASTING = frozenset({"add", "sub", "mul", "div"})
BATCHES = (3, 5)  # of the shapes that tell which sizes follow the batch


def write_products(module: fx.GraphModule, graph: LayerGraph) -> None:
    """Put MatMul and Add in place of linear layers over several axes, their weights stored as (in, out). In place.

    An exporter would write a transposed weight as a tensor of another name.
    """
    for name in [layer.weight for layer in graph.layers if layer.op == "linear"]:
        (weight,) = [node for node in module.graph.nodes if node.target == name] or [None]
        if weight is None or not all(_is_wide(user, weight, graph) for user in weight.users):
            continue
        tensor = module.get_parameter(name)
        tensor.data = tensor.data.T.contiguous()
        for user in list(weight.users):
            value, _, bias = user.args
            with module.graph.inserting_before(user):
                product = module.graph.call_function(torch.ops.aten.matmul.default, (value, weight))
                result = module.graph.call_function(torch.ops.aten.add.Tensor, (product, bias))
            user.replace_all_uses_with(result)
            module.graph.erase_node(user)
    module.recompile()


def _is_wide(node: fx.Node, weight: fx.Node, graph: LayerGraph) -> bool:
    return op_of(node) == "linear" and node.args[1] is weight and len(graph.node_by_name[value_of(node)].shape) > 1


def write_sizes(module: fx.GraphModule, graph: LayerGraph) -> None:
    """Put ONNX operators in place of views that infer a size and of splits by lengths of tensors. In place.

    An exporter computes such sizes and writes them as constants. A Reshape keeps its -1 and copies axes in their place
    (0) from what it reads. Where that does not say it all, it carries metadata ``sizes`` for `renew_sizes`; what is
    split by tensors carries their names as metadata ``pieces``, for the sizes to be renewed by a policy.
    """
    runs = [_Known(module), _Known(module)]
    with torch.no_grad():
        for shapes, batch in zip(runs, BATCHES, strict=True):
            shapes.run(torch.empty(batch, *graph.input_shape, device="meta"))
    for node in list(module.graph.nodes):
        if node.target in (split, slice):
            pieces = " ".join(str(piece.target) for piece in node.args[1])
            target: Any = _split if node.target is split else _slice
            _replace(module, node, target, (*node.args, pieces))
        elif op_of(node) in ("expand", "expand_as") and _is_spread_anyway(node, runs[0].found):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        elif op_of(node) == "flatten" and (start := _flattened_from(node, runs[0].found)) > 1:
            _replace(module, node, _reshape, (node.args[0], [*[0] * start, -1], ""))
        elif (cut := _inferred(node, runs[0].found)) is not None:
            before, after = ([shapes.found[entry] for shapes in runs] for entry in (node.args[0], node))
            if written := _sizes(before, after, cut):
                _replace(module, node, _reshape, (node.args[0], *written))
    module.recompile()


def renew_sizes(model: onnx.ModelProto) -> None:
    """Compute the sizes of Reshapes that carry metadata ``sizes`` while the model runs. In place.

    The metadata holds a word for each size: a number, ``n`` for the batch's, ``=k`` for the last k of what is read.
    """
    nodes, images = list(model.graph.node), model.graph.input[0].name
    del model.graph.node[:]
    for node in nodes:
        words: list[str] = next((entry.value.split() for entry in node.metadata_props if entry.key == "sizes"), [])
        parts = []
        for index, word in enumerate(words):
            name = f"{node.output[0]}_size_{index}"
            parts.append(name)
            if word == "n":
                model.graph.node.append(helper.make_node("Shape", [images], [name], name, start=0, end=1))
            elif word.startswith("="):
                start = -int(word[1:])
                model.graph.node.append(helper.make_node("Shape", [node.input[0]], [name], name, start=start))
            else:
                model.graph.initializer.append(numpy_helper.from_array(np.array([int(word)]), name))
        if parts:
            node.input[1] = f"{node.output[0]}_sizes"
            model.graph.node.append(helper.make_node("Concat", parts, [node.input[1]], node.input[1], axis=0))
        model.graph.node.append(node)


class _Known(Shapes):
    """Runs a module without values and keeps their shapes, and the numbers between them."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, Any] = {}

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        self.found[node] = tuple(value.shape) if isinstance(value, Tensor) else value
        return value


def _is_spread_anyway(node: fx.Node, shapes: Mapping[fx.Node, Any]) -> bool:
    """Whether all that read an expanded value would expand it themselves."""

    def spreads(user: fx.Node) -> bool:
        others = [entry for entry in user.all_input_nodes if entry is not node]
        return op_of(user) in _BROADCASTING and any(shapes[entry] == shapes[node] for entry in others)

    return all(map(spreads, node.users))


def _flattened_from(node: fx.Node, shapes: Mapping[fx.Node, Any]) -> int:
    """The axis from which all to the last are joined; 0 where some behind them stay."""
    start, end = (argument_of(node, name) for name in ("start_dim", "end_dim"))
    rank = len(shapes[node.all_input_nodes[0]])
    return int(start) % rank if end % rank == rank - 1 else 0


def _inferred(node: fx.Node, shapes: Mapping[fx.Node, Any]) -> int | None:
    """The axis whose size a view infers, None where it is none."""
    arguments: tuple[Any, ...] = node.args
    if op_of(node) == "reshape" and -1 in arguments[1]:
        return int(arguments[1].index(-1))
    if op_of(node) == "unflatten" and -1 in arguments[2]:
        return int(arguments[1] % len(shapes[arguments[0]]) + arguments[2].index(-1))
    return None


def _sizes(
    before: Sequence[tuple[int, ...]], after: Sequence[tuple[int, ...]], cut: int
) -> tuple[list[int], str] | None:
    """Sizes that a Reshape takes while it is exported, and the words of `renew_sizes`, "" where the sizes do.

    Args:
        before, after: shapes of what is read and written, at each of ``BATCHES``.
        cut: the axis to be inferred.
    """
    first, second = after
    varying = [axis for axis, (size, other) in enumerate(zip(first, second, strict=True)) if size != other]
    varying = [axis for axis in varying if axis != cut]
    if all(axis < len(before[0]) and [s[axis] for s in before] == [s[axis] for s in after] for axis in varying):
        return [-1 if axis == cut else 0 if axis in varying else size for axis, size in enumerate(first)], ""
    if len(varying) != 1:
        return None
    (free,) = varying
    sizes = [-1 if axis == free else size for axis, size in enumerate(first)]
    if [shape[free] for shape in after] == list(BATCHES):
        words = ["n" if axis == free else "-1" if axis == cut else str(size) for axis, size in enumerate(first)]
        return sizes, " ".join(words)
    kept = next((n for n, (a, b) in enumerate(zip(before[0][::-1], first[::-1], strict=False)) if a != b), 0)
    lead = len(first) - kept
    return (sizes, " ".join([*map(str, sizes[:lead]), f"={kept}"])) if free < lead <= cut else None


def _replace(module: fx.GraphModule, node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    with module.graph.inserting_before(node):
        new = module.graph.call_function(target, args)
    node.replace_all_uses_with(new)
    module.graph.erase_node(node)


def _reshape(value: Tensor, sizes: Sequence[int], words: str) -> Tensor:
    shape = value.reshape([value.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]).shape
    inputs, metadata = (value, torch.tensor(sizes)), {"sizes": words} if words else None
    return torch.onnx.ops.symbolic("Reshape", inputs, dtype=value.dtype, shape=shape, metadata_props=metadata)


def _split(value: Tensor, pieces: Sequence[Tensor], axis: int, names: str) -> Sequence[Tensor]:
    sizes = [len(piece) for piece in pieces]
    shapes = [part.shape for part in value.split_with_sizes(sizes, axis)]
    return torch.onnx.ops.symbolic_multi_out(
        "Split",
        (value, torch.tensor(sizes)),
        {"axis": axis},
        dtypes=[value.dtype] * len(sizes),
        shapes=shapes,
        metadata_props={"pieces": names},
    )


def _slice(value: Tensor, pieces: Sequence[Tensor], axis: int, names: str) -> Tensor:
    before, own = map(len, pieces)
    inputs = (torch.tensor([before]), torch.tensor([before + own]), torch.tensor([axis]))
    shape = value.narrow(axis, before, own).shape
    return torch.onnx.ops.symbolic(
        "Slice", (value, *inputs), dtype=value.dtype, shape=shape, metadata_props={"pieces": names}
    )
