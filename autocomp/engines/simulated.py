"""A described device: latency from a roofline, outputs computed for real. An estimate, for tests and planning."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
import onnx as onnx_package
from numpy.typing import NDArray

from autocomp.capabilities import Capabilities, DeviceInfo, Numerics
from autocomp.engines.backends import BackendSpec
from autocomp.engines.structure import with_shapes
from autocomp.errors import ConfigError, EngineError
from autocomp.policy import FEWER_BITS, FP32, INT8
from autocomp.results import OperatorTimes

if TYPE_CHECKING:
    from autocomp.engines.onnxruntime import OnnxRuntimeEngine

__all__ = ["DESCRIPTIONS", "Description", "SimulatedBackend", "SimulatedEngine", "roofline_ms"]


@dataclass(frozen=True, slots=True)
class Description:
    """What a roofline needs to know of a device (Williams, Waterman, Patterson 2009).

    Attributes:
        name: readable.
        gmacs: peak 10^9 multiply-accumulates per second and thread, in fp32.
        int8_speedup: of the peak, in int8.
        gigabytes: memory traffic in 10^9 bytes per second.
        overhead_us: of each operator that is launched.
        channels, channels_int8: channel counts are computed as if rounded up to a multiple of this.
    """

    name: str
    gmacs: float
    int8_speedup: float
    gigabytes: float
    overhead_us: float
    channels: int
    channels_int8: int


DESCRIPTIONS: Mapping[str, Description] = {
    entry.name: entry
    for entry in (
        Description("simulated", 60.0, 3.0, 12.0, 4.0, 16, 16),
        Description("simulated-phone", 12.0, 3.5, 6.0, 15.0, 4, 16),
        Description("simulated-gpu", 8000.0, 2.0, 600.0, 3.0, 8, 32),
    )
}


class SimulatedBackend:
    """Builds engines whose times are computed from a `Description`, and say so."""

    name = "simulated"
    measures = False

    def __init__(self, spec: BackendSpec) -> None:
        """Raises: ConfigError if the hardware is not described."""
        hardware = spec.hardware or "simulated"
        if hardware not in DESCRIPTIONS:
            raise ConfigError(f"unknown simulated device {hardware!r}: use one of {', '.join(sorted(DESCRIPTIONS))}")
        self.batch = spec.batch
        self._threads = spec.threads
        self._description = DESCRIPTIONS[hardware]

    @property
    def device(self) -> DeviceInfo:
        return DeviceInfo(f"{self._description.name}-{self._threads}t", "simulated (an estimate)", self._threads)

    def capabilities(self) -> Capabilities:
        numerics = Numerics(signed_activations=False, symmetric_activations=False, weight_max=127)
        return Capabilities(precisions=(FP32, INT8, *FEWER_BITS), channel_multiple=8, numerics=numerics)

    def build(self, onnx: bytes) -> "SimulatedEngine":
        return SimulatedEngine(onnx, self.batch, roofline_ms(onnx, self._description, self.batch, self._threads))

    def profile(self, onnx: bytes, repeats: int) -> OperatorTimes:
        """See `autocomp.protocols.Backend`; every run takes the same."""
        found = operators_ms(onnx, self._description, self.batch, self._threads)
        return OperatorTimes(found, sum(found.values()))


class SimulatedEngine:
    """Times are the roofline's, always equal; outputs come from executing the model, Q/DQ pairs in exact float."""

    def __init__(self, onnx: bytes, batch: int, latency_ms: float) -> None:
        self._onnx: bytes | None = onnx
        self._batch = batch
        self._latency_ms = latency_ms
        self._executor: OnnxRuntimeEngine | None = None

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits; see `autocomp.protocols.Engine`. The last batch is filled up."""
        if self._executor is None:
            from autocomp.engines.onnxruntime import exact_engine

            self._executor = exact_engine(self._open(), self._batch)
        return self._executor.run(images)

    def time(self, repeats: int) -> NDArray[np.float64]:
        self._open()
        return np.full(repeats, self._latency_ms)

    def _open(self) -> bytes:
        if self._onnx is None:
            raise EngineError("this engine was closed: build it again")
        return self._onnx

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._onnx = self._executor = None


_FREE = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout", "Constant", "Shape"})
_ACTIVATIONS = frozenset({"Relu", "Clip"})
_PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})


def roofline_ms(onnx: bytes, device: Description, batch: int, threads: int) -> float:
    """Estimated latency of a model in ms: the sum of `operators_ms`. Raises: EngineError, as there."""
    return sum(operators_ms(onnx, device, batch, threads).values())


def operators_ms(onnx: bytes, device: Description, batch: int, threads: int) -> dict[str, float]:
    """Estimated ms of each operator, by the first value it writes: the slower of its arithmetic and its memory
    traffic, and an overhead where it is launched. Activations, and Q/DQ pairs between integer operators, cost nothing.

    Raises:
        EngineError: no ONNX model, or its shapes cannot be inferred.
    """
    model = with_shapes(onnx, batch)
    flow = _Flow(model)
    return {node.output[0]: _cost_us(node, flow, device, threads) / 1e3 for node in model.graph.node}


class _Flow:
    """Shapes, producers and readers of a model's values."""

    def __init__(self, model: onnx_package.ModelProto) -> None:
        graph = model.graph
        self.shapes: dict[str, tuple[int, ...]] = {}
        for tensor in graph.initializer:
            self.shapes[tensor.name] = tuple(int(size) for size in tensor.dims)
        for value in (*graph.input, *graph.output, *graph.value_info):
            self.shapes[value.name] = tuple(int(axis.dim_value) for axis in value.type.tensor_type.shape.dim)
        self.constants = {tensor.name for tensor in graph.initializer}
        self.producers = {value: node for node in graph.node for value in node.output}
        self.readers: dict[str, list[onnx_package.NodeProto]] = {}
        for node in graph.node:
            for value in node.input:
                self.readers.setdefault(value, []).append(node)

    def is_dequantized(self, value: str) -> bool:
        return value in self.producers and self.producers[value].op_type == "DequantizeLinear"

    def runs_int8(self, node: onnx_package.NodeProto) -> bool:
        """All it computes with comes from codes; a free operator passes on what it reads."""
        if node.op_type in _PRODUCTS:
            return all(self.is_dequantized(value) for value in node.input[:2])
        data = [value for value in node.input if value and value not in self.constants]
        return bool(data) and all(self.is_dequantized(value) for value in data) and self.writes_codes(node)

    def writes_codes(self, node: onnx_package.NodeProto) -> bool:
        readers = self.readers.get(node.output[0], [])
        if len(readers) == 1 and readers[0].op_type in _ACTIVATIONS | _FREE:
            return self.writes_codes(readers[0])
        return bool(readers) and all(reader.op_type == "QuantizeLinear" for reader in readers)

    def elements(self, value: str) -> int:
        return prod(self.shapes.get(value, ()))


