"""Calibration caches of TensorRT 8 and 10, written into a float ONNX file as explicit Q/DQ pairs."""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from autocomp.engines.template import parse
from autocomp.errors import InputError

__all__ = ["CalibrationCache", "with_scales"]

_HEADER = re.compile(r"TRT-(\d+)-(\w*Calibration\w*)")
_ENTRY = re.compile(r"(.+): ([0-9a-fA-F]{8})")
_LAYERS = frozenset({"Conv", "Gemm", "MatMul"})
_FEWEST = 0.5  # of the layers that must be named, else the cache is another model's


@dataclass(frozen=True, slots=True)
class CalibrationCache:
    """Scales of a model's values: largest magnitude / 127.

    Attributes:
        version: of the TensorRT that wrote it, as its header has it (``8601``).
        algorithm: such as ``EntropyCalibration2``.
        scales: by the name of the value in the ONNX file that was calibrated.
    """

    version: str
    algorithm: str
    scales: Mapping[str, float]

    @classmethod
    def read(cls, path: Path) -> "CalibrationCache":
        """Read the text that an ``IInt8Calibrator`` writes: a header, then names with big-endian hexadecimal floats.

        Raises:
            InputError: the file is missing, or no such cache; the line is named.
        """
        try:
            first, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise InputError(f"cannot read the calibration cache {path}: {reason}") from error
        header = _HEADER.fullmatch(first.strip())
        if header is None:
            raise InputError(f"{path} is no calibration cache of TensorRT: its first line must be like TRT-8601-...")
        scales: dict[str, float] = {}
        for number, line in enumerate(lines, start=2):
            if not line.strip():
                continue
            entry = _ENTRY.fullmatch(line.strip())
            scale = struct.unpack("!f", bytes.fromhex(entry[2]))[0] if entry else float("nan")
            if entry is None or not isfinite(scale) or scale < 0:
                raise InputError(f"line {number} of {path} is no scale: calibrate again")
            scales[entry[1]] = scale
        return cls(header[1], header[2], scales)


def with_scales(data: bytes, cache: CalibrationCache) -> tuple[bytes, int, int]:
    """Quantize every convolution and product whose input the cache knows: its input by the cache's scale, its weight
    symmetrically by channel. Biases stay float.

    Args:
        data: the float ONNX file that was calibrated, or one with the same names.

    Returns:
        the file, how many layers are int8, and how many could be.

    Raises:
        EngineError: no ONNX model.
        InputError: the cache was made for another model, or the file is quantized already.
    """
    model = parse(data)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        raise InputError("the model is quantized already: leave the calibration cache out")
    layers = [
        node for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in tensors
    ]
    known = [node for node in layers if cache.scales.get(node.input[0], 0.0) > 0]
    if len(known) < max(1.0, _FEWEST * len(layers)):
        first = next((node.input[0] for node in layers if node not in known), "no layer")
        raise InputError(
            f"the calibration cache knows the inputs of {len(known)} of {len(layers)} layers ({first} is missing): it "
            "was made for another model or export; calibrate this file"
        )
    pairs: dict[str, list[onnx.NodeProto]] = {}
    written: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if any(node is layer for layer in known):
            value = node.input[0]
            if value not in pairs:
                pairs[value] = _pair(value, cache.scales[value], model.graph)
                written += pairs[value]
            written.append(_weight(node, numpy_helper.to_array(tensors[node.input[1]]), model.graph))
            node.input[0] = f"{value}_dq"
            node.input[1] = f"{node.name or node.output[0]}_weight_dq"
        written.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in written]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    return bytes(model.SerializeToString()), len(known), len(layers)


def _pair(value: str, scale: float, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """A Q/DQ pair behind a value."""
    names = [f"{value}_scale", f"{value}_zero_point"]
    arrays: list[NDArray[np.generic]] = [np.array(scale, np.float32), np.array(0, np.int8)]
    graph.initializer.extend(numpy_helper.from_array(array, name) for array, name in zip(arrays, names, strict=True))
    return [
        helper.make_node("QuantizeLinear", [value, *names], [f"{value}_q"], name=f"{value}_q"),
        helper.make_node("DequantizeLinear", [f"{value}_q", *names], [f"{value}_dq"], name=f"{value}_dq"),
    ]


def _weight(node: onnx.NodeProto, weight: NDArray[np.float32], graph: onnx.GraphProto) -> onnx.NodeProto:
    """A weight as codes, one scale an output channel, and the node that makes numbers of them."""
    transposed = any(entry.name == "transB" and entry.i for entry in node.attribute)
    axis = 0 if node.op_type == "Conv" or transposed else weight.ndim - 1
    others = tuple(position for position in range(weight.ndim) if position != axis)
    bound = np.abs(weight).max(axis=others, keepdims=True)
    scale = np.where(bound > 0, bound / 127, 1.0).astype(np.float32)
    codes = np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
    name = f"{node.name or node.output[0]}_weight"
    names = [f"{name}_{part}" for part in ("codes", "scale", "zero_point")]
    arrays = [codes, scale.reshape(-1), np.zeros(scale.size, np.int8)]
    graph.initializer.extend(numpy_helper.from_array(array, entry) for array, entry in zip(arrays, names, strict=True))
    return helper.make_node("DequantizeLinear", names, [f"{name}_dq"], name=f"{name}_dq", axis=axis)
