"""A typed ONNX file as a torch module, operator by operator."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from autocomp.engines.packing import unpacked
from autocomp.engines.template import parse
from autocomp.errors import EngineError

__all__ = ["OnnxModule"]

Attributes = Mapping[str, Any]
Operator = Callable[[list[Any], Attributes], Tensor]
_TYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT8: torch.uint8,
    TensorProto.INT64: torch.int64,
}


class OnnxModule(nn.Module):
    """Computes what the file says, in the types that it says; weights are buffers, channels last.

    Integers that steer an operator (axes, pads, target shapes) stay numbers, so that nothing is read back from the
    device while it runs.
    """

    def __init__(self, data: bytes) -> None:
        """Raises: EngineError: no ONNX model, or an operator that is not known here; it is named."""
        super().__init__()
        graph = unpacked(parse(data)).graph
        self._names: dict[str, str] = {}
        self._numbers: dict[str, Any] = {}
        for index, tensor in enumerate(graph.initializer):
            array = numpy_helper.to_array(tensor)
            if tensor.data_type == TensorProto.INT64:
                self._numbers[tensor.name] = array.tolist()
                continue
            value = _tensor(array, tensor.data_type)
            self._names[tensor.name] = f"tensor_{index}"
            self.register_buffer(self._names[tensor.name], _channels_last(value))
        self._steps: list[tuple[Operator, Attributes, list[str], str]] = []
        for node in graph.node:
            if node.op_type not in OPERATORS or len(node.output) != 1:
                raise EngineError(f"torch has no operator {node.op_type}, which {node.name} is: use another engine")
            attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
            self._steps.append((OPERATORS[node.op_type], attributes, list(node.input), node.output[0]))
        given = {tensor.name for tensor in graph.initializer}
        self.inputs = [value.name for value in graph.input if value.name not in given]
        self.output = graph.output[0].name

    def forward(self, *images: Tensor) -> Tensor:
        """Logits of a batch, of which each input of the file is given in its order."""
        values = self._given(images)
        for operator, attributes, inputs, output in self._steps:
            values[output] = operator([values[name] for name in inputs], attributes)
        logits: Tensor = values[self.output]
        return logits

    def steps(self, *images: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Every operator's value as it is computed, by the name it has in the file."""
        values = self._given(images)
        for operator, attributes, inputs, output in self._steps:
            values[output] = operator([values[name] for name in inputs], attributes)
            yield output, values[output]

    def _given(self, images: Sequence[Tensor]) -> dict[str, Any]:
        """What is there before the first operator; an input that is left out is None."""
        tensors = {name: getattr(self, buffer) for name, buffer in self._names.items()}
        given = zip(self.inputs, map(_channels_last, images), strict=True)
        return {"": None, **dict(given), **self._numbers, **tensors}


def _tensor(array: np.ndarray[Any, Any], data_type: int) -> Tensor:
    for kind in (TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN):  # which numpy has from another package
        if data_type == kind:
            return torch.from_numpy(array.astype(np.float32)).to(_TYPES[kind])
    return torch.from_numpy(np.array(array))


