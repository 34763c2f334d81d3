"""From a policy to a typed ONNX model by editing one exported base model: no export inside a trial."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from autocomp.capabilities import Numerics
from autocomp.engines.float8 import FLOAT8_OPSET, Float8
from autocomp.engines.float_types import FloatTypes
from autocomp.engines.packing import stored
from autocomp.engines.template import Template, paired
from autocomp.errors import EngineError
from autocomp.graph import Layer
from autocomp.policy import Policy
from autocomp.quantization import QuantParams, QuantWeight, fp8_key, place

__all__ = ["emit"]

BFLOAT16_OPSET = 22  # the first whose convolutions may be of that type


def emit(
    template: Template,
    policy: Policy,
    tensors: Mapping[str, NDArray[np.float32]],
    weights: Mapping[str, QuantWeight],
    params: Mapping[str, QuantParams],
    numerics: Numerics,
) -> bytes:
    """The model under a policy, int8 written as typed Q/DQ pairs, weights of fewer than 8 bits packed (`packing`).

    Args:
        template: of the uncompressed model.
        policy: decides branches and precisions; the channels are those of ``tensors``.
        tensors: parameter name -> float32 value; those not given keep the template's value.
        weights: parameter name -> codes, of every integer and fp8 layer that is left.
        params: for each value of ``quantization.place(graph, policy)``, and by `fp8_key` for what fp8 layers read.
        numerics: of the engine: types of the activations' codes. The bias stays float.

    Raises:
        EngineError: something is unknown to the template, or a quantized value or weight has no parameters.
    """
    template, policy = paired(template, policy)
    writer = _Writer(template, policy, tensors, weights, params, numerics)
    model = onnx.ModelProto()
    model.CopyFrom(template.model)
    model.graph.node.extend(writer.nodes())
    for name in list(writer.initializers):  # copied, and freed one by one
        model.graph.initializer.append(writer.initializers.pop(name))
    oldest = {"bf16": BFLOAT16_OPSET, "fp8": FLOAT8_OPSET}
    needed = max((oldest.get(precision.weight, 0) for precision in policy.precisions.values()), default=0)
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = max(entry.version, needed)
    return bytes(model.SerializeToString())


class _Writer:
    """Collects the nodes and initializers of one emission."""

    def __init__(
        self,
        template: Template,
        policy: Policy,
        tensors: Mapping[str, NDArray[np.float32]],
        weights: Mapping[str, QuantWeight],
        params: Mapping[str, QuantParams],
        numerics: Numerics,
    ) -> None:
        graph = template.graph
        self._template = template
        self._tensors = dict(tensors)
        self._weights = weights
        self._codes_type = np.int8 if numerics.signed_activations else np.uint8
        plan = place(graph, policy)
        self._int8 = frozenset(plan.layers)
        self._fp8 = plan.fp8
        self._params = params
        missing = [name for name in (*plan.layers, *plan.fp8) if graph.layer_by_name[name].weight not in weights]
        if missing:
            raise EngineError(f"no weight codes for {missing[0]}: compress this policy again")
        self._quantized: dict[str, QuantParams] = {}
        for value in (*plan.values, *map(fp8_key, plan.fp8.values())):
            if value not in params:
                raise EngineError(f"no quantization parameters for {value}: calibrate this policy again")
        for value in plan.values:
            smallest, largest = numerics.activation_range
            if not smallest <= params[value].zero_point <= largest:
                raise EngineError(f"the parameters of {value} are not of this engine's int8: calibrate again for it")
            self._quantized[self._onnx_name(value)] = params[value]
        self._bypass = {}
        for name in policy.dropped:
            branch = graph.branch_by_name[name]
            self._bypass[self._onnx_name(branch.add)] = self._onnx_name(branch.stream)
        self._layer_by_output = {
            self._onnx_name(layer.node): layer for layer in graph.layers if layer.node in template.values
        }
        known = {name for layer in graph.layers for name in (layer.weight, layer.bias)} | template.initializers.keys()
        known |= {name for parts in template.sizes.values() for part in parts for name in part}
        unknown = sorted(tensors.keys() - known)
        if unknown:
            raise EngineError(f"the exported model has no parameter {unknown[0]}: export this policy in full")
        self.initializers: dict[str, onnx.TensorProto] = {}
        self._policy = policy
        self._floats = FloatTypes(self._tensor, self._add)
        self._eights = Float8(self._floats, self._add)

    def nodes(self) -> Iterator[onnx.NodeProto]:
        """The live nodes in topological order, Q/DQ pairs behind the values that are quantized."""
        output = self._template.output
        for name in self._template.graph.inputs:
            if name in self._template.values:
                yield from self._pair(self._onnx_name(name))
        for original in self._live():
            node = onnx.NodeProto()
            node.CopyFrom(original)
            layer = self._layer_by_output.get(node.output[0])
            for position, value in enumerate(original.input):
                node.input[position] = self._read(value)
            if node.output[0] == output and output in self._quantized:
                node.output[0] = f"{output}_float"  # the pair's own output takes the model's output name
            if layer is None:
                yield from self._kept(self._typed(node, self._floats.of_operator(node)))
            else:
                yield from self._kept(self._layer(node, layer))
            for value in original.output:
                yield from self._pair(value)
        if output in self._bypass:
            yield from self._typed(
                helper.make_node("Identity", [self._read(output)], [output], name="node_output"), TensorProto.FLOAT
            )

    def _kept(self, nodes: Iterator[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
        """The nodes, the initializers they read carried over."""
        for node in nodes:
            for value in node.input:
                self._keep(value)
            yield node

    def _typed(self, node: onnx.NodeProto, kind: int) -> Iterator[onnx.NodeProto]:
        """An operator in a float type; the model's own output is float32."""
        result = node.output[0]
        if result == self._template.output and kind != TensorProto.FLOAT:
            node.output[0] = f"{result}_half"
            yield from self._floats.typed(node, kind)
            yield helper.make_node("Cast", [node.output[0]], [result], name=f"{result}_cast", to=TensorProto.FLOAT)
        else:
            yield from self._floats.typed(node, kind)

    def _onnx_name(self, value: str) -> str:
        try:
            return self._template.values[value]
        except KeyError:
            raise EngineError(f"the exported model has no value for {value}: export this policy in full") from None

    def _resolve(self, value: str) -> str:
        while value in self._bypass:
            value = self._bypass[value]
        return value

    def _read(self, value: str) -> str:
        """The name under which readers find a value of the template."""
        value = self._resolve(value)
        if value not in self._quantized or value == self._template.output:
            return value
        return f"{value}_dq"

    def _live(self) -> list[onnx.NodeProto]:
        """Nodes the output still depends on, bypassed additions left out."""
        needed = {self._resolve(self._template.output)}
        live = []
        for node in reversed(self._template.nodes):
            if any(value in needed for value in node.output):
                live.append(node)
                needed.update(self._resolve(value) for value in node.input)
        return live[::-1]

    def _layer(self, node: onnx.NodeProto, layer: Layer) -> Iterator[onnx.NodeProto]:
        """The layer's node with its weight and bias, an int8 weight as codes and a DequantizeLinear before it."""
        weight = self._tensors.get(layer.weight)
        if weight is None:
            weight = numpy_helper.to_array(self._template.initializers[layer.weight])
        group = layer.groups_of(weight.shape[0])
        if layer.groups > 1:
            next(entry for entry in node.attribute if entry.name == "group").i = group
        if layer.bias in self._tensors and len(node.input) < 3:
            node.input.append(layer.bias)
        wide = layer.op == "linear" and len(self._template.graph.node_by_name[layer.node].shape) > 1
        if layer.name not in self._int8:
            if layer.name in self._fp8:
                scale = self._params[fp8_key(self._fp8[layer.name])].scale
                yield from self._eights.before(node, layer.weight, self._weights[layer.weight], scale, turned=wide)
            else:
                yield from self._float_input(node, layer, weight.shape[1] * group)
            parts: Iterable[onnx.NodeProto] = [node]
            if wide:
                self._tensors[layer.weight] = np.ascontiguousarray(weight.T)
                parts = _product(node, "Add")
            for part in parts:
                yield from self._typed(part, self._floats.of_layer(self._policy.precision(layer.name)))
            return
        found = self._weights[layer.weight]
        product = wide or (layer.op == "linear" and not self._writes_codes(layer))
        names = [f"{layer.weight}_{part}" for part in ("codes", "scale", "zero_point")]
        codes = np.ascontiguousarray(found.codes.T) if product else found.codes
        tensors, unpacking = stored(names[0], codes, found.bits)
        self.initializers.update((tensor.name, tensor) for tensor in tensors)
        yield from unpacking
        self._store(names[1], found.scale)
        self._store(names[2], np.zeros(len(found.scale), np.int8))
        node.input[1] = f"{layer.weight}_dq"
        axis = 1 if product else 0
        yield helper.make_node("DequantizeLinear", names, [node.input[1]], name=node.input[1], axis=axis)
        if not product:
            yield from self._typed(node, TensorProto.FLOAT)
            return
        # A Gemm with a float result needs an int32 bias to run as int8; a product does not. Its bias comes by a Sum,
        # because ONNX Runtime would join a MatMul and an Add to a Gemm again, and run that in float.
        yield from _product(node, "Sum")

    def _float_input(self, node: onnx.NodeProto, layer: Layer, channels: int) -> Iterator[onnx.NodeProto]:
        """Dequantize a float layer's input for it alone, with the one scale repeated for each channel.

        ONNX Runtime takes a float layer between a per-tensor DequantizeLinear and a QuantizeLinear for one that
        someone forgot to quantize, and rounds its weights to int8 by itself.
        """
        value = node.input[0].removesuffix("_dq")
        if value not in self._quantized:
            return
        params = self._quantized[value]
        names = [f"{layer.weight}_input_{part}" for part in ("scale", "zero_point")]
        self._store(names[0], np.full(channels, params.scale, np.float32))
        self._store(names[1], np.full(channels, params.zero_point, self._codes_type))
        node.input[0] = f"{layer.weight}_input_dq"
        inputs = [f"{value}_q", *names]
        axis = 1 if layer.op == "conv" else -1
        yield helper.make_node("DequantizeLinear", inputs, [node.input[0]], name=node.input[0], axis=axis)

    def _writes_codes(self, layer: Layer) -> bool:
        """Whether a linear layer's result is quantized, behind a fused activation or at once."""
        graph = self._template.graph
        values = [layer.node, *graph.consumers[layer.node]]
        return any(self._template.values.get(value) in self._quantized for value in values)

    def _keep(self, value: str) -> None:
        """Carry an initializer over: from ``tensors`` where given, else from the template."""
        if value in self.initializers:
            return
        if value in self._template.sizes:
            parts = self._template.sizes[value]
            self._store(value, np.array([sum(map(self._length, part)) for part in parts], np.int64))
        elif value in self._tensors:
            self._store(value, np.ascontiguousarray(self._tensors[value], dtype=np.float32))
        elif value in self._template.initializers:
            self.initializers[value] = self._template.initializers[value]

    def _length(self, name: str) -> int:
        given = self._tensors.get(name)
        return self._template.graph.parameters[name][0] if given is None else len(given)

    def _tensor(self, name: str) -> NDArray[Any] | None:
        """The constant of that name that the file carries or would; None for a computed value."""
        if name in self._tensors:
            return self._tensors[name]
        found = self.initializers.get(name, self._template.initializers.get(name))
        return None if found is None else numpy_helper.to_array(found)

    def _store(self, name: str, array: NDArray[Any]) -> None:
        self._add(numpy_helper.from_array(array, name))

    def _add(self, tensor: onnx.TensorProto) -> None:
        self.initializers[tensor.name] = tensor

    def _pair(self, value: str) -> Iterator[onnx.NodeProto]:
        """QuantizeLinear and DequantizeLinear behind a quantized value."""
        if value not in self._quantized:
            return
        params = self._quantized[value]
        # Equal parameters share their tensors: engines see by that which operators may pass codes on unchanged.
        suffix = f"{params.scale!r}_{params.zero_point}"
        scale, zero_point = f"scale_{suffix}", f"zero_point_{suffix}"
        self._store(scale, np.array(params.scale, np.float32))
        self._store(zero_point, np.array(params.zero_point, self._codes_type))
        is_output = value == self._template.output
        source, result = (f"{value}_float", value) if is_output else (value, f"{value}_dq")
        source = yield from self._floats.as_kind(source, TensorProto.FLOAT)
        yield helper.make_node("QuantizeLinear", [source, scale, zero_point], [f"{value}_q"], name=f"{value}_q")
        yield helper.make_node("DequantizeLinear", [f"{value}_q", scale, zero_point], [result], name=f"{value}_dq")


def _product(node: onnx.NodeProto, bias: str) -> Iterator[onnx.NodeProto]:
    """A Gemm as a MatMul and an operator that adds the bias, if it has one."""
    result = f"{node.output[0]}_product" if len(node.input) > 2 else node.output[0]
    yield helper.make_node("MatMul", node.input[:2], [result], name=node.name)
    if len(node.input) > 2:
        yield helper.make_node(bias, [result, node.input[2]], node.output, name=f"{node.name}_bias")
