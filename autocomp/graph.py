"""The traced model as plain data: operators, layers, groups of coupled channels, residual branches."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

from autocomp.errors import InputError
from autocomp.parts import Branch, Group, Layer, Member, Node, elements, most_rank, pair_of
from autocomp.policy import Policy, digest_of
from autocomp.rows import Inputs, row_shape

__all__ = ["Branch", "Group", "Layer", "LayerGraph", "Member", "Node", "elements"]


@dataclass(frozen=True)
class LayerGraph:
    """A traced model. Plain data; knows nothing of torch.

    Attributes:
        nodes: all operators in topological order, inputs first, ``output`` last.
        output: name of the node that produces the logits.
        layers, groups, branches: see there.
        parameters: name -> shape of every tensor the traced model holds.
        left_whole: group or layer name -> why it is not pruned.
    """

    nodes: tuple[Node, ...]
    output: str
    layers: tuple[Layer, ...]
    groups: tuple[Group, ...]
    branches: tuple[Branch, ...]
    parameters: Mapping[str, tuple[int, ...]]
    left_whole: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def inputs(self) -> Inputs:
        """Name -> shape of the model's inputs, in the order of a row."""
        return {node.name: node.shape for node in self.nodes if node.op == "input"}

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of the only input, or of a row of several."""
        return row_shape(self.inputs)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.node_by_name[self.output].shape

    @cached_property
    def node_by_name(self) -> Mapping[str, Node]:
        return {node.name: node for node in self.nodes}

    @cached_property
    def layer_by_name(self) -> Mapping[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def layer_by_node(self) -> Mapping[str, Layer]:
        return {layer.node: layer for layer in self.layers}

    @cached_property
    def group_by_name(self) -> Mapping[str, Group]:
        return {group.name: group for group in self.groups}

    @cached_property
    def branch_by_name(self) -> Mapping[str, Branch]:
        return {branch.name: branch for branch in self.branches}

    @cached_property
    def consumers(self) -> Mapping[str, tuple[str, ...]]:
        """Value name -> names of the nodes that read it."""
        readers: dict[str, list[str]] = {node.name: [] for node in self.nodes}
        for node in self.nodes:
            for value in dict.fromkeys(node.inputs):
                readers[value].append(node.name)
        return {name: tuple(nodes) for name, nodes in readers.items()}

    @cached_property
    def digest(self) -> str:
        plain = asdict(self)
        plain.pop("left_whole")
        return digest_of(plain)

    def validate(self, policy: Policy) -> None:
        """Raises: InputError naming the first entry of the policy that this graph does not have or allow."""
        for name, kept in policy.kept.items():
            if name not in self.group_by_name:
                raise InputError(f"the policy prunes {name}, which is no prunable group of this model")
            channels = self.group_by_name[name].channels
            if kept > channels:
                raise InputError(f"the policy keeps {kept} channels of {name}, which has {channels}")
        for name in policy.dropped:
            if name not in self.branch_by_name:
                raise InputError(f"the policy drops {name}, which is no removable branch of this model")
        for name, precision in policy.precisions.items():
            if name not in self.layer_by_name:
                raise InputError(f"the policy sets the precision of {name}, which is no layer of this model")
            if precision.rank is not None and precision.rank > self.most_rank(name):
                raise InputError(
                    f"the policy gives {name} rank {precision.rank}, at which it would not be smaller: give at most "
                    f"{self.most_rank(name)}"
                )

    def most_rank(self, layer: str) -> int:
        """`Layer.most_rank`; 0 also where the layer is left whole, for other operators may read its weight."""
        return 0 if layer in self.left_whole else self.layer_by_name[layer].most_rank

    def normalise(self, policy: Policy) -> Policy:
        """The same model written once: choices without effect (inside dropped branches, or keeping all) removed."""
        gone = self.removed_layers(policy)
        parts = {name: frozenset(self.branch_by_name[name].layers) for name in policy.dropped}
        outermost = frozenset(name for name in parts if not any(parts[name] < other for other in parts.values()))
        kept = {
            name: count
            for name, count in policy.kept.items()
            if count < self.group_by_name[name].channels and not self._inside(self.group_by_name[name], gone)
        }
        precisions = {name: p for name, p in policy.precisions.items() if name not in gone}
        if any(precision.rank is not None for precision in precisions.values()):
            shapes = self.parameter_shapes(Policy(kept, outermost))
            whole = {name for name, p in precisions.items() if (p.rank or 0) > most_rank(shapes[f"{name}.weight"])}
            precisions |= {name: precisions[name].full_rank for name in whole}
        return Policy(kept, outermost, precisions)

    def removed_layers(self, policy: Policy) -> frozenset[str]:
        """Names of the layers that go with the policy's dropped branches."""
        return frozenset(layer for name in policy.dropped for layer in self.branch_by_name[name].layers)

    def live(self, policy: Policy) -> tuple[Node, ...]:
        """The nodes that are left, in topological order, reading past the additions of dropped branches."""
        bypass = {self.branch_by_name[name].add: self.branch_by_name[name].stream for name in policy.dropped}

        def resolve(value: str) -> str:
            while value in bypass:
                value = bypass[value]
            return value

        found: list[Node] = []
        needed = {resolve(self.output)}
        for node in reversed(self.nodes):
            if node.name in needed:
                inputs = tuple(map(resolve, node.inputs)) if bypass else node.inputs
                found.append(node if inputs == node.inputs else replace(node, inputs=inputs))
                needed.update(inputs)
        return tuple(reversed(found))

    def paired(self, policy: Policy) -> tuple["LayerGraph", Policy]:
        """The graph in which every layer of reduced rank is a pair of layers, and the policy of that graph.

        The first of a pair is called ``NAME.reduce``, reads what the layer read, as it did, and gives as many values at
        every place as the rank says. The second has the layer's own name and bias and a kernel of one place.
        """
        ranks = {name: p.rank for name, p in policy.precisions.items() if p.rank is not None}
        if not ranks:
            return self, policy
        pairs = {name: pair_of(self.layer_by_name[name], rank) for name, rank in ranks.items()}
        first = {f"{name}.weight": pair[0].weight for name, pair in pairs.items()}

        def part(member: Member) -> Member:
            reads = member.axis == 1 and member.parameter in first
            return replace(member, parameter=first[member.parameter]) if reads else member

        nodes: list[Node] = []
        for node in self.nodes:
            layer = self.layer_by_node.get(node.name)
            if layer is not None and layer.name in pairs:
                reduce, rank = pairs[layer.name][0], ranks[layer.name]
                shape = (rank, *node.shape[1:]) if layer.op == "conv" else (*node.shape[:-1], rank)
                nodes += [replace(node, name=reduce.node, shape=shape), replace(node, inputs=(reduce.node,))]
            else:
                nodes.append(node)
        parts = {name: tuple(layer.name for layer in pair) for name, pair in pairs.items()}
        several = [entry for pair in pairs.values() for layer in pair for entry in _shapes(layer)]
        graph = replace(
            self,
            nodes=tuple(nodes),
            layers=tuple(one for layer in self.layers for one in pairs.get(layer.name, (layer,))),
            groups=tuple(replace(group, members=tuple(map(part, group.members))) for group in self.groups),
            branches=tuple(
                replace(branch, layers=tuple(one for name in branch.layers for one in parts.get(name, (name,))))
                for branch in self.branches
            ),
            parameters={**self.parameters, **dict(several)},
        )
        precisions = {one: p.full_rank for name, p in policy.precisions.items() for one in parts.get(name, (name,))}
        return graph, Policy(policy.kept, policy.dropped, precisions)

    def parameter_shapes(self, policy: Policy) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter under the policy; those of removed layers are absent."""
        graph, policy = self.paired(policy)
        return graph._sliced_shapes(policy)

    def _sliced_shapes(self, policy: Policy) -> dict[str, tuple[int, ...]]:
        gone = self.removed_layers(policy)
        shapes = {name: list(shape) for name, shape in self.parameters.items() if name.rpartition(".")[0] not in gone}
        for name, count in policy.kept.items():
            group = self.group_by_name[name]
            for member in group.members:
                if member.parameter in shapes:
                    shapes[member.parameter][member.axis] -= (group.channels - count) * member.width
        return {name: tuple(shape) for name, shape in shapes.items()}

    def layer_macs(self, policy: Policy) -> dict[str, int]:
        """Multiply-accumulates of one sample, per remaining layer."""
        shapes = self._sliced_shapes(policy)
        return {
            layer.name: elements(shapes[layer.weight], policy.precision(layer.name).rank) * layer.positions
            for layer in self.layers
            if layer.weight in shapes
        }

    def macs(self, policy: Policy) -> int:
        """Multiply-accumulates of one sample (convolutions and linear layers)."""
        return sum(self.layer_macs(policy).values())

    def _inside(self, group: Group, gone: frozenset[str]) -> bool:
        return all(member.parameter.rpartition(".")[0] in gone for member in group.members)


def _shapes(layer: Layer) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return (layer.weight, layer.weight_shape), (layer.bias, layer.weight_shape[:1])
