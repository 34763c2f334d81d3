"""Find a traced graph's values in the ONNX model it was exported to."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from autocomp.errors import EngineError
from autocomp.graph import LayerGraph, Node
from autocomp.policy import INT8, Policy
from autocomp.quantization import place

__all__ = ["joined_products", "match_values", "simplified"]

# ATen's operator -> the ONNX operators an exporter may write for it.
_OPERATORS: Mapping[str, frozenset[str]] = {
    "relu": frozenset({"Relu"}),
    "relu6": frozenset({"Clip"}),
    "hardtanh": frozenset({"Clip"}),
    "clamp": frozenset({"Clip"}),
    "add": frozenset({"Add"}),
    "mul": frozenset({"Mul"}),
    "sigmoid": frozenset({"Sigmoid"}),
    "hardsigmoid": frozenset({"HardSigmoid"}),
    "hardswish": frozenset({"HardSwish"}),
    "cat": frozenset({"Concat"}),
    "slice": frozenset({"Slice"}),
    "select": frozenset({"Gather"}),
    "permute": frozenset({"Transpose"}),
    "transpose": frozenset({"Transpose"}),
    "swapaxes": frozenset({"Transpose"}),
    "unsqueeze": frozenset({"Unsqueeze", "Reshape"}),
    "squeeze": frozenset({"Squeeze", "Reshape"}),
    "unflatten": frozenset({"Reshape"}),
    "gelu": frozenset({"Gelu"}),
    "layer_norm": frozenset({"LayerNormalization"}),
    "batch_norm": frozenset({"BatchNormalization"}),
    "softmax": frozenset({"Softmax"}),
    "pad": frozenset({"Pad"}),
    "max_pool2d": frozenset({"MaxPool"}),
    "avg_pool2d": frozenset({"AveragePool", "GlobalAveragePool"}),
    "adaptive_avg_pool2d": frozenset({"AveragePool", "GlobalAveragePool"}),
    "mean": frozenset({"ReduceMean", "GlobalAveragePool"}),
    "flatten": frozenset({"Reshape", "Flatten"}),
    "view": frozenset({"Reshape", "Flatten"}),
    "reshape": frozenset({"Reshape", "Flatten"}),
}
# Moving operators that do nothing where the shape stays; a pooling or a permutation still does something then.
_IDENTITY_WHEN_SHAPE_STAYS = frozenset({"slice", "pad", "view", "reshape", "flatten", "dropout"})


def match_values(
    graph: LayerGraph, nodes: Sequence[onnx.NodeProto], initializers: Mapping[str, onnx.TensorProto], output: str
) -> dict[str, str]:
    """Graph value -> ONNX value, matched by structure: names differ between a trace and its export.

    Layers are found by their weight, which fixes the values they read and write. The others follow in topological
    order: the ONNX operator of a fitting kind that reads exactly the matched inputs.

    Raises:
        EngineError: naming a layer whose weight, or a value that int8 needs and that was not found.
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    for operator in nodes:
        for value in dict.fromkeys(operator.input):
            readers.setdefault(value, []).append(operator)
    values = _anchors(graph, readers, initializers)
    values |= {name: name for name in graph.inputs if name in readers}
    values[graph.output] = output
    writers = {value: operator for operator in nodes for value in operator.output}
    for node in graph.nodes:
        inputs = [values[value] for value in node.inputs if value in values]
        if not inputs:
            continue
        moves = node.op in _IDENTITY_WHEN_SHAPE_STAYS and node.name not in writers
        if node.name not in values and moves and _keeps_shape(graph, node):
            values[node.name] = inputs[0]  # it does nothing, and the exporter left it out
            continue
        known = writers.get(values.get(node.name, ""))
        found = _find(node, inputs, readers, initializers) if known is None else known
        if found is None or not _fits(found, node, inputs, initializers):
            continue
        values[node.name] = found.output[0]
        missing = [value for value in node.inputs if value not in values]
        if len(missing) == 1:  # computed by operators that the exporter wrote in another way
            (values[missing[0]],) = _computed(found, initializers) - Counter(inputs)
    everywhere = Policy(precisions={layer.name: INT8 for layer in graph.layers})
    needed = dict.fromkeys([*place(graph, everywhere).values, *_branch_values(graph)])
    for value in needed:
        if value not in values:
            raise EngineError(f"the exported model has no value for {value}: export each policy in full")
    return values


def _keeps_shape(graph: LayerGraph, node: Node) -> bool:
    return node.shape == graph.node_by_name[node.inputs[0]].shape


def _branch_values(graph: LayerGraph) -> list[str]:
    return [value for branch in graph.branches for value in (branch.add, branch.stream, branch.branch)]


