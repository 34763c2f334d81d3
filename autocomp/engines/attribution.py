"""Which operator of a file a runtime's kernel stands for, and which value of the traced graph an operator computes."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from onnx import GraphProto, ModelProto, NodeProto

from autocomp.engines.template import parse

__all__ = ["Attribution", "Ran", "by_graph_value", "layer_of"]


class Ran(Protocol):
    """A kernel of a runtime's own graph, as an ONNX node has it; its name may be a list, separated by commas, of the
    operators that were fused."""

    @property
    def name(self) -> str: ...
    @property
    def input(self) -> Sequence[str]: ...
    @property
    def output(self) -> Sequence[str]: ...


class Attribution:
    """Finds for every kernel of a runtime's graph the operator of the file that it came from.

    Runtimes fuse operators and insert conversions, and rename some of what they keep. A kernel is known by a value of
    the file that it writes, a weight or bias of the file that it reads, or its name; what has none of these, a
    conversion of types or memory layout, counts to the operator whose result it converts.

    Args:
        onnx: the file that was built.
    """

    def __init__(self, onnx: bytes) -> None:
        graph = parse(onnx).graph
        self._writer: dict[str, NodeProto] = {value: node for node in graph.node for value in node.output}
        self._by_name: dict[str, NodeProto] = {node.name: node for node in graph.node}
        self._by_tensor = _readers_of_tensors(graph)
        self._inputs = [value.name for value in graph.input]

    def of(self, kernels: Sequence[Ran]) -> list[str]:
        """For each kernel, in topological order, the first value that its operator writes in the file; the name of
        the model's input for what comes before all operators."""
        written: dict[str, str] = dict.fromkeys(self._inputs, self._inputs[0])
        found = []
        for kernel in kernels:
            node = self._operator(kernel)
            if node is not None:
                value = str(node.output[0])
            else:
                value = next((written[name] for name in kernel.input if name in written), self._inputs[0])
            found.append(value)
            written.update(dict.fromkeys(kernel.output, value))
        return found

    def of_names(self, names: Iterable[str], fused: Mapping[str, Sequence[str]]) -> dict[str, str]:
        """The same for kernels of which names are known, and what they were fused from; those that were fused from
        none of the file's operators count to what ran before them.

        Args:
            names: in the order they run in.
            fused: name -> names of operators, where the runtime tells; else they are looked for in the name itself.
        """
        found, last = {}, self._inputs[0]
        for name in names:
            told = fused[name] if name in fused else re.split(r"[^\w.:/-]+", name)
            parts = [part for part in told if part in self._by_name]
            if parts:
                last = str(self._by_name[parts[0]].output[0])
            found[name] = last
        return found

    def _operator(self, kernel: Ran) -> NodeProto | None:
        for value in kernel.input:  # a fused kernel writes the last operator's value and reads the first one's weight
            if value in self._by_tensor:
                return self._by_tensor[value]
        for value in kernel.output:
            if value in self._writer:
                return self._writer[value]
        for part in kernel.name.split(","):
            name = re.sub(r"(_token_\d+|_nchwc|/WithoutBiases|/Dequantization\w+)+$", "", part)
            found: NodeProto | None = self._by_name.get(name, self._writer.get(name))
            if found is not None:
                return found
        return None


def _readers_of_tensors(graph: GraphProto) -> dict[str, NodeProto]:
    """Initializer -> the one operator that computes with it, behind those that only unpack it."""
    constant = {tensor.name for tensor in graph.initializer}
    reading: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for value in node.input:
            reading.setdefault(value, []).append(node)
    found: dict[str, NodeProto] = {}
    for name in constant:
        nodes = reading.get(name, [])
        while len(nodes) == 1 and all(value in constant for value in nodes[0].input):
            nodes = reading.get(nodes[0].output[0], [])
        if len(nodes) == 1 and nodes[0].op_type not in ("QuantizeLinear", "DequantizeLinear"):
            found[name] = nodes[0]
    return found


def by_graph_value(onnx: bytes, times: Mapping[str, float], values: Mapping[str, str]) -> dict[str, float]:
    """Times by value of the traced graph, from times by value of the file.

    Args:
        onnx: the file that was timed.
        times: as `Backend.profile` returns them.
        values: value of the traced graph -> value of the file, as a `Template` has them.

    Returns:
        sums; operators that were written between two values of the graph count to the one before, those that
        compute a layer's value in several steps to that layer.
    """
    graph = parse(onnx).graph
    names: dict[str, str] = {}
    for ours, theirs in values.items():
        names.setdefault(theirs, ours)  # of several the first: the others were merged into it
    output = graph.output[0].name
    names |= {f"{output}_float": names[output]} if output in names else {}
    inputs = [value.name for value in graph.input]
    steps = {node.output[0] for node in _readers_of_tensors(graph).values()}
    reading = {value: node.output[0] for node in reversed(graph.node) for value in node.input}
    known = {name: names.get(inputs[0], inputs[0]) for name in inputs}

    def ahead(value: str) -> str:
        while value not in names:
            value = reading[value]
        return names[value]

    for node in graph.node:
        value = node.output[0]
        before = [known[entry] for entry in node.input if entry in known]
        # What unpacks a weight belongs to its layer, and so does a product whose bias is added behind it.
        known[value] = before[0] if before and value not in steps and value not in names else ahead(value)
    sums: dict[str, float] = {}
    for value, ms in times.items():
        sums[known[value]] = sums.get(known[value], 0.0) + ms
    return sums


def layer_of(model: ModelProto, index: int) -> str | None:
    """The layer that a node belongs to: the owner of the weight it reads, or of the nearest one before it.

    Args:
        model: that was parsed.
        index: of the node.
    """
    tensors = {tensor.name for tensor in model.graph.initializer}
    writer = {value: node for node in model.graph.node for value in node.output}
    waiting, seen = [model.graph.node[index]], set[str]()
    while waiting:
        node = waiting.pop(0)
        for value in node.input:
            if value in tensors and ".weight" in value:
                return str(value).split(".weight")[0]
        for value in node.input:
            if value in writer and value not in seen:
                seen.add(value)
                waiting.append(writer[value])
    return None
