"""A graph that is being written from an exported one, and what is known of its values meanwhile."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from autocomp.compress.naming import attribute_of
from autocomp.compress.surgery import frozen
from autocomp.errors import ModelError
from autocomp.rows import Inputs, part, starts

__all__ = ["Draft", "is_known", "owner_of"]


@dataclass
class Draft:
    """The new graph, written node by node.

    Attributes:
        source: what is written again.
        own: names of the model's parameters and buffers; other tensors are constants of its code.
        graph: the new one.
        values: node of the source -> its value: a node of the new graph, or what is known already, a tensor or several.
        state: name -> tensor of every parameter that the new graph reads.
        parameters: name -> the node that reads it.
        names: node of the source -> name of its known value, where that comes from the model's own tensors.
    """

    source: fx.GraphModule
    own: frozenset[str]
    graph: fx.Graph = field(default_factory=fx.Graph)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, fx.Node] = field(default_factory=dict)
    names: dict[fx.Node, str] = field(default_factory=dict)

    def open(self, given: Sequence[fx.Node], inputs: Inputs) -> fx.Node:
        """Write the input: one, or a row and its parts.

        Args:
            given: the source's placeholders.
            inputs: of a row; empty where there is one input.
        """
        source = self.graph.placeholder("x")
        if not inputs:
            (only,) = given
            self.values[only] = self._valued(source, only)
            return source
        by_name = {str(node.target): node for node in given}
        values = [by_name[name].meta["val"] for name in inputs]
        source.meta["val"] = torch.cat([value.flatten(1) for value in values], 1)
        for name, start in starts(inputs).items():
            node = by_name[name]
            if not node.users:
                raise ModelError(f"forward() does not use its input {name}: leave it out of the data")
            self.values[node] = self.create(node, part, (source, start, inputs[name]), {}, name)
        return source

    def read(self, node: fx.Node) -> None:
        """Take in a tensor of the source."""
        value = attribute_of(self.source, str(node.target))
        if not isinstance(value, Tensor):
            raise ModelError(f"the model has control flow in its graph ({node.target}): write it without torch.cond")
        own = str(node.target) in self.own
        self.values[node] = value.detach() if own else value.detach().clone()
        if own:
            self.names[node] = str(node.target)

    def uses(self, node: fx.Node) -> int:
        """How many operators of the source read a tensor, by this name or another."""
        return self._uses[attribute_of(self.source, str(node.target)).data_ptr()]

    @cached_property
    def _uses(self) -> Counter[int]:
        found: Counter[int] = Counter()
        for node in self.source.graph.nodes:
            if node.op == "get_attr" and isinstance(value := attribute_of(self.source, str(node.target)), Tensor):
                found[value.data_ptr()] += len(node.users)
        return found

    def mapped(self, node: Any) -> Any:
        """A node's value for readers in the new graph; known ones become parameters."""
        value = self.values[node]
        if not isinstance(value, Tensor):
            return value
        name = self.names.get(node)
        return self.parameter(f"constants.{node.name}", value.clone()) if name is None else self.parameter(name, value)

    def parameter(self, name: str, tensor: Tensor) -> fx.Node:
        """The node that reads a parameter, made on first use."""
        for kind in ("weight", "bias"):
            if owner := owner_of(name, kind):
                name = f"{owner}.{kind}"
        if name not in self.parameters:
            self.state[name] = tensor.detach()
            self.parameters[name] = self.graph.create_node("get_attr", name, name="p_" + name.replace(".", "_"))
        return self.parameters[name]

    def create(self, node: fx.Node, target: Any, args: Any, kwargs: Any, name: str) -> fx.Node:
        """An operator in place of ``node``."""
        return self._valued(self.graph.create_node("call_function", target, args, kwargs, name=name), node)

    def is_computed(self, entry: Any) -> bool:
        """Whether a value was computed from the model's own tensors."""
        return entry in self.names and self.names[entry] not in self.own

    def module(self) -> fx.GraphModule:
        """What has been written, frozen and in eval mode."""
        plain = {name: tensor.detach().contiguous() for name, tensor in self.state.items()}  # not copied: it is ours
        return frozen(self.graph, plain)

    def _valued(self, new: fx.Node, node: fx.Node) -> fx.Node:
        if "val" in node.meta:
            new.meta["val"] = node.meta["val"]
        return new


def owner_of(parameter: str, kind: str) -> str:
    """The layer whose ``kind`` (weight or bias) a parameter is, "" for none: an ``in_proj_weight`` belongs to a layer
    ``in_proj``."""
    path, _, last = parameter.rpartition(".")
    if last == kind:
        return path
    if last.endswith(f"_{kind}") and path:
        return f"{path}.{last.removesuffix(f'_{kind}')}"
    return ""


def is_known(value: Any) -> bool:
    """Whether a value of the graph that is written is a tensor, or several."""
    return isinstance(value, Tensor) or (isinstance(value, tuple | list) and all(map(is_known, value)))
