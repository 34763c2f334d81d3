"""ONNX Runtime on the CPU: the embedded default engine."""

import json
import re
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as state

from autocomp.capabilities import Capabilities, DeviceInfo, Numerics
from autocomp.engines.attribution import Attribution
from autocomp.engines.backends import BackendSpec
from autocomp.engines.feeds import fixed_shape, noise
from autocomp.engines.processor import cpu_device, weight_max
from autocomp.engines.template import parse
from autocomp.errors import ConfigError, EngineError
from autocomp.policy import FEWER_BITS, FP32, INT8
from autocomp.results import OperatorTimes
from autocomp.rows import parts_of, row_shape

__all__ = ["OnnxRuntimeBackend", "OnnxRuntimeEngine", "exact_engine", "session_options"]

_FAILURES: tuple[type[Exception], ...] = (
    state.EPFail, state.EngineError, state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf,
    state.ModelLoaded, state.NoModel, state.NoSuchFile, state.NotImplemented, state.RuntimeException,
    RuntimeError, ValueError,
)  # fmt: skip
_SILENT = 4  # only fatal messages
_WARM_RUNS = 3  # before a profile counts
_RUN = "model_run"
_KERNEL = "_kernel_time"  # behind a node's name in a profile


class OnnxRuntimeBackend:
    """Builds engines for the CPU execution provider, all optimizations on, one run at a time."""

    name = "onnxruntime"
    measures = True

    def __init__(self, spec: BackendSpec) -> None:
        """Raises: ConfigError for a hardware name: this backend runs where it is."""
        if spec.hardware is not None:
            raise ConfigError(
                f"onnxruntime runs on this machine: {spec.hardware!r} is no measured profile, see profile list"
            )
        self.batch = spec.batch
        self._threads = spec.threads

    @property
    def device(self) -> DeviceInfo:
        return cpu_device(f"onnxruntime {ort.__version__}", self._threads)

    def capabilities(self) -> Capabilities:
        numerics = Numerics(signed_activations=False, symmetric_activations=False, weight_max=weight_max())
        return Capabilities(precisions=(FP32, INT8, *FEWER_BITS), channel_multiple=8, numerics=numerics)

    def build(self, onnx: bytes) -> "OnnxRuntimeEngine":
        return OnnxRuntimeEngine(onnx, self.batch, self._threads)

    def optimized(self, onnx: bytes, path: Path) -> bytes:
        """The graph the runtime really executes, also written to ``path``.

        Raises:
            EngineError: the runtime refused the model.
        """
        options = session_options(self._threads)
        options.optimized_model_filepath = str(path)
        _session(onnx, options)
        return path.read_bytes()

    def profile(self, onnx: bytes, repeats: int) -> OperatorTimes:
        """See `autocomp.protocols.Backend`; the runtime's own profiler has whole microseconds."""
        with TemporaryDirectory(prefix="autocomp-") as folder:
            options = session_options(self._threads)
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
            with OnnxRuntimeEngine(onnx, self.batch, self._threads, options) as engine:
                engine.time(_WARM_RUNS + repeats)
                events = json.loads(Path(engine.end_profiling()).read_text())
            nodes = parse((Path(folder) / "optimized.onnx").read_bytes()).graph.node
        owners = dict(zip((node.name for node in nodes), Attribution(onnx).of(nodes), strict=True))
        runs: dict[str, list[float]] = {}
        whole = [event["dur"] / 1e3 for event in events if event["name"] == _RUN]
        for event in events:
            if event["cat"] == "Node" and event["name"].endswith(_KERNEL):
                runs.setdefault(event["name"].removesuffix(_KERNEL), []).append(event["dur"] / 1e3)
        found: dict[str, float] = {}
        for name, times in runs.items():
            found[owners[name]] = found.get(owners[name], 0.0) + float(np.median(times[-repeats:]))
        return OperatorTimes(found, float(np.median(whole[-repeats:])))


