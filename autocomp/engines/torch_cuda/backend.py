"""PyTorch on an NVIDIA GPU as an engine."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autocomp.capabilities import Capabilities, DeviceInfo
from autocomp.engines.backends import BackendSpec
from autocomp.engines.cuda import open_cuda
from autocomp.engines.cuda.measure import Stopwatch, copies
from autocomp.engines.cuda.telemetry import Nvml
from autocomp.engines.template import parse
from autocomp.engines.torch_cuda.onnx_module import OnnxModule
from autocomp.errors import ConfigError, EngineError
from autocomp.policy import FP32, Precision
from autocomp.results import Copies, OperatorTimes

__all__ = ["TorchCudaBackend", "TorchCudaEngine"]

COMPILED = "torch-cuda-compiled"
_WARM_RUNS = 3  # before a graph is captured or a profile counts
_DEVICE = "cuda:0"


class TorchCudaBackend:
    """Runs the file's operators channels last in one CUDA graph; ``torch-cuda-compiled`` compiles them before.

    It computes no int8: a layer's Q/DQ pairs would be computed in float, which costs time.
    """

    measures = True

    def __init__(self, spec: BackendSpec) -> None:
        """Raises: ConfigError: a hardware name, or no GPU that this PyTorch can use."""
        if spec.hardware is not None:
            raise ConfigError(f"{spec.name} runs on this machine, not on {spec.hardware!r}: leave the hardware out")
        if not torch.cuda.is_available():
            built = "PyTorch finds none" if torch.version.cuda else "this PyTorch is built for CPUs alone"
            raise ConfigError(f"no CUDA device is found ({built}): run 'autocomp doctor' to see what is missing")
        self._spec = spec
        self._gpu = open_cuda().info

    @property
    def name(self) -> str:
        return self._spec.name

    @property
    def batch(self) -> int:
        return self._spec.batch

    @property
    def device(self) -> DeviceInfo:
        tf32 = "on" if self._spec.tf32 else "off"
        return self._gpu.device(f"{self.name} {torch.__version__}", self._spec.threads, tf32=tf32)

    def capabilities(self) -> Capabilities:
        return Capabilities((FP32, Precision("fp16", "fp16"), Precision("bf16", "bf16")), channel_multiple=8)

    def build(self, onnx: bytes) -> "TorchCudaEngine":
        return TorchCudaEngine(onnx, self._spec, Nvml(self._gpu.bus))

    def profile(self, onnx: bytes, repeats: int) -> OperatorTimes:
        """See `autocomp.protocols.Backend`; operators are launched one by one, so that each costs a launch."""
        with TorchCudaEngine(onnx, self._spec, Nvml(self._gpu.bus)) as engine:
            return engine.operators(repeats)


class TorchCudaEngine:
    """See `autocomp.protocols.Engine`."""

    def __init__(self, onnx: bytes, spec: BackendSpec, telemetry: Nvml) -> None:
        """Raises: EngineError: no ONNX model, an unknown operator, or one that does not fit into the GPU's memory."""
        shape = input_shape(onnx, spec.batch)
        self._batch, self._tf32 = spec.batch, spec.tf32
        self._module: OnnxModule | None = OnnxModule(onnx).eval()
        self._clock = _TorchClock()
        self._watch = Stopwatch(self._clock, telemetry)
        noise = np.random.default_rng(0).standard_normal((spec.batch, *shape)).astype(np.float32)
        with _errors():
            self._module.to(_DEVICE)
            self._noise = torch.from_numpy(noise).to(_DEVICE)
            self._images = self._noise.clone()
            work: Callable[[Tensor], Tensor] = self._module
            if spec.name == COMPILED:
                work = torch.compile(self._module, mode="max-autotune-no-cudagraphs", dynamic=False)
            self._graph, self._logits = self._captured(work)

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of any number of images; the last batch is filled up with zeros, whose results are dropped."""
        self._open()
        shape = tuple(self._images.shape[1:])
        if images.ndim != len(shape) + 1 or images.shape[1:] != shape:
            raise EngineError(f"the engine reads images of shape {shape}, not {images.shape[1:]}: check the data")
        results = [np.empty((0, *self._logits.shape[1:]), np.float32)]
        with _errors(), torch.cuda.stream(self._clock.stream):
            for start in range(0, len(images), self._batch):
                part = torch.from_numpy(np.ascontiguousarray(images[start : start + self._batch], dtype=np.float32))
                self._images.zero_()
                self._images[: len(part)] = part.to(_DEVICE)
                self._graph.replay()
                results.append(self._logits[: len(part)].cpu().numpy())
        return np.concatenate(results)

    def time(self, repeats: int) -> NDArray[np.float64]:
        """Device times in ms on fixed random images that are on the device already."""
        self._open()
        with _errors(), torch.cuda.stream(self._clock.stream):
            self._images.copy_(self._noise)
            return self._watch.time(self._graph.replay, 0, repeats)

    def copies(self) -> Copies:
        """What moving the images to the device and the logits back takes, which `time` leaves out."""
        self._open()
        images = self._noise.cpu()
        with _errors(), torch.cuda.stream(self._clock.stream):
            return copies(self._clock, 0, lambda: self._images.copy_(images), self._logits.cpu)

    def operators(self, repeats: int) -> OperatorTimes:
        """Median ms of each operator, launched one by one."""
        module, clock = self._open(), self._clock
        runs: dict[str, list[float]] = {}
        with _errors(), torch.no_grad(), _tf32(self._tf32), torch.cuda.stream(clock.stream):
            for index in range(_WARM_RUNS + repeats):
                events = [clock.marked()]
                names = []
                for name, _ in module.steps(self._noise):
                    names.append(name)
                    events.append(clock.marked())
                clock.synchronize(0)
                if index >= _WARM_RUNS:
                    for name, begin, end in zip(names, events[:-1], events[1:], strict=True):
                        runs.setdefault(name, []).append(clock.elapsed_ms(begin, end))
        medians = {name: float(np.median(ms)) for name, ms in runs.items()}
        return OperatorTimes(medians, sum(medians.values()))

    def _captured(self, work: Callable[[Tensor], Tensor]) -> tuple[Any, Tensor]:
        torch.cuda.synchronize()  # weights and images were copied on another stream
        with torch.no_grad(), _tf32(self._tf32):
            with torch.cuda.stream(self._clock.stream):
                for _ in range(_WARM_RUNS):
                    work(self._images)
            self._clock.stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._clock.stream):
                logits = work(self._images)
        return graph, logits

    def _open(self) -> OnnxModule:
        if self._module is None:
            raise EngineError("this engine was closed: build it again")
        return self._module

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._module is not None:
            self._clock.synchronize(0)
            self._module = self._graph = None
            del self._logits, self._noise
            torch.cuda.empty_cache()


class _TorchClock:
    """Events on a stream of its own; see `autocomp.engines.cuda.measure.Clock`."""

    def __init__(self) -> None:
        self.stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def event(self) -> Any:
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def record(self, event: Any, stream: int) -> None:
        del stream
        event.record(self.stream)

    def marked(self) -> Any:
        """An event recorded now."""
        event = self.event()
        event.record(self.stream)
        return event

    def elapsed_ms(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end))

    def synchronize(self, stream: int) -> None:
        del stream
        self.stream.synchronize()


def input_shape(onnx: bytes, batch: int) -> tuple[int, ...]:
    """Shape of one image. Raises: EngineError: no ONNX model, another batch, or sizes that are not fixed."""
    graph = parse(onnx).graph
    if len(graph.input) != 1:
        names = ", ".join(value.name for value in graph.input)
        raise EngineError(f"torch-cuda reads one input, and the model has {names}: use onnxruntime or openvino")
    first, *others = graph.input[0].type.tensor_type.shape.dim
    if first.HasField("dim_value") and first.dim_value != batch:
        fixed = first.dim_value
        raise EngineError(f"the model has batch {fixed}, not {batch}: give --batch {fixed} or free that axis")
    if not all(axis.HasField("dim_value") for axis in others):
        raise EngineError("the model's input shape is not fixed: export it with fixed sizes")
    return tuple(axis.dim_value for axis in others)


@contextmanager
def _errors() -> Iterator[None]:
    """PyTorch's errors as ours."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise EngineError("out of GPU memory: give a smaller --batch, or end other programs on the GPU") from error
    except RuntimeError as error:
        raise EngineError(f"torch-cuda failed: {' '.join(str(error).split())[:300]}") from error


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Let float32 products use 10-bit mantissas meanwhile, or not."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = allowed
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=allowed):
            yield
    finally:
        matmul.allow_tf32 = before
