"""Operators with sizes of channels, written so that an ONNX file can be edited for other numbers of them."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from autocomp.compress.naming import op_of, value_of
from autocomp.compress.sizes import slice, split
from autocomp.graph import LayerGraph

__all__ = ["write_products", "write_sizes"]

BATCH = 3  # of the shapes that sizes are compared by


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

    An exporter computes such sizes and writes them as constants. A Reshape keeps its -1 and copies the first axis (0),
    or copies the last axes from what it reads; what is split by tensors carries their names as metadata ``pieces``,
    for the sizes to be renewed by.
    """
    shapes = _Shapes(module)
    with torch.no_grad():
        shapes.run(torch.empty(BATCH, *graph.input_shape, device="meta"))
    for node in list(module.graph.nodes):
        if node.target in (split, slice):
            pieces = " ".join(str(piece.target) for piece in node.args[1])
            target: Any = _split if node.target is split else _slice
            _replace(module, node, target, (*node.args, pieces))
        elif op_of(node) == "reshape" and -1 in node.args[1]:
            _write_reshape(module, node, shapes.found)
    module.recompile()


class _Shapes(fx.Interpreter):
    """Runs a module without values and keeps their shapes, and the numbers between them."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, Any] = {}

    def fetch_attr(self, target: str) -> Tensor:
        tensor: Tensor = super().fetch_attr(target)
        return tensor.to("meta")

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        self.found[node] = tuple(value.shape) if isinstance(value, Tensor) else value
        return value


def _write_reshape(module: fx.GraphModule, node: fx.Node, shapes: Mapping[fx.Node, Any]) -> None:
    source, sizes = cast("tuple[fx.Node, list[Any]]", node.args)
    before, after = shapes[source], shapes[node]
    computed = [axis for axis, size in enumerate(sizes) if isinstance(size, fx.Node)]
    if computed == [0] and before[0] == after[0]:
        _replace(module, node, _reshape, (source, [0, *sizes[1:]]))
    elif len(computed) == 1:
        kept = next((n for n, (a, b) in enumerate(zip(before[::-1], after[::-1], strict=False)) if a != b), 0)
        lead = [-1 if isinstance(size, fx.Node) else size for size in sizes[: len(sizes) - kept]]
        if lead.count(-1) == 1 and kept:
            _replace(module, node, _reshape_lead, (source, lead, kept))


def _replace(module: fx.GraphModule, node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    with module.graph.inserting_before(node):
        new = module.graph.call_function(target, args)
    node.replace_all_uses_with(new)
    module.graph.erase_node(node)


def _reshape(value: Tensor, sizes: Sequence[int]) -> Tensor:
    shape = value.reshape(value.shape[0], *sizes[1:]).shape
    return torch.onnx.ops.symbolic("Reshape", (value, torch.tensor(sizes)), dtype=value.dtype, shape=shape)


def _reshape_lead(value: Tensor, lead: Sequence[int], kept: int) -> Tensor:
    """A reshape that leaves the last axes as they are."""
    tail = torch.onnx.ops.symbolic("Shape", (value,), {"start": -kept}, dtype=torch.int64, shape=(kept,))
    count = len(lead) + kept
    sizes = torch.onnx.ops.symbolic(
        "Concat", (torch.tensor(lead), tail), {"axis": 0}, dtype=torch.int64, shape=(count,)
    )
    shape = value.reshape(*lead, *value.shape[value.ndim - kept :]).shape
    return torch.onnx.ops.symbolic("Reshape", (value, sizes), dtype=value.dtype, shape=shape)


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
