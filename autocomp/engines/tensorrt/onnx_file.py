"""An ONNX file as TensorRT wants it: static shapes, symmetric int8, float biases."""

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.defs import onnx_opset_version

from autocomp.engines.packing import unpacked
from autocomp.engines.template import parse
from autocomp.errors import EngineError

__all__ = ["check_size", "prepare"]

LARGEST_BYTES = 2**31 - 1  # of a protobuf message
_QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})


def prepare(data: bytes, batch: int | None) -> bytes:
    """Check a model and write it for TensorRT.

    The batch is fixed; packed weights become int8 again; an int32 bias behind a DequantizeLinear becomes a float one;
    and a dequantization of activations by channel whose scales are all equal becomes one by tensor.

    Args:
        data: serialized ONNX, read from one float32 tensor to one output.
        batch: images in a run; None to leave their number free, for an optimization profile.

    Raises:
        EngineError: naming what TensorRT would refuse, or silently misread, and what to do.
    """
    check_size(len(data))
    model = unpacked(parse(data))
    _check_opset(model)
    _fix_shape(model, batch)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            raise EngineError(
                f"the weights of the model lie in another file ({tensor.name}): save them inside the ONNX file, "
                "which holds at most 2 GB"
            )
    folded = [_fold_bias(node, tensors) for node in model.graph.node]
    kept = [node for node, bias in zip(model.graph.node, folded, strict=True) if bias is None]
    for node in kept:
        if node.op_type in _QUANTIZERS:
            _check_symmetric(node, tensors)
            _merge_channels(node, tensors)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    tensors |= {bias.name: bias for bias in folded if bias is not None}
    read = {value for node in nodes for value in node.input} | {value.name for value in model.graph.output}
    model.graph.initializer.extend(tensor for name, tensor in tensors.items() if name in read)
    return bytes(model.SerializeToString())


def check_size(size_bytes: int) -> None:
    """Raises: EngineError: the file is larger than an ONNX message can be."""
    if size_bytes > LARGEST_BYTES:
        raise EngineError(
            f"the model takes {size_bytes / 1e9:.1f} GB and an ONNX file holds at most 2 GB: prune it, or store its "
            "weights in fewer bits"
        )


def _check_opset(model: onnx.ModelProto) -> None:
    for entry in model.opset_import:
        newest = onnx_opset_version()
        if entry.domain in ("", "ai.onnx") and entry.version > newest:
            raise EngineError(
                f"the model is of opset {entry.version}, and the newest known one is {newest}: export it with "
                f"opset_version={newest} or update onnx"
            )


def _fix_shape(model: onnx.ModelProto, batch: int | None) -> None:
    """Give the input its batch. Raises: EngineError: another interface or batch, or other free sizes."""
    inputs, outputs = model.graph.input, model.graph.output
    given = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in inputs if value.name not in given]
    kinds = [value.type.tensor_type.elem_type for value in (*inputs, *outputs)]
    if len(inputs) != 1 or len(outputs) != 1 or kinds != [TensorProto.FLOAT] * 2:
        raise EngineError("the model must read one float32 tensor and return one: export it so")
    first, *others = inputs[0].type.tensor_type.shape.dim or [None]
    if first is None or not others:
        raise EngineError("the model must read one float32 tensor and return one: export it so")
    if first.HasField("dim_value") and first.dim_value != batch:
        fixed = first.dim_value
        wanted = "a range" if batch is None else batch
        raise EngineError(f"the model has batch {fixed}, not {wanted}: give --batch {fixed} or free that axis")
    free = [axis.dim_param or "?" for axis in others if not axis.HasField("dim_value")]
    if free:
        raise EngineError(
            f"the model's input has dynamic sizes ({', '.join(free)}) and TensorRT no optimization profile for them: "
            "export it with fixed sizes; only the number of images may be free (--batches)"
        )
    if batch is not None:
        first.dim_value = batch


def _fold_bias(node: onnx.NodeProto, tensors: Mapping[str, TensorProto]) -> TensorProto | None:
    """The float tensor that a DequantizeLinear of constant int32 codes stands for."""
    codes = tensors.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
    if codes is None or codes.data_type != TensorProto.INT32 or node.input[1] not in tensors:
        return None
    scale = numpy_helper.to_array(tensors[node.input[1]])
    real = (numpy_helper.to_array(codes).astype(np.float64) * scale).astype(np.float32)
    return numpy_helper.from_array(real, node.output[0])


def _check_symmetric(node: onnx.NodeProto, tensors: Mapping[str, TensorProto]) -> None:
    """Raises: EngineError: codes that are unsigned, which TensorRT takes for signed ones, or a zero point."""
    default = node.op_type == "QuantizeLinear" and not any(entry.name == "output_dtype" for entry in node.attribute)
    zero_point = tensors.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    codes = tensors.get(node.input[0])
    advice = "quantize it again with symmetric int8 (ActivationSymmetric, QInt8)"
    unsigned = zero_point is None and (default or (codes is not None and codes.data_type == TensorProto.UINT8))
    if unsigned or (zero_point is not None and zero_point.data_type == TensorProto.UINT8):
        raise EngineError(f"{node.name or node.op_type} has uint8 codes and TensorRT computes with int8: {advice}")
    if zero_point is not None and zero_point.data_type == TensorProto.INT8:
        values = numpy_helper.to_array(zero_point)
        if values.any():
            found = int(values.flat[np.flatnonzero(values)[0]])
            raise EngineError(
                f"{node.name or node.op_type} has zero point {found} and TensorRT's int8 is symmetric: {advice}"
            )


def _merge_channels(node: onnx.NodeProto, tensors: dict[str, TensorProto]) -> None:
    """Scale activations by one number where all channels have the same; scales of weights stay as they are."""
    if node.input[0] in tensors or node.input[1] not in tensors:
        return
    scale = numpy_helper.to_array(tensors[node.input[1]])
    if scale.ndim == 0 or len(np.unique(scale)) != 1:
        return
    parameters = {"scale": np.float32(scale.flat[0]), "zero_point": np.int8(0)}
    for position, (part, value) in enumerate(parameters.items(), start=1):
        name = f"{node.output[0]}_{part}"
        tensors[name] = numpy_helper.from_array(np.array(value), name)
        if position < len(node.input):
            node.input[position] = name
    others = [entry for entry in node.attribute if entry.name != "axis"]
    del node.attribute[:]
    node.attribute.extend(others)
