"""Weight codes of fewer than 8 bits, stored as bit planes that an engine unpacks once, when it loads the file."""

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from autocomp.quantization import QuantWeight

__all__ = ["pack", "planes_of", "stored", "unpacked", "with_codes"]

_PLANES, _SHAPE, _STEP = "_planes", "_shape", "_unpack_"


def planes_of(codes: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Bit planes (bits, ceil(n / 8)) of n codes in two's complement, the lowest bit first in planes and in bytes.

    Args:
        codes: of any shape, each within -2^(bits-1) and 2^(bits-1) - 1.
    """
    flat = codes.reshape(-1).view(np.uint8)
    planes = (flat[None, :] >> np.arange(bits, dtype=np.uint8)[:, None]) & 1
    return np.packbits(planes, axis=1, bitorder="little")


def stored(name: str, codes: NDArray[np.int8], bits: int) -> tuple[list[onnx.TensorProto], list[onnx.NodeProto]]:
    """Initializers, and nodes where some are needed, that give the int8 tensor ``name``."""
    return pack(name, codes, bits) if bits < 8 else ([numpy_helper.from_array(codes, name)], [])


def pack(name: str, codes: NDArray[np.int8], bits: int) -> tuple[list[onnx.TensorProto], list[onnx.NodeProto]]:
    """What stores codes in ``bits`` bits each, and the nodes that make the int8 tensor ``name`` of them.

    The nodes read initializers only, so that ONNX Runtime computes them while it loads the file, and runs what reads
    ``name`` as if the codes had been stored in 8 bits. Initializers whose names do not begin with ``name`` are the
    same for every weight of as many bits.
    """
    count = codes.size
    tensors: dict[str, NDArray[Any]] = {
        f"{name}{_PLANES}": planes_of(codes, bits)[:, :, None],
        f"{name}{_SHAPE}": np.array(codes.shape, np.int64),
        "unpack_shifts": np.arange(8, dtype=np.uint8),
        "unpack_one": np.array(1, np.uint8),
        f"unpack_places_{bits}": _places(bits)[:, None, None],
        "unpack_first": np.array([0], np.int64),
        "unpack_flat": np.array([-1], np.int64),
    }
    steps: list[tuple[str, list[str], dict[str, Any]]] = [
        ("BitShift", [f"{name}{_PLANES}", "unpack_shifts"], {"direction": "RIGHT"}),
        ("BitwiseAnd", ["", "unpack_one"], {}),
        ("Cast", [""], {"to": onnx.TensorProto.INT32}),
        ("Mul", ["", f"unpack_places_{bits}"], {}),
        ("ReduceSum", ["", "unpack_first"], {"keepdims": 0}),
        ("Cast", [""], {"to": onnx.TensorProto.INT8}),
    ]
    if count % 8:  # the last byte of each plane is filled up
        tensors[f"{name}_count"] = np.array([count], np.int64)
        steps += [("Reshape", ["", "unpack_flat"], {}), ("Slice", ["", "unpack_first", f"{name}_count"], {})]
    else:
        del tensors["unpack_flat"]
    steps.append(("Reshape", ["", f"{name}{_SHAPE}"], {}))
    nodes: list[onnx.NodeProto] = []
    for index, (op, inputs, attributes) in enumerate(steps):
        step = f"{name}{_STEP}{index}"
        result = name if index == len(steps) - 1 else step
        before = nodes[-1].output[0] if nodes else ""
        nodes.append(helper.make_node(op, [value or before for value in inputs], [result], name=step, **attributes))
    return [numpy_helper.from_array(array, key) for key, array in tensors.items()], nodes


def with_codes(data: bytes, weights: Mapping[str, QuantWeight]) -> bytes:
    """A fully exported model, whose integer weights are still float with a QuantizeLinear, with the codes themselves.

    Args:
        data: a serialized model whose initializers are named as parameters.
        weights: parameter name -> codes.
    """
    model = onnx.load_model_from_string(data)
    graph = model.graph
    names = {node.output[0]: node.input[0] for node in graph.node if node.input[0] in weights and _quantizes(node)}
    nodes = [node for node in graph.node if node.output[0] not in names]
    tensors = [tensor for tensor in graph.initializer if tensor.name not in names.values()]
    for node in nodes:
        node.input[:] = [f"{names[value]}_codes" if value in names else value for value in node.input]
    for name in dict.fromkeys(names.values()):
        own, unpacking = stored(f"{name}_codes", weights[name].codes, weights[name].bits)
        present = {tensor.name for tensor in tensors}
        tensors += [tensor for tensor in own if tensor.name not in present]
        nodes = [*unpacking, *nodes]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(tensors)
    return bytes(model.SerializeToString())


def _quantizes(node: onnx.NodeProto) -> bool:
    return bool(node.op_type == "QuantizeLinear")


def unpacked(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with packed codes as 8-bit initializers: what an engine that folds constants runs.

    A model without packed codes is returned as it is.
    """
    names = [tensor.name.removesuffix(_PLANES) for tensor in model.graph.initializer if tensor.name.endswith(_PLANES)]
    if not names:
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    codes = [numpy_helper.from_array(_codes_of(tensors, name), name) for name in names]
    steps = tuple(f"{name}{_STEP}" for name in names)
    nodes = [node for node in graph.node if not node.name.startswith(steps)]
    read = {value for node in nodes for value in node.input} | {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*kept, *codes])
    return result


def _codes_of(tensors: dict[str, onnx.TensorProto], name: str) -> NDArray[np.int8]:
    planes = numpy_helper.to_array(tensors[f"{name}{_PLANES}"])[:, :, 0]
    shape = tuple(int(size) for size in numpy_helper.to_array(tensors[f"{name}{_SHAPE}"]))
    bits = np.unpackbits(planes, axis=1, bitorder="little")[:, : prod(shape)].astype(np.int32)
    codes: NDArray[np.int8] = (bits * _places(len(planes))[:, None]).sum(0).astype(np.int8)
    return codes.reshape(shape)


def _places(bits: int) -> NDArray[np.int32]:
    """What each bit of a two's complement number counts, the lowest first."""
    return np.array([*(2**place for place in range(bits - 1)), -(2 ** (bits - 1))], np.int32)