def _cost_us(node: onnx_package.NodeProto, flow: _Flow, device: Description, threads: int) -> float:
    if node.op_type in _FREE or _is_fused(node, flow):
        return 0.0
    int8 = flow.runs_int8(node)
    width = 1 if int8 or node.op_type == "QuantizeLinear" else 4
    data = [value for value in dict.fromkeys((*node.input, *node.output)) if value]
    traffic = sum(flow.elements(value) for value in data) * width
    memory_us = traffic / device.gigabytes / 1e3
    compute_us = 0.0
    if node.op_type in _PRODUCTS:
        peak = device.gmacs * threads * (device.int8_speedup if int8 else 1.0)
        step = device.channels_int8 if int8 else device.channels
        compute_us = _macs(node, flow, step) / peak / 1e3
    return max(memory_us, compute_us) + device.overhead_us


def _is_fused(node: onnx_package.NodeProto, flow: _Flow) -> bool:
    """Whether an engine computes this operator inside another one."""
    source = flow.producers.get(node.input[0]) if node.input else None
    if node.op_type in _ACTIVATIONS:
        return source is not None and source.op_type in _PRODUCTS | {"Add"}
    if node.op_type == "QuantizeLinear":
        while source is not None and source.op_type in _ACTIVATIONS | _FREE:
            source = flow.producers.get(source.input[0])
        return source is not None and flow.runs_int8(source)
    if node.op_type == "DequantizeLinear":
        return node.input[0] in flow.constants or all(
            flow.runs_int8(reader) for reader in flow.readers.get(node.output[0], [])
        )
    return False


def _macs(node: onnx_package.NodeProto, flow: _Flow, step: int) -> int:
    """Multiply-accumulates with channels rounded up to whole steps."""
    weight, output = flow.shapes[node.input[1]], flow.shapes[node.output[0]]
    if node.op_type == "Conv":
        many, few, *kernel = weight
        groups = next((int(entry.i) for entry in node.attribute if entry.name == "group"), 1)
        inner = few if groups > 1 else _up(few, step)
        return output[0] * prod(output[2:]) * _up(many, step) * inner * prod(kernel)
    return prod(output[:-1]) * _up(output[-1], step) * _up(prod(weight) // max(output[-1], 1), step)


def _up(count: int, step: int) -> int:
    return ceil(count / step) * step