class OnnxRuntimeEngine:
    """One session; see `autocomp.protocols.Engine`."""

    def __init__(self, onnx: bytes, batch: int, threads: int, options: ort.SessionOptions | None = None) -> None:
        """Raises: EngineError: no ONNX model, refused by the runtime, or of another batch size or interface."""
        parse(onnx)  # a clearer error than the runtime's
        self._session: Any = _session(onnx, options or session_options(threads))
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if not inputs or len(outputs) != 1 or any(e.type != "tensor(float)" or len(e.shape) < 2 for e in inputs):
            raise EngineError("the model must read float32 tensors and return one: export it so")
        self._inputs = {entry.name: fixed_shape(entry.shape, batch) for entry in inputs}
        self._batch = batch
        self._output = outputs[0].name
        images = noise(self._inputs, batch)
        self._binding = self._session.io_binding()
        self._images = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in images.items()}
        for name, value in self._images.items():
            self._binding.bind_ortvalue_input(name, value)
        try:
            first = self._session.run([self._output], images)[0]
        except _FAILURES as error:
            raise EngineError(f"onnxruntime cannot run the model: {one_line(error)}") from error
        self._logits = ort.OrtValue.ortvalue_from_numpy(first)
        self._binding.bind_ortvalue_output(self._output, self._logits)

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of any number of images; the last batch is filled up with zeros, whose results are dropped."""
        shape = row_shape(self._inputs)
        if images.shape[1:] != shape:
            raise EngineError(f"the engine reads images of shape {shape}, not {images.shape[1:]}: check the data")
        results = []
        for start in range(0, len(images), self._batch):
            part = np.ascontiguousarray(images[start : start + self._batch], dtype=np.float32)
            count = len(part)
            if count < self._batch:
                part = np.concatenate([part, np.zeros((self._batch - count, *shape), np.float32)])
            try:
                results.append(self._open().run([self._output], parts_of(part, self._inputs))[0][:count])
            except _FAILURES as error:
                raise EngineError(f"onnxruntime failed while running: {one_line(error)}") from error
        if not results:
            return np.empty((0, *self._logits.shape()[1:]), np.float32)
        return np.concatenate(results)

    def time(self, repeats: int) -> NDArray[np.float64]:
        """Durations in ms on fixed random images; inputs and outputs stay bound, so nothing is copied."""
        session, binding = self._open(), self._binding
        times = np.empty(repeats)
        try:
            for index in range(repeats):
                start = time.perf_counter_ns()
                session.run_with_iobinding(binding)
                times[index] = time.perf_counter_ns() - start
        except _FAILURES as error:
            raise EngineError(f"onnxruntime failed while timing: {one_line(error)}") from error
        return times / 1e6

    def _open(self) -> Any:
        if self._session is None:
            raise EngineError("this engine was closed: build it again")
        return self._session

    def end_profiling(self) -> str:
        """The file that a profiling session wrote."""
        return str(self._open().end_profiling())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = self._binding = None
        self._images = {}


def exact_engine(onnx: bytes, batch: int) -> OnnxRuntimeEngine:
    """Computes outputs for engines that are not here, Q/DQ pairs in exact float: they do not depend on whether this
    machine's 8-bit products saturate.

    Raises:
        EngineError: as `OnnxRuntimeEngine`.
    """
    options = session_options(threads=1)
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    # It takes a ReLU in front of fp8 codes for one that these cut off themselves, as uint8 codes from 0 on do.
    options.add_session_config_entry("optimization.disable_specified_optimizers", "ReluQuantRewrite")
    return OnnxRuntimeEngine(onnx, batch, 1, options)


def session_options(threads: int) -> ort.SessionOptions:
    """Sequential execution with all optimizations, silent."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = _SILENT
    return options


def one_line(error: Exception) -> str:
    """A runtime's message without its error code and source lines."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", " ".join(str(error).split()))
    return re.sub(r"\S*/onnxruntime/\S+\s", "", text)[:300] or type(error).__name__


def _session(onnx: bytes, options: ort.SessionOptions) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    except _FAILURES as error:
        raise EngineError(f"onnxruntime cannot build the model: {one_line(error)}") from error
