"""The exported model of a trace, parsed once and ready to be edited."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import helper, numpy_helper

from autocomp.engines.matching import joined_products, match_values, simplified
from autocomp.errors import EngineError
from autocomp.graph import LayerGraph
from autocomp.policy import Policy

__all__ = ["Template", "between_pairs", "load_template", "paired", "parse"]


@dataclass(frozen=True)
class Template:
    """An exported model, parsed and simplified once.

    Attributes:
        graph: what was traced; policies refer to it.
        model: the ONNX model without nodes and initializers (inputs, outputs, operator sets).
        nodes: in topological order, see `joined_products`. Not to be changed.
        initializers: by name. Not to be changed.
        values: value name in ``graph`` -> value name in the ONNX model; a value that the exporter merged into
            another operator has no entry.
        sizes: name of a constant of sizes -> for each of its numbers the tensors whose lengths add up to it.
    """

    graph: LayerGraph
    model: onnx.ModelProto
    nodes: tuple[onnx.NodeProto, ...]
    initializers: Mapping[str, onnx.TensorProto]
    values: Mapping[str, str]
    sizes: Mapping[str, tuple[tuple[str, ...], ...]]

    @property
    def output(self) -> str:
        return str(self.model.graph.output[0].name)


def parse(data: bytes) -> onnx.ModelProto:
    """Read a serialized model.

    Raises:
        EngineError: these bytes are no ONNX model.
    """
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's DecodeError, whose module differs between its implementations
        raise EngineError(f"this is no ONNX model ({_one_line(error)}): export it again") from error
    if not model.graph.output:
        raise EngineError("this is no ONNX model (it has no graph): export it again")
    return model


def load_template(onnx: bytes, graph: LayerGraph) -> Template:
    """Parse the export of a traced model and find the graph's values in it.

    Args:
        onnx: exported with the parameters' own names as initializers.
        graph: the trace that was exported.

    Raises:
        EngineError: naming the layer whose weight, or the value to be quantized that cannot be found; such a
            model cannot be edited and needs a full export for each policy.
    """
    model = parse(onnx)
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes, initializers = joined_products(graph, simplified(model.graph.node, found), found)
    values = match_values(graph, nodes, initializers, model.graph.output[0].name)
    for node in nodes:
        flat = next((name for name, value in values.items() if value == node.output[0]), None)
        if node.op_type == "Reshape" and flat is not None and len(graph.node_by_name[flat].shape) == 1:
            # The exporter wrote the number of features as a constant, which pruning changes; 0 copies the batch.
            shape = numpy_helper.from_array(np.array([0, -1], np.int64), f"{node.name}_shape")
            initializers[shape.name] = shape
            node.input[1] = shape.name
            del node.attribute[:]  # the exporter sets allowzero, which would mean a true 0
    sizes = _renewable(nodes)
    del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
    return Template(graph, model, tuple(nodes), initializers, values, sizes)


def _renewable(nodes: Sequence[onnx.NodeProto]) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Give nodes with sizes of channels constants of their own; see `Template.sizes`."""
    sizes: dict[str, tuple[tuple[str, ...], ...]] = {}
    for node in nodes:
        names = next((tuple(entry.value.split()) for entry in node.metadata_props if entry.key == "pieces"), ())
        if node.op_type == "Split" and names:
            node.input[1] = f"{names[0]}_sizes"
            sizes[node.input[1]] = tuple((name,) for name in names)
        elif node.op_type == "Slice" and names:
            node.input[1], node.input[2] = f"{names[0]}_start", f"{names[0]}_end"
            sizes[node.input[1]], sizes[node.input[2]] = (names[:1],), (names,)
    return sizes


def paired(template: Template, policy: Policy) -> tuple[Template, Policy]:
    """The template in which every layer of reduced rank is two nodes, and the policy of its graph, as
    `LayerGraph.paired`. Weights of such nodes are not in it."""
    graph, plain = template.graph.paired(policy)
    if graph is template.graph:
        return template, plain
    between = between_pairs(template.graph, graph, template.values)
    second = {template.values[graph.consumers[value][0]]: value for value in between}

    def nodes() -> Iterator[onnx.NodeProto]:
        for node in template.nodes:
            value = second.get(node.output[0])
            if value is None:
                yield node
                continue
            layer = graph.layer_by_node[value]
            first = onnx.NodeProto()
            first.CopyFrom(node)
            del first.input[:]
            first.input.extend([node.input[0], layer.weight, layer.bias])
            first.name, first.output[0] = between[value], between[value]
            yield first
            ones = {"kernel_shape": [1] * (len(layer.weight_shape) - 2)} if layer.op == "conv" else {"transB": 1}
            inputs = [between[value], *list(node.input)[1:]]
            yield helper.make_node(node.op_type, inputs, list(node.output), name=node.name, **ones)

    return replace(template, graph=graph, nodes=tuple(nodes()), values={**template.values, **between}), plain


def between_pairs(graph: LayerGraph, pairs: LayerGraph, values: Mapping[str, str]) -> dict[str, str]:
    """Value between the layers of a pair -> its name in the file.

    Args:
        graph, pairs: before and after `LayerGraph.paired`.
        values: as of `Template`, of ``graph``.
    """
    inner = [node.name for node in pairs.nodes if node.name not in graph.node_by_name]
    return {value: f"{values[pairs.consumers[value][0]]}_reduced" for value in inner}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
