"""Layers in fp8: pairs of QuantizeLinear and DequantizeLinear of type E4M3 in front of them."""

from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from autocomp.engines.float_types import FloatTypes
from autocomp.quantization import QuantWeight

__all__ = ["FLOAT8_OPSET", "Float8"]

FLOAT8_OPSET = 19
"""The first whose QuantizeLinear writes that type."""


class Float8:
    """Writes what stands in front of fp8 layers, with scales by tensor and without zero points.

    Args:
        floats: types of the values written so far.
        store: takes a tensor into the file.
    """

    def __init__(self, floats: FloatTypes, store: Callable[[onnx.TensorProto], None]) -> None:
        self._floats = floats
        self._store = store
        self._written: set[str] = set()
        self._zero = numpy_helper.from_array(np.zeros((), ml_dtypes.float8_e4m3fn), "zero_point_fp8")

    def before(
        self, node: onnx.NodeProto, weight: str, found: QuantWeight, scale: float, *, turned: bool
    ) -> Iterator[onnx.NodeProto]:
        """A pair that what a layer reads passes through, one for all fp8 layers that read it, and its weight's codes.

        Changes the node's inputs.

        Args:
            weight: name of the parameter.
            found: its codes.
            scale: of what the layer reads.
            turned: whether the codes are stored transposed.
        """
        read = node.input[0]
        self._store(self._zero)
        node.input[0] = f"{read}_fp8_dq"
        if read not in self._written:
            self._written.add(read)
            self._store(numpy_helper.from_array(np.array(scale, np.float32), f"{read}_fp8_scale"))
            source = yield from self._floats.as_kind(read, TensorProto.FLOAT)
            pair, between = [f"{read}_fp8_scale", self._zero.name], f"{read}_fp8_q"
            yield helper.make_node("QuantizeLinear", [source, *pair], [between], name=between)
            yield helper.make_node("DequantizeLinear", [between, *pair], [node.input[0]], name=node.input[0])
        codes = np.ascontiguousarray(found.codes.T) if turned else found.codes
        self._store(numpy_helper.from_array(codes, f"{weight}_codes"))
        self._store(numpy_helper.from_array(found.scale.reshape(()), f"{weight}_scale"))
        node.input[1] = f"{weight}_dq"
        names = [f"{weight}_codes", f"{weight}_scale", self._zero.name]
        yield helper.make_node("DequantizeLinear", names, [node.input[1]], name=node.input[1])