def _channels_last(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value


def _pads(attributes: Attributes, axes: int) -> tuple[list[int], list[int]]:
    """Zeros before and after each spatial axis."""
    pads = list(attributes.get("pads", [0] * 2 * axes))
    return pads[:axes], pads[axes:]


def _padded(value: Tensor, attributes: Attributes, fill: float) -> tuple[Tensor, list[int]]:
    """The value, padded where both sides differ, and the equal padding that is left to the operator."""
    before, after = _pads(attributes, value.ndim - 2)
    if before == after:
        return value, before
    flat = [amount for pair in zip(reversed(before), reversed(after), strict=True) for amount in pair]
    return F.pad(value, flat, value=fill), [0] * len(before)


def _convolution(inputs: list[Any], attributes: Attributes) -> Tensor:
    value, padding = _padded(inputs[0], attributes, 0.0)
    weight, bias = inputs[1], inputs[2] if len(inputs) > 2 else None
    axes = value.ndim - 2
    strides, dilations = (tuple(attributes.get(name, [1] * axes)) for name in ("strides", "dilations"))
    function: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[axes]
    result: Tensor = function(value, weight, bias, strides, tuple(padding), dilations, attributes.get("group", 1))
    return result


def _maximum(inputs: list[Any], attributes: Attributes) -> Tensor:
    value, padding = _padded(inputs[0], attributes, float("-inf"))
    kernel, strides = tuple(attributes["kernel_shape"]), tuple(attributes.get("strides", [1, 1]))
    return F.max_pool2d(value, kernel, strides, tuple(padding), ceil_mode=bool(attributes.get("ceil_mode", 0)))


def _average(inputs: list[Any], attributes: Attributes) -> Tensor:
    before, after = _pads(attributes, 2)
    if before != after:
        raise EngineError("torch-cuda pads averages equally on both sides only: use another engine")
    kernel, strides = tuple(attributes["kernel_shape"]), tuple(attributes.get("strides", [1, 1]))
    return F.avg_pool2d(
        inputs[0], kernel, strides, tuple(before), bool(attributes.get("ceil_mode", 0)),
        bool(attributes.get("count_include_pad", 0)),
    )  # fmt: skip


def _product(inputs: list[Any], attributes: Attributes) -> Tensor:
    left, right = inputs[:2]
    left = left.T if attributes.get("transA") else left
    right = right.T if attributes.get("transB") else right
    if len(inputs) > 2 and left.ndim == 2:
        scales = attributes.get("beta", 1.0), attributes.get("alpha", 1.0)
        return torch.addmm(inputs[2], left, right, beta=scales[0], alpha=scales[1])
    result: Tensor = left @ right
    return result


def _reshape(inputs: list[Any], attributes: Attributes) -> Tensor:
    value, shape = inputs
    keeps = not attributes.get("allowzero", 0)
    wanted = [value.shape[axis] if size == 0 and keeps else size for axis, size in enumerate(shape)]
    result: Tensor = value.reshape(wanted)
    return result


def _slice(inputs: list[Any], attributes: Attributes) -> Tensor:
    del attributes
    value, starts, ends = inputs[:3]
    axes = inputs[3] if len(inputs) > 3 and inputs[3] is not None else list(range(len(starts)))
    steps = inputs[4] if len(inputs) > 4 and inputs[4] is not None else [1] * len(starts)
    where = [slice(None)] * value.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        where[axis] = slice(start, min(end, value.shape[axis]), step)
    result: Tensor = value[tuple(where)]
    return result


def _pad(inputs: list[Any], attributes: Attributes) -> Tensor:
    del attributes
    value, pads = inputs[:2]
    before, after = pads[: value.ndim], pads[value.ndim :]
    flat = [amount for pair in zip(reversed(before), reversed(after), strict=True) for amount in pair]
    fill = inputs[2] if len(inputs) > 2 and inputs[2] is not None else 0.0
    return F.pad(value, flat, value=float(fill))


def _clip(inputs: list[Any], attributes: Attributes) -> Tensor:
    del attributes
    low, high = [*inputs[1:], None, None][:2]
    return torch.clamp(inputs[0], low, high)


def _mean(inputs: list[Any], attributes: Attributes) -> Tensor:
    axes = inputs[1] if len(inputs) > 1 else attributes["axes"]
    result: Tensor = inputs[0].mean(tuple(axes), keepdim=bool(attributes.get("keepdims", 1)))
    return result


def _flatten(inputs: list[Any], attributes: Attributes) -> Tensor:
    value, axis = inputs[0], attributes.get("axis", 1)
    result: Tensor = value.reshape(prod(value.shape[:axis]), -1)
    return result


def _along(scale: Tensor, value: Tensor, attributes: Attributes) -> Tensor:
    """A scale, of the tensor or of an axis's entries, in a shape that broadcasts."""
    if scale.ndim == 0 or scale.numel() == 1:
        return scale.reshape([1] * value.ndim)
    shape = [1] * value.ndim
    shape[attributes.get("axis", 1)] = -1
    return scale.reshape(shape)


def _quantize(inputs: list[Any], attributes: Attributes) -> Tensor:
    value, scale, *others = inputs
    kind = others[0].dtype if others else torch.uint8
    zero = _along(others[0], value, attributes).to(value.dtype) if others else 0
    codes: Tensor = value / _along(scale, value, attributes)
    if kind.is_floating_point:
        return codes.clamp(torch.finfo(kind).min, torch.finfo(kind).max).to(kind)
    info = torch.iinfo(kind)
    result: Tensor = (torch.round(codes) + zero).clamp(info.min, info.max).to(kind)
    return result


def _dequantize(inputs: list[Any], attributes: Attributes) -> Tensor:
    codes, scale, *others = inputs
    value = codes.to(scale.dtype)
    if others:
        value = value - _along(others[0], codes, attributes).to(scale.dtype)
    result: Tensor = value * _along(scale, codes, attributes)
    return result


def _sum(inputs: list[Any], attributes: Attributes) -> Tensor:
    del attributes
    result: Tensor = inputs[0]
    for value in inputs[1:]:
        result = result + value
    return result


def _squeeze(inputs: list[Any], attributes: Attributes) -> Tensor:
    axes = inputs[1] if len(inputs) > 1 else attributes["axes"]
    result: Tensor = inputs[0].squeeze(tuple(axes))
    return result


def _unsqueeze(inputs: list[Any], attributes: Attributes) -> Tensor:
    value: Tensor = inputs[0]
    for axis in sorted(inputs[1] if len(inputs) > 1 else attributes["axes"]):
        value = value.unsqueeze(axis)
    return value


OPERATORS: Mapping[str, Operator] = {
    "Add": lambda x, a: x[0] + x[1],
    "AveragePool": _average,
    "Cast": lambda x, a: x[0].to(_TYPES[a["to"]]),
    "Clip": _clip,
    "Concat": lambda x, a: torch.cat(x, a["axis"]),
    "Conv": _convolution,
    "DequantizeLinear": _dequantize,
    "Flatten": _flatten,
    "Gemm": _product,
    "GlobalAveragePool": lambda x, a: x[0].mean((2, 3), keepdim=True),
    "HardSigmoid": lambda x, a: torch.clamp(a.get("alpha", 0.2) * x[0] + a.get("beta", 0.5), 0, 1),
    "HardSwish": lambda x, a: F.hardswish(x[0]),
    "Identity": lambda x, a: x[0],
    "LeakyRelu": lambda x, a: F.leaky_relu(x[0], a.get("alpha", 0.01)),
    "MatMul": _product,
    "MaxPool": _maximum,
    "Mul": lambda x, a: x[0] * x[1],
    "Pad": _pad,
    "QuantizeLinear": _quantize,
    "ReduceMean": _mean,
    "Relu": lambda x, a: F.relu(x[0]),
    "Reshape": _reshape,
    "Sigmoid": lambda x, a: torch.sigmoid(x[0]),
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Sum": _sum,
    "Transpose": lambda x, a: x[0].permute(tuple(a["perm"])),
    "Unsqueeze": _unsqueeze,
}
