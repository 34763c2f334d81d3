"""What can be read off an ONNX model: its structure, its size, its int8 layers."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, shape_inference

from autocomp.engines.packing import unpacked
from autocomp.engines.template import parse
from autocomp.errors import EngineError
from autocomp.graph import LayerGraph

__all__ = ["has_sparse_weights", "initializer_bytes", "int8_layers", "structure_digest", "with_shapes"]

LARGE_BYTES = 1024  # of a tensor that gives other values no shape

_QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})
_WEIGHTS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8})
_INTEGER_LAYERS = frozenset(
    {"QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat"}
)


def initializer_bytes(onnx: bytes) -> int:
    """Bytes of all initializers, as a size budget counts them.

    Raises:
        EngineError: no ONNX model.
    """
    return sum(numpy_helper.to_array(tensor).nbytes for tensor in parse(onnx).graph.initializer)


def with_shapes(onnx: bytes, batch: int) -> onnx.ModelProto:
    """The model with the shape of every value for a batch, packed weights unpacked, large ones without their values.

    Raises:
        EngineError: no ONNX model, or its shapes do not fit together.
    """
    model = unpacked(parse(onnx))
    for tensor in model.graph.initializer:  # inference copies the model thrice, and asks weights for their shapes alone
        if len(tensor.raw_data) > LARGE_BYTES:
            tensor.ClearField("raw_data")
    for value in (*model.graph.input, *model.graph.output):
        axes = value.type.tensor_type.shape.dim
        if len(axes) == 0:
            raise EngineError(f"the model's {value.name} has no shape: export it with fixed sizes")
        axes[0].dim_value = batch
    try:
        return shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except shape_inference.InferenceError as error:
        raise EngineError(f"the model is not valid: {' '.join(str(error).split())[:300]}") from error


def structure_digest(onnx: bytes) -> str:
    """SHA-256 of what an engine's latency depends on, and of nothing else.

    Operators and their order, wiring, attributes, shapes, types, integer constants (axes, pads, targets of a
    reshape), the placement of Q/DQ pairs, the kind of each zero point (at the edge of the range, where engines fold
    a ReLU; zero; or other), which pairs share scale and zero point, and which weights are 2:4 sparse. Not names, not
    the values of weights, and not how few bits a weight is stored in: an engine unpacks it before it runs.

    Raises:
        EngineError: no ONNX model.
    """
    digest = hashlib.sha256()
    for line in _describe(unpacked(parse(onnx))):
        digest.update(repr(line).encode())
    return digest.hexdigest()


def has_sparse_weights(onnx: bytes) -> bool:
    """Whether some weight has zeros in two of every four places along the axis that it is summed over.

    Raises:
        EngineError: no ONNX model.
    """
    return any(map(_is_sparse, unpacked(parse(onnx)).graph.initializer))


def int8_layers(optimized: bytes, graph: LayerGraph) -> frozenset[str]:
    """Names of the layers that run in integers in a model that ONNX Runtime has optimized and written back.

    A layer is known by its weight's initializer, whose name begins with the parameter's name.
    """
    read = {
        value
        for node in parse(optimized).graph.node
        if node.op_type in _INTEGER_LAYERS
        for value in node.input
        if value.endswith("_codes")
    }
    return frozenset(layer.name for layer in graph.layers if f"{layer.weight}_codes" in read)


def _describe(model: onnx.ModelProto) -> Iterator[object]:
    graph = model.graph
    yield sorted((entry.domain, entry.version) for entry in model.opset_import)
    numbers: dict[str, int] = {}
    for value in graph.input:
        numbers[value.name] = len(numbers)
        kind = value.type.tensor_type
        # A free axis is written down as such: what it is called says nothing.
        yield kind.elem_type, [axis.dim_value if axis.HasField("dim_value") else None for axis in kind.shape.dim]
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    shared: dict[tuple[bytes, bytes], int] = {}
    for node in graph.node:
        parameters = frozenset(node.input[1:3] if node.op_type in _QUANTIZERS else ())
        inputs = [
            _tensor(tensors[value], value in parameters)
            if value in tensors
            else numbers.setdefault(value, len(numbers))
            for value in node.input
        ]
        for value in node.output:
            numbers[value] = len(numbers)
        pair = tuple(_data(tensors[value]) for value in node.input[1:3] if value in tensors)
        sharing = shared.setdefault(pair, len(shared)) if node.op_type in _QUANTIZERS and len(pair) == 2 else None
        yield node.domain, node.op_type, inputs, _attributes(node), sharing
    yield [numbers.get(value.name) for value in graph.output]


def _tensor(tensor: onnx.TensorProto, parameter: bool) -> object:
    shape = tuple(tensor.dims)
    if parameter and tensor.data_type in (onnx.TensorProto.UINT8, onnx.TensorProto.INT8):
        array = numpy_helper.to_array(tensor)
        edge = np.iinfo(array.dtype).min
        kind = "edge" if (array == edge).all() else "zero" if not array.any() else "other"
        return tensor.data_type, shape, kind
    if tensor.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32) or (not parameter and _is_bound(tensor)):
        return tensor.data_type, shape, _data(tensor)
    return (tensor.data_type, shape, "2:4") if not parameter and _is_sparse(tensor) else (tensor.data_type, shape)


def _is_sparse(tensor: onnx.TensorProto) -> bool:
    """Whether a weight has the pattern: (out, in, *kernel), or (in, out) for a product."""
    if len(tensor.dims) < 2 or tensor.data_type not in _WEIGHTS:
        return False
    array = numpy_helper.to_array(tensor)
    turned = (array.T,) if array.ndim == 2 else ()
    # One row tells almost always, at no cost.
    return any(_has_pattern(weight[:1]) and _has_pattern(weight) for weight in (array, *turned))


def _has_pattern(weight: NDArray[Any]) -> bool:
    out, read = weight.shape[:2]
    if read % 4 or not weight.size:
        return False
    return bool(((weight.reshape(out, read // 4, 4, -1) != 0).sum(axis=2) <= 2).all())


def _is_bound(tensor: onnx.TensorProto) -> bool:
    """A float scalar, such as the bound of a Clip, which decides whether an engine can fold it."""
    return tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 0


def _data(tensor: onnx.TensorProto) -> bytes:
    return numpy_helper.to_array(tensor).tobytes()


def _attributes(node: onnx.NodeProto) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for entry in node.attribute:
        value = helper.get_attribute_value(entry)
        if isinstance(value, onnx.TensorProto):
            value = (value.data_type, tuple(value.dims), _data(value))
        elif entry.type in (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS, onnx.AttributeProto.STRINGS):
            value = list(value)
        found.append((entry.name, value))
    return sorted(found, key=lambda item: item[0])
