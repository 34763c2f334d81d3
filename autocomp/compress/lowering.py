"""From a module to a flat ATen graph: exported, in-place operators made pure, batch norms folded into their layers."""

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from autocomp.compress.batch_first import batch_first, sample_shape
from autocomp.compress.exporting import export, unused
from autocomp.compress.naming import op_of, value_of
from autocomp.errors import ModelError

__all__ = ["Lowered", "Norm", "lower"]

_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
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
class Norm:
    """A batch norm that was folded into a layer, in units of the folded layer's output.

    Attributes:
        beta: mean it gives each channel, shape (channels,).
        gamma: magnitude of the deviation it gives each channel, shape (channels,).
        epsilon: what it adds to the variance before the root, shape (channels,).
    """

    beta: Tensor
    gamma: Tensor
    epsilon: Tensor


@dataclass(frozen=True)
class Lowered:
    """A flat model: one placeholder, parameters by name, one output.

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


def lower(model: nn.Module, example: Tensor, expected: Tensor) -> Lowered:
    """Export an eval-mode model and flatten it.

    Args:
        model: is not changed, but must be the caller's own copy in eval mode.
        example: (n, ...) with n at least 2; the batch axis of the result is dynamic.
        expected: what the model gives on the example.

    Raises:
        ModelError: the model does not export, or the flat graph computes something else.
    """
    exported = export(model, example)
    left_out = unused(model, exported)
    own = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    lowered = replace(_Rebuild(exported, frozenset(own)).run(), unused=left_out)
    with torch.no_grad():
        found = lowered.module(example)
    tolerance = 1e-3 * max(float(expected.abs().max()), 1e-6)
    if found.shape != expected.shape or not float((found - expected).abs().max()) <= tolerance:
        raise ModelError(
            "the exported model computes something else than the model: use no randomness in forward() and write no "
            "values in place into slices of a tensor"
        )
    return lowered


@dataclass
class _Rebuild:
    """Writes an exported graph again, node by node."""

    source: fx.GraphModule
    own: frozenset[str]  # names of the model's parameters and buffers; other tensors are constants of its code
    graph: fx.Graph = field(default_factory=fx.Graph)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, fx.Node] = field(default_factory=dict)
    names: dict[fx.Node, str] = field(default_factory=dict)  # of known values that come from the model's own tensors
    layers: dict[fx.Node, str] = field(default_factory=dict)
    norms: dict[str, Norm] = field(default_factory=dict)
    opaque: dict[str, str] = field(default_factory=dict)

    def run(self) -> Lowered:
        for node in self.source.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self._valued(self.graph.placeholder("x"), node)
            elif node.op == "get_attr":
                name, tensor = str(node.target), self._attribute(node)
                self.values[node] = tensor if name in self.own else tensor.clone()
                if name in self.own:
                    self.names[node] = name
            elif node.op == "output":
                self.graph.output(self._mapped(_single(node.args[0])))
            elif "_assert" not in op_of(node):
                self.values[node] = self._operator(node)
        source = next(node for node in self.graph.nodes if node.op == "placeholder")
        batch_first(self.graph, source)
        self.graph.output_node().args[0]._rename("logits")  # type: ignore[union-attr]
        batch = source.meta["val"].shape[0]
        live = [node for node in self.graph.nodes if node.op in ("placeholder", "call_function")]
        values = [(node, node.meta.pop("val", ())) for node in live]
        used = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        root = {name: _frozen(tensor) for name, tensor in self.state.items() if name in used}
        module = fx.GraphModule(root, self.graph).eval()
        return Lowered(
            module,
            {
                value_of(node): sample_shape(value, batch) if isinstance(value, Tensor) else ()
                for node, value in values
                if isinstance(value, Tensor | tuple | list)
            },
            {node.name: name for node, name in self.layers.items() if node in live},
            self.norms,
            self.opaque,
        )

    def _operator(self, node: fx.Node) -> Any:
        op = op_of(node)
        base = op.rstrip("_")
        if (constant := self._constant(node, op)) is not None:
            return constant
        if base in _IDENTITIES or (op == "slice" and _takes_all(node)):
            return self._mapped(node.args[0])
        if op in _CONVOLUTIONS:
            return self._convolution(node)
        if op == "linear":
            return self._layer(node, node.target, (), {})
        if op == "batch_norm" and (layer := self._foldable(node)) is not None:
            return self._fold(node, layer)
        if base in _FLATTENING and _flattens(node):
            flat = torch.ops.aten.flatten.using_ints
            return self._create(node, flat, (self._mapped(node.args[0]), 1), {}, "flatten")
        if op in ("view", "_unsafe_view"):  # the copies that made its input contiguous are left out
            sizes = fx.map_arg(node.args[1], self._mapped)
            return self._create(node, torch.ops.aten.reshape.default, (self._mapped(node.args[0]), sizes), {}, op)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._mapped)
        written = args[0] if op != base else None
        if base == "silu":  # engines know its two parts, in int8 as well
            gate = self._create(node, torch.ops.aten.sigmoid.default, args, {}, "sigmoid")
            new = self._create(node, torch.ops.aten.mul.Tensor, (args[0], gate), {}, "mul")
        elif written is None or not isinstance(node.target, torch._ops.OpOverload):
            return self._create(node, node.target, args, kwargs, op)
        else:
            pure = getattr(getattr(torch.ops.aten, base), node.target._overloadname)
            new = self._create(node, pure, args, kwargs, base)
        for old, value in self.values.items():  # later readers of the overwritten tensor read the new value
            if written is not None and value is written:
                self.values[old] = new
        return new

    def _constant(self, node: fx.Node, op: str) -> Any:
        """The value of an operator that reads nothing but sizes, parameters and such values, else None.

        It is computed at once. So what is written in place into parts of such a tensor (an attention mask's windows,
        say) is in it when the first other operator reads it, and a weight that is computed from parameters is one.
        """
        if not (isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem):
            return None
        read = [entry for entry in node.all_input_nodes if not (op.startswith("new_") and entry is node.args[0])]
        if not all(_is_known(self.values[entry]) for entry in read) or not (read or op in _CREATING):
            return None
        own = node.args[1:] if op.startswith("new_") else node.args
        args, kwargs = fx.map_arg((own, node.kwargs), self.values.__getitem__)
        if op.startswith("new_"):
            args = (torch.empty(0, dtype=node.meta["val"].dtype), *args)
        target: Any = node.target
        with torch.no_grad():
            value = target(*args, **{name: value for name, value in kwargs.items() if name != "device"})
        sources = [entry for entry in read if entry in self.names]
        if sources:
            first = self.values[sources[0]]
            same = isinstance(value, Tensor) and isinstance(first, Tensor) and value.is_set_to(first)
            self.names[node] = self.names[sources[0]] if same else f"computed.{node.name}"
        return value

    def _convolution(self, node: fx.Node) -> fx.Node:
        """Write all seven arguments out, spatial ones as lists, padding as numbers."""
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        weight = given["weight"].meta["val"]
        rank = weight.ndim - 2

        def spread(value: Any) -> list[int]:
            return [int(value)] * rank if isinstance(value, int) else [int(v) for v in value] * (rank // len(value))

        stride, dilation = spread(given.get("stride", 1)), spread(given.get("dilation", 1))
        padding = given.get("padding", 0)
        target = getattr(torch.ops.aten, op_of(node)).default
        if isinstance(padding, str):
            total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:], strict=True)]
            if any(entry % 2 for entry in total):  # one side gets more: no plain number says that
                self.opaque[node.name] = "its 'same' padding is uneven"
                args, kwargs = fx.map_arg((node.args, node.kwargs), self._mapped)
                return self._create(node, node.target, args, kwargs, op_of(node))
            padding = [entry // 2 for entry in total]
        return self._layer(node, target, (stride, spread(padding), dilation, given.get("groups", 1)), given)

    def _layer(self, node: fx.Node, target: Any, rest: tuple[Any, ...], given: Mapping[str, Any]) -> fx.Node:
        """A convolution or linear operator; one with plain parameters gets a bias if it has none."""
        named: Any = given or dict(zip(("input", "weight", "bias"), node.args, strict=False)) | dict(node.kwargs)
        weight, bias = named["weight"], named.get("bias")
        name = self._layer_of(node, weight, bias)
        if name and bias is None:
            self._parameter(f"{name}.bias", torch.zeros(weight.meta["val"].shape[0]))
        for part, entry in (("weight", weight), ("bias", bias)) if name else ():
            if self._is_computed(entry):
                self.names[entry] = f"{name}.{part}"
        if not name:
            self.opaque[self.names.get(weight, node.name)] = "its weight or bias is no parameter of its own module"
        mapped = self._mapped(bias) if bias is not None else self.parameters.get(f"{name}.bias")
        new = self._create(
            node, target, (self._mapped(named["input"]), self._mapped(weight), mapped, *rest), {}, op_of(node)
        )
        if name:
            self.layers[new] = name
        return new

    def _layer_of(self, node: fx.Node, weight: fx.Node, bias: fx.Node | None) -> str:
        """The module that weight and bias are parameters of, "" for none.

        Computed ones become parameters of the module of the other one, else of the one that the operator is in.
        """
        own = [
            _module_of(self.names.get(entry, ""), part)
            for part, entry in (("weight", weight), ("bias", bias))
            if entry is not None and not self._is_computed(entry)
        ]
        stack = node.meta.get("nn_module_stack") or {"": ("", None)}
        name = own[0] if own else str([*stack.values()][-1][0])
        other = any(entry != name for entry in own[1:]) and len(weight.users) == 1
        if not name or other or (bias is not None and bias not in self.names):
            return ""
        for part, entry in (("weight", weight), ("bias", bias)):
            known = self.state.get(f"{name}.{part}")
            if entry is None or known is None or not self._is_computed(entry):
                continue
            if not torch.equal(known, self.values[entry]):
                return ""
        return name

    def _is_computed(self, entry: fx.Node) -> bool:
        """Whether a value was computed from the model's own tensors."""
        return entry in self.names and self.names[entry] not in self.own

    def _foldable(self, node: fx.Node) -> fx.Node | None:
        """The layer whose output only this batch norm reads, and whose parameters only that layer reads."""
        source = node.args[0]
        if not isinstance(source, fx.Node) or len(source.users) != 1 or bool(node.args[5]):
            return None
        new, norm = self.values[source], self._norm(node)
        if new not in self.layers or not all(entry is None or _is_known(entry) for entry in norm):
            return None
        plain = op_of(new) in _CONVOLUTIONS or new.meta["val"].ndim == 2
        return new if plain and all(len(entry.users) == 1 for entry in new.args[1:3]) else None

    def _norm(self, node: fx.Node) -> list[Any]:
        """Factor, shift, mean and variance of a batch norm, None where it has none."""
        given: tuple[Any, ...] = node.args[1:5]
        return [None if entry is None else self.values[entry] for entry in given]

    def _fold(self, node: fx.Node, layer: fx.Node) -> fx.Node:
        scale, shift, mean, variance = self._norm(node)
        epsilon = float(node.args[7])  # type: ignore[arg-type]
        name = self.layers[layer]
        weight, bias = self.state[f"{name}.weight"].double(), self.state[f"{name}.bias"].double()
        assert mean is not None and variance is not None  # eval mode
        gamma = torch.ones_like(mean) if scale is None else scale
        beta = torch.zeros_like(mean) if shift is None else shift
        factor = gamma.double() / torch.sqrt(variance.double() + epsilon)
        self.state[f"{name}.weight"] = (weight * factor.reshape(-1, *[1] * (weight.ndim - 1))).float()
        self.state[f"{name}.bias"] = ((bias - mean.double()) * factor + beta.double()).float()
        self.norms[name] = Norm(
            beta.detach().clone(), gamma.detach().abs(), (epsilon * factor.square()).float().detach()
        )
        return layer

    def _parameter(self, name: str, tensor: Tensor) -> fx.Node:
        for part in ("weight", "bias"):
            if owner := _module_of(name, part):
                name = f"{owner}.{part}"
        if name not in self.parameters:
            self.state[name] = tensor.detach()
            self.parameters[name] = self.graph.create_node("get_attr", name, name="p_" + name.replace(".", "_"))
        return self.parameters[name]

    def _attribute(self, node: Any) -> Tensor:
        value: Any = self.source
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if not isinstance(value, Tensor):
            raise ModelError(f"the model has control flow in its graph ({node.target}): write it without torch.cond")
        return value.detach()

    def _mapped(self, node: Any) -> Any:
        value = self.values[node]
        if not isinstance(value, Tensor):
            return value
        name = self.names.get(node)
        return (
            self._parameter(f"constants.{node.name}", value.clone()) if name is None else self._parameter(name, value)
        )

    def _create(self, node: fx.Node, target: Any, args: Any, kwargs: Any, name: str) -> fx.Node:
        return self._valued(self.graph.create_node("call_function", target, args, kwargs, name=name), node)

    def _valued(self, new: fx.Node, node: fx.Node) -> fx.Node:
        if "val" in node.meta:
            new.meta["val"] = node.meta["val"]
        return new


def _module_of(parameter: str, part: str) -> str:
    """The layer whose ``part`` a parameter is, "" for none: an ``in_proj_weight`` belongs to a layer ``in_proj``."""
    path, _, last = parameter.rpartition(".")
    if last == part:
        return path
    if last.endswith(f"_{part}") and path:
        return f"{path}.{last.removesuffix(f'_{part}')}"
    return ""


def _is_known(value: Any) -> bool:
    """Whether a value of the graph that is written is a tensor, or several."""
    return isinstance(value, Tensor) or (isinstance(value, tuple | list) and all(map(_is_known, value)))


def _frozen(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().clone().contiguous()
    return nn.Parameter(tensor, requires_grad=False) if tensor.is_floating_point() else tensor


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
