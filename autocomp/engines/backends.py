"""Which backends there are, and how one is asked for."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from autocomp.errors import ConfigError, EngineError
from autocomp.protocols import Backend, Engine
from autocomp.results import Copies

__all__ = ["BACKENDS", "BackendSpec", "copies_of", "make_backend", "open_engine"]


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """How engines are built and timed; plain data that travels between processes.

    Attributes:
        name: of the backend, as in ``--engine``.
        batch: images in one run.
        threads: of one run.
        hardware: the described device of a simulated backend, or the compute capabilities that TensorRT-RTX builds
            for ahead of time; None for its default, or the GPU at hand.
        tf32: lets a GPU's float32 layers compute with 10-bit mantissas.
        fresh: builds every engine anew where a cache would have it.
        batches: smallest and largest number of images that a TensorRT engine is to take besides ``batch``, which it is
            made for; None for ``batch`` alone.
    """

    name: str = "onnxruntime"
    batch: int = 1
    threads: int = 1
    hardware: str | None = None
    tf32: bool = False
    fresh: bool = False
    batches: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.batches is not None and not 1 <= self.batches[0] <= self.batch <= self.batches[1]:
            raise ConfigError(f"batches {self.batches[0]} to {self.batches[1]} must hold --batch {self.batch}")
        for field, value in (("batch", self.batch), ("threads", self.threads)):
            if value < 1:
                raise ConfigError(f"{field} is {value}: give at least 1")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises: ConfigError if the data is no backend's description."""
        try:
            batches = data.get("batches")
            return cls(**{**data, "batches": None if batches is None else tuple(batches)})
        except TypeError as error:
            raise ConfigError(f"this describes no engine: {error}") from error


def make_backend(spec: BackendSpec) -> Backend:
    """The backend that ``spec`` names.

    Raises:
        ConfigError: unknown name or hardware.
    """
    if spec.name not in BACKENDS:
        raise ConfigError(f"unknown engine {spec.name!r}: use one of {', '.join(sorted(BACKENDS))}")
    return BACKENDS[spec.name](spec)


def open_engine(backend: Backend, path: Path) -> Engine:
    """The engine of an ONNX file, or one that was built before and lies in a file that ends in ``.engine``.

    Raises:
        EngineError: the file is refused, or the backend keeps no engine files.
    """
    if path.suffix != ".engine":
        return backend.build(path.read_bytes())
    load: Callable[[Path], Engine] | None = getattr(backend, "load", None)
    if load is None:
        raise EngineError(f"{path} is an engine of TensorRT: give --engine tensorrt or tensorrt-rtx")
    return load(path)


def copies_of(engine: Engine) -> Copies | None:
    """What an engine's copies between host and device take; None where it reads the host's memory."""
    take: Callable[[], Copies] | None = getattr(engine, "copies", None)
    return None if take is None else take()


def _onnxruntime(spec: BackendSpec) -> Backend:
    from autocomp.engines.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(spec)


def _simulated(spec: BackendSpec) -> Backend:
    from autocomp.engines.simulated import SimulatedBackend

    return SimulatedBackend(spec)


def _openvino(spec: BackendSpec) -> Backend:
    try:
        from autocomp.engines.openvino_cpu import OpenVinoBackend
    except ModuleNotFoundError as error:
        if error.name != "openvino":
            raise
        raise ConfigError("the engine openvino is not installed: pip install 'autocomp[openvino]'") from error
    return OpenVinoBackend(spec)


def _tensorrt(spec: BackendSpec) -> Backend:
    from autocomp.engines.tensorrt import TensorRtBackend

    return TensorRtBackend(spec)


def _torch_cuda(spec: BackendSpec) -> Backend:
    from autocomp.engines.torch_cuda import TorchCudaBackend

    return TorchCudaBackend(spec)


# The factories import their runtime only when they are called.
BACKENDS: Mapping[str, Callable[[BackendSpec], Backend]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "simulated": _simulated,
    "tensorrt": _tensorrt,
    "tensorrt-rtx": _tensorrt,
    "torch-cuda": _torch_cuda,
    "torch-cuda-compiled": _torch_cuda,
}