def _anchors(
    graph: LayerGraph, readers: Mapping[str, list[onnx.NodeProto]], initializers: Mapping[str, onnx.TensorProto]
) -> dict[str, str]:
    """Values that layers read and write, found by the layers' weights."""
    values: dict[str, str] = {}
    for layer in graph.layers:
        users = readers.get(layer.weight, [])
        if layer.weight not in initializers or len(users) != 1 or not _is_plain(users[0], layer.op, layer.weight):
            raise EngineError(f"the exported model has no editable weight for {layer.name}: export each policy in full")
        (source, *_) = graph.node_by_name[layer.node].inputs
        for value, name in ((source, users[0].input[0]), (layer.node, users[0].output[0])):
            if values.setdefault(value, name) != name:
                raise EngineError(f"the exported model is not wired as {layer.name} was: export each policy in full")
    return values


def _is_plain(node: onnx.NodeProto, op: str, weight: str) -> bool:
    """Whether the node is the layer itself, with output channels on the weight's first axis."""
    if node.input[1] != weight:
        return False
    attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    if op == "conv":
        return node.op_type == "Conv"
    defaults = {"alpha": 1.0, "beta": 1.0, "transA": 0}
    unscaled = all(attributes.get(name, default) == default for name, default in defaults.items())
    return node.op_type == "Gemm" and attributes.get("transB", 0) == 1 and unscaled


def _find(
    node: Node,
    inputs: Sequence[str],
    readers: Mapping[str, list[onnx.NodeProto]],
    initializers: Mapping[str, onnx.TensorProto],
) -> onnx.NodeProto | None:
    """The one ONNX operator that fits, the name deciding where several do.

    Args:
        inputs: the matched ones of those that the node reads; others were computed from parameters alone.
    """
    fitting = [reader for reader in readers.get(inputs[0], []) if _fits(reader, node, inputs, initializers)]
    named = [reader for reader in fitting if reader.output[0] == node.name]
    return named[0] if named else fitting[0] if len(fitting) == 1 else None


def _fits(
    operator: onnx.NodeProto, node: Node, inputs: Sequence[str], initializers: Mapping[str, onnx.TensorProto]
) -> bool:
    """Whether an ONNX operator is of a node's kind, reads as many values, and these among them."""
    computed = _computed(operator, initializers)
    kinds = _OPERATORS.get(node.op, frozenset[str]())
    return operator.op_type in kinds and computed.total() == len(node.inputs) and not Counter(inputs) - computed


def _computed(node: onnx.NodeProto, initializers: Mapping[str, onnx.TensorProto]) -> Counter[str]:
    """What a node reads beside initializers."""
    return Counter(value for value in node.input if value and value not in initializers)


def simplified(
    nodes: Iterable[onnx.NodeProto], initializers: Mapping[str, onnx.TensorProto]
) -> Iterator[onnx.NodeProto]:
    """Nodes in forms that engines know in int8: a mean over height and width is a GlobalAveragePool."""
    for node in nodes:
        attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        if node.op_type == "ReduceMean" and len(node.input) > 1 and node.input[1] in initializers:
            axes = sorted(int(axis) for axis in numpy_helper.to_array(initializers[node.input[1]]))
            if axes in ([2, 3], [-2, -1]) and attributes.get("keepdims", 1):
                yield helper.make_node("GlobalAveragePool", [node.input[0]], list(node.output), name=node.name)
                continue
        yield node


def joined_products(
    graph: LayerGraph, nodes: Iterable[onnx.NodeProto], initializers: Mapping[str, onnx.TensorProto]
) -> tuple[list[onnx.NodeProto], dict[str, onnx.TensorProto]]:
    """Linear layers over several axes as one node each, a Gemm of any rank that is none of ONNX.

    An exporter writes them as a MatMul by the weight (in, out) and an Add of the bias.

    Returns:
        nodes in topological order, and initializers, such weights as (out, in).
    """
    nodes, tensors = list(nodes), dict(initializers)
    wide = {layer.weight: layer for layer in graph.layers if layer.op == "linear"}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for value in node.input:
            readers.setdefault(value, []).append(node)
    joined: dict[str, onnx.NodeProto] = {}
    gone = set()
    for node in nodes:
        layer = wide.get(node.input[1]) if node.op_type == "MatMul" else None
        following = readers.get(node.output[0], [])
        if layer is None or layer.weight not in tensors or len(readers[layer.weight]) > 1 or len(following) != 1:
            continue
        if following[0].op_type != "Add" or layer.bias not in following[0].input or layer.bias not in tensors:
            continue
        weight = numpy_helper.to_array(tensors[layer.weight])
        if weight.shape != layer.weight_shape[::-1]:
            continue
        tensors[layer.weight] = numpy_helper.from_array(np.ascontiguousarray(weight.T), layer.weight)
        inputs, outputs = [node.input[0], layer.weight, layer.bias], following[0].output
        joined[outputs[0]] = helper.make_node("Gemm", inputs, outputs, name=node.name, transB=1)
        gone.add(node.output[0])
    kept = [joined.get(node.output[0], node) for node in nodes if node.output[0] not in gone]
    return kept, tensors
