"""A model under a policy as the kernels an engine runs: each layer with all that follows it, up to the next ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from autocomp.errors import InputError
from autocomp.graph import Layer, LayerGraph, Node
from autocomp.policy import Policy
from autocomp.quantization import QuantPlan, place

__all__ = ["ENTRY", "Kernel", "kernels_of", "owners"]

ENTRY = ""
"""Owner of what an engine does before the first layer."""


@dataclass(frozen=True, slots=True, order=True)
class Kernel:
    """What the time of a layer depends on, with the activation, addition and conversions that come with it.

    A layer alone is not what an engine runs: it fuses the operators behind a layer into it, and converts types and
    memory layouts where neighbours differ. So a kernel says what follows, and in which types it reads and writes.

    Attributes:
        op: ``conv``, ``linear`` or ``entry`` (what comes before the first layer).
        channels_in, channels_out: that are read and written.
        kernel, stride: of a conv; empty for others.
        groups: of a conv.
        size: spatial size of the output, or the positions of a linear layer; empty where there is one.
        batch: images a run.
        precision: of the arithmetic: ``int8`` for weights of any number of bits, else the float type; see
            `Precision.arithmetic`.
        context: reading, following operators, quantized values (``.q``), readers (see `kernels_of`).
    """

    op: str
    channels_in: int
    channels_out: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int
    size: tuple[int, ...]
    batch: int
    precision: str
    context: str

    def __post_init__(self) -> None:
        whole = (self.channels_in, self.channels_out, self.groups, self.batch, *self.kernel, *self.stride, *self.size)
        if min(whole) < 1:
            raise InputError(f"kernel {self}: channels, sizes, strides, groups and batch must be 1 or more")

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a run."""
        if self.op == "entry":
            return 0
        return self.batch * prod(self.size) * self.channels_out * self.channels_in // self.groups * prod(self.kernel)

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.groups == self.channels_out

    def __str__(self) -> str:
        parts = [f"{self.op} {self.channels_in}->{self.channels_out}"]
        if self.kernel:
            parts += [f"{_x(self.kernel)}/{_x(self.stride)}", f"at {_x(self.size)}"]
        parts += [f"groups {self.groups}"] * (self.groups > 1)
        return " ".join([*parts, self.precision, f"batch {self.batch}", f"[{self.context}]"])


def kernels_of(graph: LayerGraph, policy: Policy, batch: int, only: str | None = None) -> dict[str, Kernel]:
    """Layer name -> its kernel under a policy; `ENTRY` -> what comes before the first layer.

    The context spells out, in order: ``q`` or ``f`` for a quantized or float input; then each operator of the kernel,
    with its spatial size where that differs from the layer's, in parentheses the types of what it reads from other
    kernels, ``.q`` where its value is quantized, and behind ``>`` who reads it in other kernels. Two kernels of equal
    fields run the same operators on tensors of the same shapes and types.

    Args:
        only: the name of the one kernel that is asked for, where not all are.

    Raises:
        InputError: the policy does not fit the graph.
    """
    graph.validate(policy)
    graph, policy = graph.paired(policy)
    nodes = graph.live(policy)
    plan = place(graph, policy)
    shapes = graph.parameter_shapes(policy)
    belongs = owners(graph, nodes)
    readers: dict[str, list[Node]] = {node.name: [] for node in nodes}
    for node in nodes:
        for value in dict.fromkeys(node.inputs):
            readers[value].append(node)
    parts: dict[str, list[Node]] = {}
    for node in nodes:
        if only is None or belongs[node.name] == only:
            parts.setdefault(belongs[node.name], []).append(node)
    found: dict[str, Kernel] = {}
    for name, own in parts.items():
        layer = graph.layer_by_name.get(name)
        first = own[0]
        tokens = [_token(graph, policy, plan, belongs, readers, node, first.shape[1:]) for node in own]
        if layer is None:
            channels = graph.input_shape[0]
            fields = ("entry", channels, channels, (), (), 1, tuple(graph.input_shape[1:]), batch, "fp32")
            found[name] = Kernel(*fields, " ".join(tokens))
            continue
        out, read, *kernel = shapes[layer.weight]
        precision = policy.precision(name)
        groups = layer.groups_of(out)
        size = tuple(first.shape[1:]) if layer.op == "conv" else (layer.positions,) * (layer.positions > 1)
        reads = "q" if first.inputs[0] in plan.values else "f"
        found[name] = Kernel(
            layer.op, read * groups, out, tuple(kernel), layer.stride, groups, size, batch,
            precision.arithmetic, " ".join([reads, *tokens]),
        )  # fmt: skip
    return found


def owners(graph: LayerGraph, nodes: Sequence[Node]) -> Mapping[str, str]:
    """Node -> the layer whose kernel it belongs to: itself, or of the layers before it the last one.

    Args:
        nodes: live ones in topological order.
    """
    place_of = {layer.name: position for position, layer in enumerate(_in_order(graph, nodes), start=1)}
    found: dict[str, str] = {}
    for node in nodes:
        layer = graph.layer_by_node.get(node.name)
        if layer is not None:
            found[node.name] = layer.name
        else:
            before = [found[value] for value in node.inputs]
            found[node.name] = max(before, key=lambda name: place_of.get(name, 0), default=ENTRY)
    return found


def _in_order(graph: LayerGraph, nodes: Sequence[Node]) -> list[Layer]:
    return [graph.layer_by_node[node.name] for node in nodes if node.name in graph.layer_by_node]


def _token(
    graph: LayerGraph,
    policy: Policy,
    plan: QuantPlan,
    belongs: Mapping[str, str],
    readers: Mapping[str, Sequence[Node]],
    node: Node,
    size: tuple[int, ...],
) -> str:
    """One operator of a kernel, as its context spells it."""
    own = belongs[node.name]
    text = node.op
    if node.shape and node.shape[1:] != size:
        text += f":{_x(node.shape[1:]) or node.shape[0]}"
    if node.name not in graph.layer_by_node:
        outside = ["q" if value in plan.values else "f" for value in node.inputs if belongs[value] != own]
        text += f"({''.join(sorted(outside))})" if outside else ""
    text += ".q" if node.name in plan.values else ""
    kinds = {_kind(graph, policy, plan, reader) for reader in readers[node.name] if belongs[reader.name] != own}
    return text + (f">{','.join(sorted(kinds))}" if kinds else "")


def _kind(graph: LayerGraph, policy: Policy, plan: QuantPlan, node: Node) -> str:
    """How a node reads: a layer by its arithmetic, another operator by its name and the types of all it reads."""
    layer = graph.layer_by_node.get(node.name)
    if layer is not None:
        return policy.precision(layer.name).arithmetic
    return f"{node.op}({''.join(sorted('q' if value in plan.values else 'f' for value in node.inputs))})"


def _x(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
