"""Where a file comes apart between its layers, and the two models that it comes apart into."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx as onnx_package
from onnx import NodeProto, TensorProto, helper, shape_inference

from autocomp.engines.attribution import layer_of
from autocomp.engines.packing import unpacked
from autocomp.engines.template import parse
from autocomp.errors import EngineError

__all__ = ["Cut", "cuts_of", "head", "tail"]

_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})
_LAYERS = frozenset({"Conv", "Gemm", "MatMul"})


@dataclass(frozen=True, slots=True)
class Cut:
    """A place right before a layer.

    Attributes:
        layer: that comes next.
        values: value that is read behind the cut -> the float value, computed before it, that it equals.
    """

    layer: str
    values: Mapping[str, str]


def cuts_of(onnx: bytes) -> tuple[Cut, ...]:
    """The places before layers, in the file's order.

    Engines return floats, so codes that are read behind a cut are handed on as what they stand for, to every operator
    that dequantizes them. A place where anything else that is no float crosses is left out.

    Raises:
        EngineError: no ONNX model.
    """
    model = unpacked(parse(onnx))
    kinds = {name: value.type.tensor_type.elem_type for name, value in _values(model).items()}
    constant = {tensor.name for tensor in model.graph.initializer} | {""}
    computed: list[tuple[NodeProto, str | None]] = []  # with the layer that a node is, if it is one
    for index, node in enumerate(model.graph.node):
        if constant.issuperset(node.input):
            constant.update(node.output)
            continue
        is_layer = node.op_type in _LAYERS and node.input[1] in constant
        computed.append((node, layer_of(model, index) if is_layer else None))
    cuts = []
    for place, (_, layer) in enumerate(computed):
        if layer is not None:
            before, behind = ([node for node, _ in part] for part in (computed[:place], computed[place:]))
            values = _handed_on(model.graph, before, behind, kinds)
            if values is not None:
                cuts.append(Cut(layer, values))
    return tuple(cuts)


def head(onnx: bytes, value: str) -> bytes:
    """The model that computes one float value of a file, and returns it as float32.

    Raises:
        EngineError: no ONNX model, or it has no such value.
    """
    model = parse(onnx)
    known = _values(model)
    if value not in known:
        raise EngineError(f"the file has no value {value}: give one that was written for this policy")
    result = onnx_package.ValueInfoProto()
    result.CopyFrom(known[value])
    nodes = _needed(model.graph.node, {value}, set())
    if result.type.tensor_type.elem_type != TensorProto.FLOAT or not nodes:
        result.name = f"{value}_head"
        nodes.append(helper.make_node("Cast", [value], [result.name], name=result.name, to=TensorProto.FLOAT))
        result.type.tensor_type.elem_type = TensorProto.FLOAT
    return _rebuilt(model, nodes, model.graph.input, [result])


def tail(onnx: bytes, cut: Cut) -> bytes:
    """The model that reads what a cut hands on, as float32 and in the cut's order, and computes a file's output.

    Raises:
        EngineError: no ONNX model.
    """
    model = parse(onnx)
    known = _values(model)
    inputs, casts = [], []
    for value in cut.values:
        kind = known[value].type.tensor_type.elem_type
        name = value if kind == TensorProto.FLOAT else f"{value}_given"
        inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        if name != value:
            casts.append(helper.make_node("Cast", [name], [value], name=name, to=kind))
    nodes = _needed(model.graph.node, {entry.name for entry in model.graph.output}, set(cut.values))
    return _rebuilt(model, [*casts, *nodes], inputs, model.graph.output)


def _values(model: onnx_package.ModelProto) -> dict[str, onnx_package.ValueInfoProto]:
    """Type and shape of every value, by name."""
    graph = shape_inference.infer_shapes(model).graph
    return {value.name: value for value in (*graph.input, *graph.value_info, *graph.output)}


def _handed_on(
    graph: onnx_package.GraphProto, before: Iterable[NodeProto], behind: Iterable[NodeProto], kinds: Mapping[str, int]
) -> dict[str, str] | None:
    """What crosses between two parts of a file; None where it is neither a float nor codes that are dequantized."""
    written = {value.name for value in graph.input} | {value for node in before for value in node.output}
    real = {node.input[0]: node.output[0] for node in before if node.op_type == "DequantizeLinear"}
    found: dict[str, str] = {}
    for node in behind:
        for value in (name for name in node.input if name in written):
            if kinds.get(value) in _FLOATS:
                found[value] = value
            elif node.op_type == "DequantizeLinear" and value in real:
                found[node.output[0]] = real[value]
            else:
                return None
    return found


def _needed(nodes: Iterable[NodeProto], wanted: set[str], given: set[str]) -> list[NodeProto]:
    """Those that the wanted values depend on, up to the given ones, in their order."""
    found = []
    for node in reversed(list(nodes)):
        if not (wanted - given).isdisjoint(node.output):
            found.append(node)
            wanted = wanted | set(node.input)
    return found[::-1]


def _rebuilt(
    model: onnx_package.ModelProto,
    nodes: Sequence[NodeProto],
    inputs: Sequence[onnx_package.ValueInfoProto],
    outputs: Sequence[onnx_package.ValueInfoProto],
) -> bytes:
    """The model with other nodes and ends, and of its initializers those that are read."""
    read = {value for node in nodes for value in node.input}
    graph = helper.make_graph(
        nodes, model.graph.name, inputs, outputs, [tensor for tensor in model.graph.initializer if tensor.name in read]
    )
    result = onnx_package.ModelProto()
    result.CopyFrom(model)
    result.graph.CopyFrom(graph)
    return bytes(result.SerializeToString())
