"""Operators with sizes of channels, written so that an ONNX file can be edited for other numbers of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from autocomp.compress.naming import op_of, value_of
from autocomp.compress.sizes import slice, split
from autocomp.graph import LayerGraph

__all__ = ["write_products", "write_sizes"]


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


def write_sizes(module: fx.GraphModule) -> None:
    """Put ONNX operators in place of views that infer a size and of splits by lengths of tensors. In place.

    An exporter computes such sizes and writes them as constants. A Reshape keeps its -1 and copies the batch (0);
    what is split by tensors carries their names as metadata ``pieces``, for the sizes to be renewed by.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if node.target in (split, slice):
            pieces = " ".join(str(piece.target) for piece in node.args[1])
            target: Any = _split if node.target is split else _slice
            _replace(module, node, target, (*node.args, pieces))
        elif op_of(node) in ("reshape", "unflatten") and -1 in (sizes := _sizes_of(node)) and _from_batch(sizes):
            constant = [0 if isinstance(size, fx.Node) else size for size in sizes]
            _replace(module, node, _reshape, (node.args[0], constant))
    module.recompile()


def _replace(module: fx.GraphModule, node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    with module.graph.inserting_before(node):
        new = module.graph.call_function(target, args)
    node.replace_all_uses_with(new)
    module.graph.erase_node(node)


def _sizes_of(node: fx.Node) -> list[Any]:
    sizes: Any = node.args[1] if op_of(node) == "reshape" else []
    return list(sizes)


def _from_batch(sizes: Sequence[Any]) -> bool:
    """Whether the first size is that of the batch and all others are numbers."""
    first, *rest = sizes
    batch = isinstance(first, fx.Node) and op_of(first) in ("sym_size", "sym_size_int") and first.args[1] == 0
    return bool(batch) and all(isinstance(size, int) for size in rest)


def _reshape(value: Tensor, sizes: Sequence[int]) -> Tensor:
    shape = value.reshape(value.shape[0], *sizes[1:]).shape
    return torch.onnx.ops.symbolic("Reshape", (value, torch.tensor(sizes)), dtype=value.dtype, shape=shape)


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
