"""Channels followed through a traced model, operator by operator."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from autocomp.compress.arguments import argument_of, axes_of, picked_axes
from autocomp.compress.channels import Channels, cut_axis, varying
from autocomp.compress.naming import op_of
from autocomp.compress.shapes import Shapes

__all__ = ["Followed", "follow"]

# Operators that only move, pick or repeat elements: they do the same to labels.
_MOVING = frozenset(
    {"view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "mT", "movedim", "squeeze", "unsqueeze"}
    | {"expand", "expand_as", "repeat", "stack", "slice", "split", "split_with_sizes", "chunk", "unbind"}
    | {"pixel_shuffle", "pixel_unshuffle", "channel_shuffle"}
)
# They name positions on an axis, which must then not be cut.
_PICKING = frozenset({"select", "roll", "flip", "index_select", "narrow", "index"})
# Each element of the output depends on the elements at its place in the inputs.
_ELEMENTWISE = frozenset(
    {"relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "silu", "gelu", "hardswish", "hardsigmoid"}
    | {"sigmoid", "tanh", "leaky_relu", "elu", "celu", "selu", "mish", "softplus", "softsign", "log_sigmoid", "erf"}
    | {"exp", "log", "sqrt", "rsqrt", "abs", "neg", "sin", "cos", "square", "pow", "reciprocal", "sign", "round"}
    | {"add", "sub", "rsub", "mul", "div", "maximum", "minimum", "where", "masked_fill", "addcmul", "lerp"}
    | {"to", "_to_copy", "type_as", "threshold", "hardshrink", "softshrink", "floor", "ceil"}
    | {"eq", "ne", "lt", "gt", "le", "ge", "logical_not"}
)
# Over that many of the last axes.
_POOLING: Mapping[str, int] = {
    **{f"{kind}_pool{rank}d": rank for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for rank in (1, 2, 3)},
    **dict.fromkeys(("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"), 2),
}
_REDUCING = frozenset({"mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm", "logsumexp"})
_ALONG = frozenset({"softmax", "log_softmax", "cumsum"})  # one axis, which stays


@dataclass
class Followed:
    """What following a model's channels told.

    Attributes:
        channels: labels and their classes.
        axes: (parameter, axis) of layers and norms -> labels along it, in topological order.
        free: name of any other parameter that channels meet -> its labels.
        values: node -> labels of its value, a list for operators that give several; None where all is 0.
        fixed: (labels, axis, reason): axes on which an operator names positions.
    """

    channels: Channels = field(default_factory=Channels)
    axes: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    free: dict[str, Tensor] = field(default_factory=dict)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    fixed: list[tuple[Tensor, int, str]] = field(default_factory=list)


def follow(module: fx.GraphModule, example: Tensor, layers: Mapping[str, str], shared: frozenset[str]) -> Followed:
    """Follow the channels that a model's layers write.

    Args:
        module: traced.
        example: (n, ...), n at least 2.
        layers: node name -> layer name.
        shared: names of layers whose weight several operators read; their channels stay.
    """
    follower = _Follower(module, layers, shared)
    with torch.no_grad():
        follower.run(example.to("meta"))
    _cut(follower.followed)
    return follower.followed


def _cut(followed: Followed) -> None:
    """Unite what cannot be taken out of a value alone: along one axis, and not one whose positions are named."""
    channels = followed.channels
    found = [*followed.values.values(), *followed.free.values()]
    several = [part for entry in found for part in (entry if isinstance(entry, list) else [entry]) if part is not None]
    before = None
    while before != channels.count():
        before = channels.count()
        several = [labels for labels in map(channels.classes, several) if len(varying(labels)) > 1]
        for labels in several:
            labels = channels.classes(labels)
            axis = cut_axis(labels)
            for other in varying(labels):
                if other != axis:
                    labels = channels.mix(labels, other, "its channels are mixed with others in a reshaped value")
        for labels, axis, reason in followed.fixed:
            labels = channels.classes(labels)
            if axis in varying(labels):
                channels.pin(labels, reason)


@dataclass(frozen=True)
class _Operand:
    """A tensor that an operator reads: its labels, None where all are 0, and its shape."""

    labels: Tensor | None
    shape: tuple[int, ...]


class _Follower(Shapes):
    """Runs a model on an example without values and keeps labels beside their shapes."""

    def __init__(self, module: fx.GraphModule, layers: Mapping[str, str], shared: frozenset[str]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.followed = Followed()
        self._channels = self.followed.channels
        self._layers = layers
        self._shared = shared

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if node.op == "call_function":
            self.followed.values[node] = self._behind(node, value)
        elif node.op == "output":
            for entry in node.all_input_nodes:
                self._pin([self._operand(entry)], "")
        return value

    def _operand(self, node: fx.Node) -> _Operand:
        """What is known of a node's value; a parameter that no layer owns gets labels when it is first read."""
        value = self.env[node]
        name = str(node.target)
        if node.op == "get_attr" and value.is_floating_point() and value.numel() > 1 and "constants." not in name:
            if name not in self.followed.free:
                self.followed.free[name] = self._channels.fresh(value.numel()).reshape(value.shape)
            return _Operand(self.followed.free[name], tuple(value.shape))
        labels = self.followed.values.get(node)
        return _Operand(None if labels is None else self._channels.classes(labels), tuple(value.shape))

    def _tensors(self, node: fx.Node) -> list[fx.Node]:
        return [entry for entry in node.all_input_nodes if isinstance(self.env[entry], Tensor)]

    def _pin(self, operands: Sequence[_Operand], reason: str) -> None:
        for operand in operands:
            if operand.labels is not None:
                self._channels.pin(operand.labels, reason)

    def _behind(self, node: fx.Node, value: Any) -> Any:
        """Labels of a node's value."""
        op = op_of(node).rstrip("_")
        if op == "getitem":
            labels = self.followed.values.get(node.args[0])  # type: ignore[arg-type]
            return None if labels is None else labels[node.args[1]]
        if node.name in self._layers:
            return self._layer(node, value)
        operands = [self._operand(entry) for entry in self._tensors(node)]
        if all(operand.labels is None for operand in operands):
            return None
        labels = self._known(op, node, value, operands)
        if labels is None:
            return None
        if isinstance(labels, tuple | list):
            return [self._channels.classes(part) for part in labels]
        return self._channels.classes(labels.expand(value.shape))

    def _known(self, op: str, node: fx.Node, value: Any, operands: list[_Operand]) -> Any:
        first, mixed = operands[0], _mixed_by(op)
        if op in _ELEMENTWISE:
            return self._joined(operands, op)
        if op in _MOVING:
            if op == "slice" and argument_of(node, "step") not in (None, 1):
                self._fix(first, [argument_of(node, "dim")], f"its channels are picked by {op}")
            return self._moved(node)
        if op in _PICKING:
            self._fix(first, picked_axes(node), f"its channels are picked by {op}")
            return self._moved(node)
        if op == "cat":
            return self._concatenated(node, value)
        if op in ("pad", "constant_pad_nd") and first.labels is not None:
            return self._padded(node, first.labels, value)
        if op in _POOLING and isinstance(value, Tensor) and first.labels is not None:
            return self._mixed(first.labels, range(-_POOLING[op], 0), mixed)
        if op in _REDUCING and first.labels is not None:
            axes = axes_of(argument_of(node, "dim"), len(first.shape))
            labels = self._mixed(first.labels, axes, mixed)
            return labels if value.ndim == labels.ndim else labels.squeeze(tuple(axes))
        if op in _ALONG and first.labels is not None:
            return self._mixed(first.labels, [argument_of(node, "dim")], mixed)
        if op == "batch_norm":
            return self._batch_norm(node, operands)
        if op in ("layer_norm", "rms_norm") and first.labels is not None:
            self._pin(operands[1:], mixed)
            return self._mixed(first.labels, range(-len(argument_of(node, "normalized_shape")), 0), mixed)
        if op in ("matmul", "bmm") and min(len(operand.shape) for operand in operands) > 1 and len(operands) == 2:
            return self._product(first, operands[1], op).labels
        if op == "scaled_dot_product_attention":
            return self._attention(node, op)
        self._pin(operands, f"its channels cannot be followed through {op}")
        return None

    def _layer(self, node: fx.Node, value: Tensor) -> Tensor:
        """Labels of what a layer writes: its own, in a grouped convolution tied to the group's inputs."""
        name, channels = self._layers[node.name], self._channels
        operand = self._operand(node.args[0])  # type: ignore[arg-type]
        weight, conv = self.env[node.args[1]], op_of(node) != "linear"  # type: ignore[index]
        if (f"{name}.weight", 0) not in self.followed.axes:
            written = channels.fresh(weight.shape[0])
            self.followed.axes[f"{name}.weight", 0] = self.followed.axes[f"{name}.bias", 0] = written
        written = self.followed.axes[f"{name}.weight", 0]
        if name in self._shared:
            self._channels.pin(written, "its weight is shared")
            self._pin([operand], f"the weight of {name} is shared")
        axis = 1 if conv else value.ndim - 1
        read = None
        if operand.labels is not None:
            across = varying(operand.labels)
            if not conv and across and axis not in across:  # a map over another axis than that of the channels
                channels.pin(written, "it reads channels along another axis")
                return operand.labels.narrow(-1, 0, 1).expand(value.shape)
            read = self._vector(operand.labels, axis, name)
        groups = int(node.args[6]) if conv else 1  # type: ignore[arg-type]
        if groups == 1:
            if read is not None:
                self._read(f"{name}.weight", 1, read)
        elif read is None:
            channels.pin(written, "it is a grouped convolution of what is always there")
        else:
            tie = f"its channels are tied to each other by {name}, a grouped convolution"
            inside = channels.mix(read.reshape(groups, -1), 1, tie, tie=True)
            channels.unite(inside, channels.mix(written.reshape(groups, -1), 1, tie, tie=True))
        shape = [1] * value.ndim
        shape[axis] = -1
        return channels.classes(written.reshape(shape).expand(value.shape))

    def _read(self, parameter: str, axis: int, labels: Tensor) -> None:
        known = self.followed.axes.setdefault((parameter, axis), labels)
        self._channels.unite(known, labels)

    def _vector(self, labels: Tensor, axis: int, reader: str) -> Tensor:
        """Labels along one axis, those at one place of it united."""
        others = [other for other in range(labels.ndim) if other != axis]
        labels = self._mixed(labels, others, f"its channels are tied to each other by {reader}", tie=True)
        return labels.reshape(-1)

    def _mixed(self, labels: Tensor, axes: Sequence[int], reason: str, tie: bool = False) -> Tensor:
        for axis in axes:
            labels = self._channels.mix(labels, axis, reason, tie)
        return labels

    def _joined(self, operands: Sequence[_Operand], op: str) -> Tensor | None:
        """Labels behind an operator on elements at the same place, of operands that broadcast."""
        result = operands[0]
        for operand in operands[1:]:
            result = self._pair(result, operand, op)
        return result.labels

    def _pair(self, first: _Operand, second: _Operand, op: str) -> _Operand:
        shape = tuple(np.broadcast_shapes(first.shape, second.shape))
        sides = [_aligned(one, len(shape)) for one in (first, second)]
        own = [set() if one.labels is None else set(varying(one.labels)) for one in sides]
        for index, (one, axes) in enumerate(zip(sides, own, strict=True)):
            other = sides[1 - index]
            if own[0] & own[1] or all(other.shape[axis] == 1 for axis in axes) or one.labels is None:
                continue
            if other.labels is not None and not own[1 - index]:  # one class fills what this side would be cut on
                self._channels.unite(one.labels, other.labels)
            else:
                self._pin([one], f"its channels meet others that stay in {op}")
        if own[0] & own[1]:
            self._channels.unite(*(one.labels for one in sides if one.labels is not None))
        elif own[0] and own[1]:
            self._pin([sides[1]], f"its channels meet others along another axis in {op}")
        labels = sides[0].labels if own[0] or sides[1].labels is None else sides[1].labels
        return _Operand(None if labels is None else self._channels.classes(labels.expand(shape)), shape)

    def _moved(self, node: fx.Node) -> Any:
        """Labels moved by the operator itself."""

        def labels_of(entry: fx.Node) -> Any:
            value = self.env[entry]
            if not isinstance(value, Tensor):
                return value
            if not (value.is_floating_point() or value.is_complex()):
                return super(_Follower, self).fetch_attr(str(entry.target)) if entry.op == "get_attr" else value
            return self._expanded(self._operand(entry)).contiguous() if viewed else self._expanded(self._operand(entry))

        viewed = op_of(node) in ("view", "unflatten", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
        args, kwargs = fx.map_arg((node.args, node.kwargs), labels_of)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _expanded(self, operand: _Operand) -> Tensor:
        labels = torch.zeros((), dtype=torch.int64) if operand.labels is None else operand.labels
        return labels.expand(operand.shape)

    def _concatenated(self, node: fx.Node, value: Tensor) -> Tensor:
        """Labels of a concatenation, made of one entry on every axis on which none vary, cut along one axis at once:
        what is done to a class token is done to the tokens beside it."""
        axis = int(argument_of(node, "dim") or 0) % value.ndim
        parts = [self._expanded(self._operand(entry)) for entry in node.args[0]]  # type: ignore[union-attr, arg-type]
        needed = {axis}.union(*(varying(part) for part in parts))
        for other in set(range(value.ndim)) - needed:
            parts = [part.narrow(other, 0, 1) for part in parts]
        labels = self._channels.classes(torch.cat(parts, axis))
        best = cut_axis(labels)
        others = [other for other in varying(labels) if other != best]
        return self._mixed(labels, others, "its channels are tied to each other by cat", tie=True)

    def _padded(self, node: fx.Node, labels: Tensor, value: Tensor) -> Tensor:
        """Labels behind a padding: 0 for what is added on an axis on which they vary, unless it repeats values."""
        sides = list(argument_of(node, "pad"))
        for back in range(len(sides) // 2):
            axis = labels.ndim - 1 - back
            if axis not in varying(labels):
                labels = labels.narrow(axis, 0, 1)
                sides[2 * back : 2 * back + 2] = 0, 0
        if any(sides) and argument_of(node, "mode") not in (None, "constant"):
            self._channels.pin(labels, "its channels are padded with copies of others")
        return torch.constant_pad_nd(labels, sides, 0).expand(value.shape)

    def _batch_norm(self, node: fx.Node, operands: list[_Operand]) -> Tensor | None:
        first, rest = operands[0], operands[1:]
        if first.labels is None:
            self._pin(rest, "its channels meet others that stay in batch_norm")
            return None
        vector = self._vector(first.labels, 1, "batch_norm")
        for entry in node.args[1:5]:
            if isinstance(entry, fx.Node):
                self.followed.free.pop(str(entry.target), None)
                self._read(str(entry.target), 0, vector)
        return first.labels

    def _product(self, first: _Operand, second: _Operand, op: str) -> _Operand:
        """Labels of a matrix product: what is summed over stands or falls together."""
        reason = _mixed_by(op)
        left, right = self._contracted(first, -1, reason), self._contracted(second, -2, reason)
        if first.labels is not None and second.labels is not None:
            self._together(first, second)
        return self._pair(left, right, op)

    def _together(self, first: _Operand, second: _Operand) -> None:
        """Unite the two sides of a sum over products."""
        one, other = first.labels, second.labels
        assert one is not None and other is not None
        if one.ndim - 1 in varying(one) or other.ndim - 2 in varying(other):
            self._channels.unite(one.narrow(-2, 0, 1).squeeze(-2), other.narrow(-1, 0, 1).squeeze(-1))

    def _contracted(self, operand: _Operand, axis: int, reason: str) -> _Operand:
        shape = list(operand.shape)
        shape[axis] = 1
        if operand.labels is None:
            return _Operand(None, tuple(shape))
        return _Operand(self._channels.mix(operand.labels, axis, reason), tuple(shape))

    def _attention(self, node: fx.Node, op: str) -> Tensor | None:
        query, key, value = (self._operand(entry) for entry in node.args[:3])  # type: ignore[arg-type]
        turned = _Operand(
            None if key.labels is None else key.labels.mT, (*key.shape[:-2], key.shape[-1], key.shape[-2])
        )
        scores = self._product(query, turned, op)
        scores = _Operand(scores.labels, (*query.shape[:-1], key.shape[-2]))
        mask = argument_of(node, "attn_mask")
        if isinstance(mask, fx.Node):
            scores = self._pair(scores, self._operand(mask), op)
        if scores.labels is not None:
            scores = _Operand(self._channels.classes(scores.labels.expand(scores.shape)), scores.shape)
        return self._product(scores, value, op).labels

    def _fix(self, operand: _Operand, axes: Sequence[int], reason: str) -> None:
        if operand.labels is not None:
            self.followed.fixed.extend((operand.labels, axis % operand.labels.ndim, reason) for axis in axes)


def _mixed_by(op: str) -> str:
    return f"its channels are mixed by {op}"


def _aligned(operand: _Operand, rank: int) -> _Operand:
    """An operand with leading axes of size 1, as broadcasting gives it."""
    shape = (1,) * (rank - len(operand.shape)) + operand.shape
    return _Operand(None if operand.labels is None else operand.labels.expand(shape), shape)
