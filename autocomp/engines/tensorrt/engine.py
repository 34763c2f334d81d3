"""A built engine on a GPU."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from autocomp.engines.cuda import Cuda
from autocomp.engines.cuda.measure import Stopwatch, copies
from autocomp.engines.cuda.telemetry import Nvml
from autocomp.engines.onnxruntime import OnnxRuntimeEngine, exact_engine
from autocomp.engines.remedies import explain
from autocomp.engines.tensorrt.flavour import Flavour
from autocomp.errors import EngineError
from autocomp.results import Copies

__all__ = ["AheadOfTimeEngine", "TensorRtEngine", "logger_of"]

_WARM_RUNS = 3  # before a graph is captured: TensorRT allocates and compiles in the first ones


class AheadOfTimeEngine:
    """An engine for GPUs that are not here: its outputs are computed by ONNX Runtime on the CPU from the same file,
    and its time is not known.
    """

    def __init__(self, onnx: bytes, batch: int, targets: tuple[str, ...]) -> None:
        """Raises: EngineError: ONNX Runtime cannot run the file, which has bfloat16 layers, for example."""
        self._elsewhere = f"the engine was built ahead of time for {', '.join(targets)}: time it on such a GPU"
        self._executor: OnnxRuntimeEngine | None = exact_engine(onnx, batch)

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits, Q/DQ pairs computed in float; see `autocomp.protocols.Engine`."""
        return self._open().run(images)

    def time(self, repeats: int) -> NDArray[np.float64]:
        """Raises: EngineError: always."""
        self._open()
        raise EngineError(self._elsewhere)

    def _open(self) -> OnnxRuntimeEngine:
        if self._executor is None:
            raise EngineError("this engine was closed: build it again")
        return self._executor

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor = None


class TensorRtEngine:
    """See `autocomp.protocols.Engine`. Memory is bound once, and a run is one launch of a CUDA graph where it can be
    captured."""

    def __init__(self, flavour: Flavour, plan: bytes, cuda: Cuda, batch: int) -> None:
        """Raises: EngineError: the plan is of another version or GPU, or does not fit into the GPU's memory."""
        self._trt = trt = flavour.load()
        self._errors: list[str] = []
        self._logger = logger_of(trt, self._errors)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        self._context: Any = self._engine.create_execution_context() if self._engine is not None else None
        if self._context is None:
            raise EngineError(f"{flavour.engine} cannot load the engine: {explain(' '.join(self._errors[:1]))}")
        self._cuda = cuda
        self._batch = batch
        self._stream = cuda.stream()
        self._watch = Stopwatch(cuda, Nvml(cuda.info.bus))
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        shapes = {name: tuple(self._engine.get_tensor_shape(name)) for name in names}
        source, result = sorted(names, key=lambda name: self._engine.get_tensor_mode(name) != trt.TensorIOMode.INPUT)
        if shapes[source][0] < 0:  # free, within the engine's optimization profile
            self._context.set_input_shape(source, (batch, *shapes[source][1:]))
            shapes = {name: tuple(self._context.get_tensor_shape(name)) for name in names}
        self._images = np.zeros(shapes[source], np.float32)
        self._logits = np.zeros(shapes[result], np.float32)
        self._noise = np.random.default_rng(0).standard_normal(shapes[source], np.float32)
        self._addresses = [cuda.allocate(values.nbytes) for values in (self._images, self._logits)]
        for name, address in zip((source, result), self._addresses, strict=True):
            self._context.set_tensor_address(name, address)
        for _ in range(_WARM_RUNS):
            self._enqueue()
        cuda.synchronize(self._stream)
        self._launch: Callable[[], None] = cuda.capture(self._stream, self._enqueue) or self._enqueue

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of any number of images; the last batch is filled up with zeros, whose results are dropped."""
        self._open()
        shape = self._images.shape[1:]
        if images.ndim != self._images.ndim or images.shape[1:] != shape:
            raise EngineError(f"the engine reads images of shape {shape}, not {images.shape[1:]}: check the data")
        results = [np.empty((0, *self._logits.shape[1:]), np.float32)]
        for start in range(0, len(images), self._batch):
            part = images[start : start + self._batch]
            self._images[: len(part)] = part
            self._images[len(part) :] = 0
            self._cuda.upload(self._addresses[0], self._images, self._stream)
            self._launch()
            self._cuda.download(self._logits, self._addresses[1], self._stream)
            results.append(self._logits[: len(part)].copy())
        return np.concatenate(results)

    def time(self, repeats: int) -> NDArray[np.float64]:
        """Device times in ms on fixed random images that are on the device already."""
        self._open()
        self._cuda.upload(self._addresses[0], self._noise, self._stream)
        self._cuda.synchronize(self._stream)
        return self._watch.time(self._launch, self._stream, repeats)

    def copies(self) -> Copies:
        """What moving the images to the device and the logits back takes, which `time` leaves out."""
        self._open()
        source, result = self._addresses
        return copies(
            self._cuda,
            self._stream,
            lambda: self._cuda.upload(source, self._noise, self._stream),
            lambda: self._cuda.download(self._logits, result, self._stream),
        )

    def profile(self, repeats: int) -> tuple[dict[str, float], float]:
        """Median ms of TensorRT's layers by name, and of whole runs, under its profiler and without a graph."""
        context = self._open()
        found: dict[str, list[float]] = {}
        context.profiler = _profiler_of(self._trt, found)
        self._cuda.upload(self._addresses[0], self._noise, self._stream)
        times = self._watch.time(self._enqueue, self._stream, repeats)
        return {name: float(np.median(ms[-repeats:])) for name, ms in found.items()}, float(np.median(times))

    def inspect(self) -> str:
        """What the engine inspector says, as JSON; names alone unless the engine was built with details."""
        self._open()
        inspector = self._engine.create_engine_inspector()
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise EngineError(f"TensorRT failed while running: {explain(' '.join(self._errors[-1:]))}")

    def _open(self) -> Any:
        if self._context is None:
            raise EngineError("this engine was closed: build it again")
        return self._context

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._context is not None:
            self._cuda.synchronize(self._stream)
            self._launch = self._context = self._engine = None  # type: ignore[assignment]
            for address in self._addresses:
                self._cuda.free(address)
            self._cuda.release(self._stream)


def logger_of(trt: Any, errors: list[str]) -> Any:
    """A logger that keeps errors and prints nothing."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                errors.append(message)

    return Logger()


def _profiler_of(trt: Any, found: dict[str, list[float]]) -> Any:
    """Collects the ms of each layer's runs by name."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer: str, ms: float) -> None:
            found.setdefault(layer, []).append(ms)

    return Profiler()
