"""Half-precision layers in a typed ONNX model: which type every operator computes in, and the casts between them."""

from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from autocomp.policy import Precision

__all__ = ["FloatTypes", "is_half"]

_KINDS: Mapping[str, int] = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_NAMES: Mapping[int, str] = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
# Operators that stay in the half type of all they read. Others compute in float32.
_FOLLOWS = frozenset(
    {"Add", "AveragePool", "Clip", "Concat", "Flatten", "GlobalAveragePool", "HardSigmoid", "HardSwish", "MaxPool"}
    | {"Identity", "LeakyRelu", "Mul", "Pad", "ReduceMean", "Relu", "Reshape", "Sigmoid", "Slice", "Squeeze"}
    | {"Transpose", "Unsqueeze"}
)


def is_half(precision: Precision) -> bool:
    """Whether a layer computes in 16-bit floats."""
    return precision.weight in _KINDS


class FloatTypes:
    """The float types of the values of one file that is being written.

    A layer computes in the type that the policy gives it; what follows it stays in a half type until something
    needs float32: quantization, a layer or an addition of another type, or the model's output.

    Args:
        find: name -> the float32 tensor of that name that the file would carry, or None for a computed value.
        store: takes a tensor into the file.
    """

    def __init__(self, find: Callable[[str], NDArray[Any] | None], store: Callable[[onnx.TensorProto], None]) -> None:
        self._find = find
        self._store = store
        self._kinds: dict[str, int] = {}
        self._written: set[str] = set()

    def of_layer(self, precision: Precision) -> int:
        """The ONNX type that a layer's operators compute in."""
        return _KINDS.get(precision.weight, TensorProto.FLOAT)

    def of_operator(self, node: onnx.NodeProto) -> int:
        """The type of an operator that is no layer: the half type of all values it reads, else float32."""
        if not self._kinds or node.op_type not in _FOLLOWS:
            return TensorProto.FLOAT
        computed = [value for value in node.input if value and self._find(value) is None]
        kinds = {self._kinds.get(value, TensorProto.FLOAT) for value in computed}
        return kinds.pop() if len(kinds) == 1 else TensorProto.FLOAT

    def typed(self, node: onnx.NodeProto, kind: int) -> Iterator[onnx.NodeProto]:
        """The operator in a type, casts of what it reads before it. Changes the node's inputs."""
        for position, value in enumerate(node.input):
            if value:
                node.input[position] = yield from self.as_kind(value, kind)
        yield node
        if kind != TensorProto.FLOAT:
            self._kinds.update(dict.fromkeys(node.output, kind))

    def as_kind(self, value: str, kind: int) -> Generator[onnx.NodeProto, None, str]:
        """Yield a cast where one is needed, once; the generator returns the name to read."""
        if kind == self._kinds.get(value, TensorProto.FLOAT):
            return value
        tensor = self._find(value)
        if tensor is not None:
            if tensor.dtype != np.float32:
                return value
            name = f"{value}_{_NAMES[kind]}"
            self._store(_converted(name, tensor, kind))
            return name
        name = f"{value}_{_NAMES[kind]}"
        if name not in self._written:
            self._written.add(name)
            yield helper.make_node("Cast", [value], [name], name=name, to=kind)
        return name


def _converted(name: str, tensor: NDArray[Any], kind: int) -> onnx.TensorProto:
    data_type = helper.tensor_dtype_to_np_dtype(kind)
    return numpy_helper.from_array(np.ascontiguousarray(tensor.astype(data_type)), name)
