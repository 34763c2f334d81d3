"""From a module to a flat ATen graph: exported, in-place operators made pure, batch norms folded into their layers."""

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from autocomp.compress.affine import CONVOLUTIONS, Affine, Norm
from autocomp.compress.arrays import as_rows
from autocomp.compress.batch_first import batch_first, sample_shape
from autocomp.compress.draft import Draft, is_known
from autocomp.compress.einsum import Side, matrix_product
from autocomp.compress.exporting import export, unused
from autocomp.compress.naming import op_of, value_of
from autocomp.errors import ModelError
from autocomp.rows import Inputs

__all__ = ["Lowered", "lower"]

# Operators that hand their first input on unchanged once a model is in eval mode and its graph is pure.
_IDENTITIES = frozenset(
    {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
    | {"clone", "contiguous", "alias", "detach", "lift_fresh", "lift_fresh_copy"}
)
_FLATTENING = frozenset({"view", "reshape", "_unsafe_view", "flatten"})
# Operators that make a tensor of nothing: with plain sizes their result is a constant.
_CREATING = frozenset(
    {"new_zeros", "new_ones", "new_full", "new_empty", "zeros", "ones", "full", "empty", "arange", "eye", "linspace"}
)


@dataclass(frozen=True)
class Lowered:
    """A flat model: one placeholder, of images or rows, parameters by name, one output.

    Attributes:
        module: runs it. A node's name is the name of its value; the last one is called ``logits``.
        shapes: value -> sizes of one sample's part, () for operators that give several tensors.
        layers: node name -> layer name, for convolutions and linear operators with plain parameters.
        norms: layer name -> the batch norm folded into it.
        opaque: parameter or node name -> why it is no layer.
        unused: modules and parameters that forward() does not use.
    """

    module: fx.GraphModule
    shapes: Mapping[str, tuple[int, ...]]
    layers: Mapping[str, str]
    norms: Mapping[str, Norm]
    opaque: Mapping[str, str]
    unused: tuple[str, ...] = ()


def lower(model: nn.Module, example: Tensor | Mapping[str, Tensor], expected: Tensor) -> Lowered:
    """Export an eval-mode model and flatten it.

    Args:
        model: is not changed, but must be the caller's own copy in eval mode.
        example: (n, ...) with n at least 2; the batch axis of the result is dynamic. The result reads several inputs,
            by name, as rows.
        expected: what the model gives on the example.

    Raises:
        ModelError: the model does not export, or the flat graph computes something else.
    """
    exported = export(model, example)
    inputs = {} if isinstance(example, Tensor) else {name: tuple(value.shape[1:]) for name, value in example.items()}
    left_out = unused(model, exported)
    own = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    lowered = replace(_Lowering(Draft(exported, frozenset(own))).run(inputs), unused=left_out)
    with torch.no_grad():
        found = lowered.module(as_rows(example))
    tolerance = 1e-3 * max(float(expected.abs().max()), 1e-6)
    if found.shape != expected.shape or not float((found - expected).abs().max()) <= tolerance:
        raise ModelError(
            "the exported model computes something else than the model: use no randomness in forward() and write no "
            "values in place into slices of a tensor"
        )
    return lowered


class _Lowering:
    """Writes an exported graph again, node by node."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._affine = Affine(draft)

    def run(self, inputs: Inputs) -> Lowered:
        """Args: inputs: of a row; empty where the model has one input."""
        draft, nodes = self._draft, list(self._draft.source.graph.nodes)
        source = draft.open([node for node in nodes if node.op == "placeholder"], inputs)
        for node in nodes:
            if node.op == "get_attr":
                draft.read(node)
            elif node.op == "output":
                draft.graph.output(draft.mapped(_single(node.args[0])))
            elif node.op != "placeholder" and "_assert" not in op_of(node):
                draft.values[node] = self._operator(node)
        batch_first(draft.graph, source)
        draft.graph.output_node().args[0]._rename("logits")  # type: ignore[union-attr]
        batch = source.meta["val"].shape[0]
        live = [node for node in draft.graph.nodes if node.op in ("placeholder", "call_function")]
        values = [(node, node.meta.pop("val", ())) for node in live]
        return Lowered(
            draft.module(),
            {
                value_of(node): sample_shape(value, batch) if isinstance(value, Tensor) else ()
                for node, value in values
                if isinstance(value, Tensor | tuple | list)
            },
            {node.name: name for node, name in self._affine.layers.items() if node in live},
            self._affine.norms,
            self._affine.opaque,
        )

    def _operator(self, node: fx.Node) -> Any:
        draft, op = self._draft, op_of(node)
        base = op.rstrip("_")
        if (constant := self._constant(node, op)) is not None:
            return constant
        if base in _IDENTITIES or (op == "slice" and _takes_all(node)):
            return draft.mapped(node.args[0])
        if op in CONVOLUTIONS:
            return self._affine.convolution(node)
        if op == "linear":
            return self._affine.linear(node)
        if op == "batch_norm" and (layer := self._affine.foldable(node)) is not None:
            return self._affine.fold(node, layer)
        if base in _FLATTENING and _flattens(node):
            flat = torch.ops.aten.flatten.using_ints
            return draft.create(node, flat, (draft.mapped(node.args[0]), 1), {}, "flatten")
        if op in ("view", "_unsafe_view"):  # the copies that made its input contiguous are left out
            sizes = fx.map_arg(node.args[1], draft.mapped)
            return draft.create(node, torch.ops.aten.reshape.default, (draft.mapped(node.args[0]), sizes), {}, op)
        if op == "pixel_unshuffle" and node.meta["val"].ndim == 4:
            return self._unshuffled(node)
        if op == "einsum" and (sides := matrix_product(str(node.args[0]))) is not None:
            return self._product(node, sides)
        args, kwargs = fx.map_arg((node.args, node.kwargs), draft.mapped)
        written = args[0] if op != base else None
        if base == "silu":  # engines know its two parts, in int8 as well
            gate = draft.create(node, torch.ops.aten.sigmoid.default, args, {}, "sigmoid")
            new = draft.create(node, torch.ops.aten.mul.Tensor, (args[0], gate), {}, "mul")
        elif written is None or not isinstance(node.target, torch._ops.OpOverload):
            return draft.create(node, node.target, args, kwargs, op)
        else:
            pure = getattr(getattr(torch.ops.aten, base), node.target._overloadname)
            new = draft.create(node, pure, args, kwargs, base)
        for old, value in draft.values.items():  # later readers of the overwritten tensor read the new value
            if written is not None and value is written:
                draft.values[old] = new
        return new

    def _product(self, node: fx.Node, sides: Sequence[Side]) -> fx.Node:
        """A sum over products as a product of matrices, whose channels can be followed."""
        operands: Any = node.args[1]
        read = []
        for side in sides:
            value = self._draft.mapped(operands[side.operand])
            if side.turned:
                turned = self._draft.graph.call_function(torch.ops.aten.transpose.int, (value, -2, -1))
                turned.meta["val"] = operands[side.operand].meta["val"].mT
                value = turned
            read.append(value)
        return self._draft.create(node, torch.ops.aten.matmul.default, tuple(read), {}, "matmul")

    def _unshuffled(self, node: fx.Node) -> fx.Node:
        """Blocks of positions turned into channels in steps, whose sizes can follow those of a pruned value."""
        draft, aten = self._draft, torch.ops.aten
        source, block = node.args[0], int(node.args[1])  # type: ignore[arg-type]
        value = source.meta["val"]  # type: ignore[union-attr]
        _, channels, height, width = value.shape
        parts = (channels, height // block, block, width // block, block)
        split = draft.graph.call_function(aten.reshape.default, (draft.mapped(source), [-1, *parts]))
        split.meta["val"] = value.reshape(value.shape[0], *parts)
        turned = draft.graph.call_function(aten.permute.default, (split, [0, 1, 3, 5, 2, 4]))
        turned.meta["val"] = split.meta["val"].permute(0, 1, 3, 5, 2, 4)
        sizes = [-1, channels * block**2, height // block, width // block]
        return draft.create(node, aten.reshape.default, (turned, sizes), {}, "reshape")

    def _constant(self, node: fx.Node, op: str) -> Any:
        """The value of an operator that reads nothing but sizes, parameters and such values, else None.

        It is computed at once. So what is written in place into parts of such a tensor (an attention mask's windows,
        say) is in it when the first other operator reads it, and a weight that is computed from parameters is one.
        """
        draft = self._draft
        if not (isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem):
            return None
        read = [entry for entry in node.all_input_nodes if not (op.startswith("new_") and entry is node.args[0])]
        if not all(is_known(draft.values[entry]) for entry in read) or not (read or op in _CREATING):
            return None
        own = node.args[1:] if op.startswith("new_") else node.args
        args, kwargs = fx.map_arg((own, node.kwargs), draft.values.__getitem__)
        if op.startswith("new_"):
            args = (torch.empty(0, dtype=node.meta["val"].dtype), *args)
        target: Any = node.target
        with torch.no_grad():
            value = target(*args, **{name: value for name, value in kwargs.items() if name != "device"})
        sources = [entry for entry in read if entry in draft.names]
        if sources:
            first = draft.values[sources[0]]
            same = isinstance(value, Tensor) and isinstance(first, Tensor) and value.is_set_to(first)
            draft.names[node] = draft.names[sources[0]] if same else f"computed.{node.name}"
        return value


def _flattens(node: fx.Node) -> bool:
    """Whether a view makes (n, features) of a whole sample: written as flatten it does not fix the features."""
    source, value = node.args[0], node.meta.get("val")
    if not isinstance(source, fx.Node) or not isinstance(value, Tensor) or value.ndim != 2:
        return False
    before = source.meta["val"].shape
    return len(before) >= 2 and not isinstance(value.shape[0], int) and value.shape[0] == before[0]


def _takes_all(node: fx.Node) -> bool:
    """Whether a slice picks its whole axis, as ``x[:, 1:]`` does on its first one."""
    given: tuple[Any, ...] = node.args
    missing: tuple[Any, ...] = (None, 0, None, None, 1)
    source, axis, start, end, step = given + missing[len(given) :]
    size = source.meta["val"].shape[axis]
    reaches = end is None or (isinstance(end, int) and end >= (size if isinstance(size, int) else 2**62))
    return start in (None, 0) and step == 1 and reaches


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, tuple | list):
        for entry in tree:
            yield from _leaves(entry)
    else:
        yield tree


def _single(tree: Any) -> Any:
    leaves = list(_leaves(tree))
    if len(leaves) != 1:
        raise ModelError(f"the model returns {len(leaves)} tensors: return the logits only, one tensor (n, classes)")
    return leaves[0]
