"""OpenVINO on the CPU: the second embedded engine."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import ceil
from types import TracebackType
from typing import Any, Self

import numpy as np
import openvino
from numpy.typing import NDArray
from onnx import ModelProto

from autocomp.capabilities import Capabilities, DeviceInfo, Numerics
from autocomp.engines.attribution import Attribution
from autocomp.engines.backends import BackendSpec
from autocomp.engines.feeds import fixed_shape, noise
from autocomp.engines.packing import unpacked
from autocomp.engines.processor import cpu_device, weight_max
from autocomp.engines.template import parse
from autocomp.errors import ConfigError, EngineError
from autocomp.policy import FEWER_BITS, FP32, INT8
from autocomp.results import OperatorTimes
from autocomp.rows import Inputs, parts_of, row_shape

__all__ = ["Kernel", "OpenVinoBackend", "OpenVinoEngine"]

_FAILURES: tuple[type[Exception], ...] = (RuntimeError, TypeError, ValueError)
_WARM_RUNS = 3  # before a profile counts
_PROFILES = 5  # engines that are built for one profile
_FEWEST_RUNS = 10  # of each of them: their sum is known to a few microseconds
_FACTS = frozenset({"layerType", "originalLayersNames", "runtimePrecision"})


class OpenVinoBackend:
    """Builds engines for the CPU plugin, one stream, one run at a time."""

    name = "openvino"
    measures = True

    def __init__(self, spec: BackendSpec) -> None:
        """Raises: ConfigError for a hardware name: this backend runs where it is."""
        if spec.hardware is not None:
            raise ConfigError(
                f"openvino runs on this machine: {spec.hardware!r} is no measured profile, see profile list"
            )
        self.batch = spec.batch
        self._threads = spec.threads

    @property
    def device(self) -> DeviceInfo:
        return cpu_device(f"openvino {openvino.__version__.split('-')[0]}", self._threads)

    def capabilities(self) -> Capabilities:
        # ResNet-20 of all int8 layers, batch 32, on AMX: uint8 with zero points 3.5 ms; symmetric int8 3.4 ms, but
        # half its codes are wasted behind a ReLU; symmetric uint8 5.1 ms; int8 with zero points 32 ms.
        # Held to instructions without 8-bit dot products, OpenVINO saturated with weights of 127.
        numerics = Numerics(signed_activations=False, symmetric_activations=False, weight_max=weight_max())
        return Capabilities(precisions=(FP32, INT8, *FEWER_BITS), channel_multiple=8, numerics=numerics)

    def build(self, onnx: bytes) -> "OpenVinoEngine":
        return OpenVinoEngine(onnx, self.batch, self._threads)

    def profile(self, onnx: bytes, repeats: int) -> OperatorTimes:
        """See `autocomp.protocols.Backend`; medians over several engines, for one tells only means, in whole us.

        Of linear layers that OpenVINO fuses into one kernel the first is given the time of all.
        """
        attribution = Attribution(onnx)
        runs = max(ceil(repeats / _PROFILES), _FEWEST_RUNS)
        found: dict[str, list[float]] = {}
        whole: list[float] = []
        for _ in range(_PROFILES):
            with OpenVinoEngine(onnx, self.batch, self._threads, profiled=True) as engine:
                engine.time(_WARM_RUNS)
                before = engine.totals_ms()
                whole.extend(engine.time(runs))
                after = engine.totals_ms()
                kernels = engine.kernels()
            sums: dict[str, float] = {}
            for kernel, owner in zip(kernels, attribution.of(kernels), strict=True):
                (own,) = kernel.output
                ms = (after.get(own, 0.0) - before.get(own, 0.0)) / runs
                sums[owner] = sums.get(owner, 0.0) + max(ms, 0.0)  # rounding may take more than there is
            for owner, ms in sums.items():
                found.setdefault(owner, []).append(ms)
        return OperatorTimes({owner: float(np.median(ms)) for owner, ms in found.items()}, float(np.median(whole)))


@dataclass(frozen=True, slots=True)
class Kernel:
    """A node of the graph that is executed, as `Attribution` reads it.

    Attributes:
        name: of the operators that were fused into it, separated by commas.
        input: names of the nodes it reads.
        output: its own name, which stands for its value.
        kind: such as ``Convolution``.
        precision: that it computes with, such as ``u8`` and ``f32``.
    """

    name: str
    input: tuple[str, ...]
    output: tuple[str]
    kind: str
    precision: str


class OpenVinoEngine:
    """One compiled model with one request; see `autocomp.protocols.Engine`."""

    def __init__(self, onnx: bytes, batch: int, threads: int, profiled: bool = False) -> None:
        """Raises: EngineError: no ONNX model, refused by the runtime, or of another batch size or interface."""
        # Codes that are unpacked inside the graph are not taken for a weight: such layers would run in float.
        parsed = unpacked(parse(onnx))
        try:
            model = _core().read_model(parsed.SerializeToString())
        except _FAILURES as error:
            reason = _unknown(error, parsed) or one_line(error)
            raise EngineError(f"openvino cannot build the model: {reason}") from error
        self._inputs = _inputs_of(model, batch)
        self._batch = batch
        self._runs = 0
        try:
            model.reshape({name: [batch, *shape] for name, shape in self._inputs.items()})
            self._compiled: Any = _core().compile_model(model, "CPU", _options(threads, profiled))
            self._request: Any = self._compiled.create_infer_request()
            self._images = {
                name: openvino.Tensor(openvino.Type.f32, openvino.Shape([batch, *shape]))
                for name, shape in self._inputs.items()
            }
            for name, tensor in self._images.items():
                self._request.set_tensor(name, tensor)
        except _FAILURES as error:
            raise EngineError(f"openvino cannot build the model: {one_line(error)}") from error
        self._noise = noise(self._inputs, batch)
        self._classes = self._infer(self._noise).shape[1:]

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of any number of images; the last batch is filled up with zeros, whose results are dropped."""
        self._open()
        shape = row_shape(self._inputs)
        if images.shape[1:] != shape:
            raise EngineError(f"the engine reads images of shape {shape}, not {images.shape[1:]}: check the data")
        results = [np.empty((0, *self._classes), np.float32)]
        for start in range(0, len(images), self._batch):
            results.append(self._infer(parts_of(images[start : start + self._batch], self._inputs)))
        return np.concatenate(results)

    def time(self, repeats: int) -> NDArray[np.float64]:
        """Durations in ms on fixed random images; inputs and outputs stay bound, so nothing is copied."""
        request = self._open()
        for name, value in self._noise.items():
            self._images[name].data[:] = value
        times = np.empty(repeats)
        try:
            for index in range(repeats):
                start = time.perf_counter_ns()
                request.infer(share_outputs=True)
                times[index] = time.perf_counter_ns() - start
        except _FAILURES as error:
            raise EngineError(f"openvino failed while timing: {one_line(error)}") from error
        self._runs += repeats
        return times / 1e6

    def totals_ms(self) -> dict[str, float]:
        """What each executed node took in all runs so far, of a profiled engine: OpenVINO tells their mean."""
        entries = self._open().profiling_info
        return {entry.node_name: entry.real_time.total_seconds() * 1e3 * self._runs for entry in entries}

    def kernels(self) -> list[Kernel]:
        """The executed graph without its constants, in topological order."""
        self._open()
        found = []
        for node in self._compiled.get_runtime_model().get_ordered_ops():
            facts = {key: value.astype(str) for key, value in node.get_rt_info().items() if key in _FACTS}
            if facts["layerType"] != "Const":
                read = tuple(entry.get_source_output().get_node().get_friendly_name() for entry in node.inputs())
                own = (node.get_friendly_name(),)
                found.append(
                    Kernel(facts["originalLayersNames"], read, own, facts["layerType"], facts["runtimePrecision"])
                )
        return found

    def _infer(self, images: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """Logits of at most a batch."""
        request = self._open()
        count = len(next(iter(images.values())))
        for name, value in images.items():
            self._images[name].data[:count] = value
            self._images[name].data[count:] = 0
        try:
            request.infer(share_outputs=True)
        except _FAILURES as error:
            raise EngineError(f"openvino failed while running: {one_line(error)}") from error
        self._runs += 1
        logits: NDArray[np.float32] = request.get_output_tensor().data[:count].copy()
        return logits

    def _open(self) -> Any:
        if self._request is None:
            raise EngineError("this engine was closed: build it again")
        return self._request

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._request = self._compiled = None
        self._images = {}


def one_line(error: Exception) -> str:
    """A runtime's message without its source lines."""
    text = " ".join([*str(error).split(), ""])
    text = re.sub(r"(Exception from|Check '.*?' failed at) \S+:\d+: ", "", text)
    return text.strip()[:300] or type(error).__name__


def _unknown(error: Exception, model: ModelProto) -> str | None:
    """The first node whose operator the message lists as unknown; it does not name the node itself."""
    listed = re.search(r"(?:No conversion rule found for|not support the following ONNX) operations: (.+)", str(error))
    kinds = re.findall(r"\w+", listed[1]) if listed else []
    node = next((node for node in model.graph.node if node.op_type in kinds), None)
    return None if node is None else f"it has no operator {node.op_type}, which {node.name} is"


def _inputs_of(model: Any, batch: int) -> Inputs:
    """Shapes of one image's inputs. Raises: EngineError: another batch size or interface."""
    kinds = {value.element_type for value in (*model.inputs, *model.outputs)}
    shapes = [value.partial_shape for value in model.inputs]
    fits = kinds == {openvino.Type.f32} and len(model.outputs) == 1 and shapes
    if not fits or any(shape.rank.is_dynamic or len(shape) < 2 for shape in shapes):
        raise EngineError("the model must read float32 tensors and return one: export it so")
    return {
        value.any_name: fixed_shape([size.get_length() if size.is_static else None for size in shape], batch)
        for value, shape in zip(model.inputs, shapes, strict=True)
    }


@cache
def _core() -> Any:
    return openvino.Core()


def _options(threads: int, profiled: bool) -> dict[str, Any]:
    """One run at a time, and nothing computed in fewer bits than the file says."""
    return {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "ENABLE_HYPER_THREADING": True,  # or fewer threads may run than were asked for
        "ENABLE_CPU_PINNING": False,  # other programs' threads are free to move away, these should be too
        "PERF_COUNT": profiled,
    }
