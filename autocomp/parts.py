"""What a `LayerGraph` is made of: operators, layers, groups of coupled channels, residual branches."""

from dataclasses import dataclass, replace
from math import prod

from autocomp.errors import InputError

__all__ = ["Branch", "Group", "Layer", "Member", "Node", "elements", "most_rank", "pair_of"]


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
    def most_rank(self) -> int:
        """The largest rank at which a pair of layers takes fewer weights than this one; 0 where none does."""
        return 0 if self.groups > 1 else most_rank(self.weight_shape)

    @property
    def reads_fours(self) -> bool:
        """Whether its input channels come in fours, of which 2:4 sparsity takes two."""
        return self.groups == 1 and self.weight_shape[1] % 4 == 0

    def groups_of(self, channels: int) -> int:
        """How many groups a convolution has left with so many output channels: grouped ones lose whole groups."""
        return 1 if self.groups == 1 else channels // (self.weight_shape[0] // self.groups)


def most_rank(shape: tuple[int, ...]) -> int:
    """As `Layer.most_rank`, of a weight's shape."""
    out, inner = shape[0], prod(shape[1:])
    return (out * inner - 1) // (out + inner)


def elements(shape: tuple[int, ...], rank: int | None) -> int:
    """Weights of a layer, or of the pair of layers that computes it at a rank."""
    return prod(shape) if rank is None else rank * (shape[0] + prod(shape[1:]))


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


def pair_of(layer: Layer, rank: int) -> tuple[Layer, Layer]:
    """The two layers that compute one at a rank (Zhang et al., arXiv:1505.06798, section 3.1)."""
    out, read, *kernel = layer.weight_shape
    first = replace(
        layer,
        name=f"{layer.name}.reduce",
        node=f"{layer.node}_reduced",
        weight_shape=(rank, read, *kernel),
        normalised=False,
    )
    ones = (1,) * len(kernel)
    second = replace(layer, weight_shape=(out, rank, *ones), stride=ones, padding=(0,) * len(kernel), dilation=ones)
    return first, second
