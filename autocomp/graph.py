"""The traced model as plain data: operators, layers, groups of coupled channels, residual branches."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import prod

from autocomp.errors import InputError
from autocomp.policy import Policy, digest_of
from autocomp.rows import Inputs, row_shape

__all__ = ["Branch", "Group", "Layer", "LayerGraph", "Member", "Node"]


@dataclass(frozen=True, slots=True)
class Node:
    """One operator of the traced graph; its name is also the name of the value it produces, here and in the ONNX.

    Attributes:
        name: unique; the model's inputs are nodes of op ``input``.
        op: ATen's short name (``conv2d``, ``relu``, ``add``, ``slice``, ``pad``, ``view``, ...).
        inputs: names of the activations it reads, in order (parameters are not listed).
        shape: of the produced value, without the batch axis.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution or linear operator with weights, normalisation folded in.

    Attributes:
        name: the module's path (``layer1.0.conv1``); parameters are ``{name}.weight`` and ``{name}.bias``.
        op: ``conv`` or ``linear``.
        node: name of its `Node`.
        weight_shape: (out, in / groups, *kernel) for conv, (out, in) for linear.
        positions: outputs computed per output channel for one sample (height x width for a conv).
        stride, padding, dilation: of a conv, per spatial axis; empty for linear.
        groups: of a conv; equal to the channels for a depthwise one.
        normalised: a batch normalisation was folded into it.
    """

    name: str
    op: str
    node: str
    weight_shape: tuple[int, ...]
    positions: int
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    normalised: bool = False

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"

    @property
    def bias(self) -> str:
        return f"{self.name}.bias"

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.groups == self.weight_shape[0] and self.weight_shape[1] == 1

    @property
    def reads_fours(self) -> bool:
        """Whether its input channels come in fours, of which 2:4 sparsity takes two."""
        return self.groups == 1 and self.weight_shape[1] % 4 == 0

    def groups_of(self, channels: int) -> int:
        """How many groups a convolution has left with so many output channels: grouped ones lose whole groups."""
        return 1 if self.groups == 1 else channels // (self.weight_shape[0] // self.groups)


@dataclass(frozen=True, slots=True)
class Member:
    """One parameter's axis that a group slices.

    Attributes:
        parameter: name of the tensor (``layer1.0.conv2.weight``).
        axis: the sliced axis; 0 writes the group's channels, 1 reads them.
        positions: for each channel of the group, the positions it occupies along the axis (several where a
            channel was flattened into a linear layer); equally many for every channel.
    """

    parameter: str
    axis: int
    positions: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len({len(entry) for entry in self.positions}) != 1:
            raise InputError(f"{self.parameter}: channels of one group occupy unequally many positions")

    @property
    def width(self) -> int:
        """Positions per channel."""
        return len(self.positions[0])


@dataclass(frozen=True, slots=True)
class Group:
    """Channels that must be pruned together.

    Attributes:
        name: of the layer that writes the channels (the first one where several do).
        channels: how many there are.
        members: every parameter axis to slice.
    """

    name: str
    channels: int
    members: tuple[Member, ...]

    @property
    def writers(self) -> frozenset[str]:
        """Names of the modules that give these channels: layers, and norms that were not folded."""
        return frozenset(member.parameter.rpartition(".")[0] for member in self.members if member.axis == 0)


@dataclass(frozen=True, slots=True)
class Branch:
    """A residual branch that can be removed whole: its addition then passes the stream on.

    Attributes:
        name: common module path of the branch's layers.
        add: name of the addition's node.
        stream: the addition's input that stays.
        branch: the addition's input that goes.
        layers: names of the layers that go with it.
    """

    name: str
    add: str
    stream: str
    branch: str
    layers: tuple[str, ...]


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
        for name in policy.precisions:
            if name not in self.layer_by_name:
                raise InputError(f"the policy sets the precision of {name}, which is no layer of this model")

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
                found.append(replace(node, inputs=tuple(map(resolve, node.inputs))))
                needed.update(found[-1].inputs)
        return tuple(reversed(found))

    def parameter_shapes(self, policy: Policy) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter under the policy; those of removed layers are absent."""
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
        shapes = self.parameter_shapes(policy)
        return {
            layer.name: prod(shapes[layer.weight]) * layer.positions for layer in self.layers if layer.weight in shapes
        }

    def macs(self, policy: Policy) -> int:
        """Multiply-accumulates of one sample (convolutions and linear layers)."""
        return sum(self.layer_macs(policy).values())

    def _inside(self, group: Group, gone: frozenset[str]) -> bool:
        return all(member.parameter.rpartition(".")[0] in gone for member in group.members)
