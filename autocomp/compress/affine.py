"""Convolutions and linear operators as layers: a weight and a bias of their own, batch norms folded in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from autocomp.compress.draft import Draft, is_known, owner_of
from autocomp.compress.naming import op_of

__all__ = ["CONVOLUTIONS", "Affine", "Norm"]

CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})


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


@dataclass
class Affine:
    """Writes layers into a draft.

    Attributes:
        draft: see there.
        layers: node of the new graph -> layer name.
        norms: layer name -> the batch norm folded into it.
        opaque: parameter or node name -> why it is no layer.
    """

    draft: Draft
    layers: dict[fx.Node, str] = field(default_factory=dict)
    norms: dict[str, Norm] = field(default_factory=dict)
    opaque: dict[str, str] = field(default_factory=dict)

    def linear(self, node: fx.Node) -> fx.Node:
        return self._layer(node, node.target, (), dict(zip(("input", "weight", "bias"), node.args, strict=False)))

    def convolution(self, node: fx.Node) -> fx.Node:
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
                args, kwargs = fx.map_arg((node.args, node.kwargs), self.draft.mapped)
                return self.draft.create(node, node.target, args, kwargs, op_of(node))
            padding = [entry // 2 for entry in total]
        return self._layer(node, target, (stride, spread(padding), dilation, given.get("groups", 1)), given)

    def _layer(self, node: fx.Node, target: Any, rest: tuple[Any, ...], given: Mapping[str, Any]) -> fx.Node:
        """A convolution or linear operator; one with plain parameters gets a bias if it has none."""
        draft = self.draft
        named: dict[str, Any] = {**given, **node.kwargs}
        weight, bias = named["weight"], named.get("bias")
        name = self._layer_of(node, weight, bias)
        if name and bias is None:
            draft.parameter(f"{name}.bias", torch.zeros(weight.meta["val"].shape[0]))
        entries: Any = (("weight", weight), ("bias", bias)) if name else ()
        for kind, entry in entries:
            if draft.is_computed(entry):
                draft.names[entry] = f"{name}.{kind}"
        if not name:
            self.opaque[draft.names.get(weight, node.name)] = "its weight or bias is no parameter of its own module"
        mapped = draft.mapped(bias) if bias is not None else draft.parameters.get(f"{name}.bias")
        args = (draft.mapped(named["input"]), draft.mapped(weight), mapped, *rest)
        new = draft.create(node, target, args, {}, op_of(node))
        if name:
            self.layers[new] = name
        return new

    def _layer_of(self, node: fx.Node, weight: fx.Node, bias: fx.Node | None) -> str:
        """The module that weight and bias are parameters of, "" for none.

        Computed ones become parameters of the module of the other one, else of the one that the operator is in.
        """
        draft = self.draft
        own = [
            owner_of(draft.names.get(entry, ""), kind)
            for kind, entry in (("weight", weight), ("bias", bias))
            if entry is not None and not draft.is_computed(entry)
        ]
        stack = node.meta.get("nn_module_stack") or {"": ("", None)}
        name = own[0] if own else str([*stack.values()][-1][0])
        other = any(entry != name for entry in own[1:]) and len(weight.users) == 1
        if not name or other or (bias is not None and bias not in draft.names):
            return ""
        for kind, entry in (("weight", weight), ("bias", bias)):
            known = draft.state.get(f"{name}.{kind}")
            if entry is None or known is None or not draft.is_computed(entry):
                continue
            if not torch.equal(known, draft.values[entry]):
                return ""
        return name

    def foldable(self, node: fx.Node) -> fx.Node | None:
        """The layer whose output only this batch norm reads, and whose parameters only that layer reads."""
        source = node.args[0]
        if not isinstance(source, fx.Node) or len(source.users) != 1 or bool(node.args[5]):
            return None
        if any(self.draft.uses(entry) > 1 for entry in source.all_input_nodes if entry.op == "get_attr"):
            return None  # the layer is used again, perhaps further on
        new, norm = self.draft.values[source], self._norm(node)
        if new not in self.layers or not all(entry is None or is_known(entry) for entry in norm):
            return None
        plain = op_of(new) in CONVOLUTIONS or new.meta["val"].ndim == 2
        return new if plain and all(len(entry.users) == 1 for entry in new.args[1:3]) else None

    def fold(self, node: fx.Node, layer: fx.Node) -> fx.Node:
        """Put a batch norm into the layer before it."""
        scale, shift, mean, variance = self._norm(node)
        epsilon = float(node.args[7])  # type: ignore[arg-type]
        name, state = self.layers[layer], self.draft.state
        weight, bias = state[f"{name}.weight"].double(), state[f"{name}.bias"].double()
        assert mean is not None and variance is not None  # eval mode
        gamma = torch.ones_like(mean) if scale is None else scale
        beta = torch.zeros_like(mean) if shift is None else shift
        factor = gamma.double() / torch.sqrt(variance.double() + epsilon)
        state[f"{name}.weight"] = (weight * factor.reshape(-1, *[1] * (weight.ndim - 1))).float()
        state[f"{name}.bias"] = ((bias - mean.double()) * factor + beta.double()).float()
        self.norms[name] = Norm(
            beta.detach().clone(), gamma.detach().abs(), (epsilon * factor.square()).float().detach()
        )
        return layer

    def _norm(self, node: fx.Node) -> list[Any]:
        """Factor, shift, mean and variance of a batch norm, None where it has none."""
        given: tuple[Any, ...] = node.args[1:5]
        return [None if entry is None else self.draft.values[entry] for entry in given]
