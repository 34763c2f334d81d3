"""Which backends there are, and how one is asked for."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from autocomp.errors import ConfigError
from autocomp.protocols import Backend

__all__ = ["BACKENDS", "BackendSpec", "make_backend"]


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """How engines are built and timed; plain data that travels between processes.

    Attributes:
        name: of the backend, as in ``--engine``.
        batch: images in one run.
        threads: of one run.
        hardware: the described device of a simulated backend; None for its default.
    """

    name: str = "onnxruntime"
    batch: int = 1
    threads: int = 1
    hardware: str | None = None

    def __post_init__(self) -> None:
        for field, value in (("batch", self.batch), ("threads", self.threads)):
            if value < 1:
                raise ConfigError(f"{field} is {value}: give at least 1")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises: ConfigError if the data is no backend's description."""
        try:
            return cls(**data)
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


# The factories import their runtime only when they are called.
BACKENDS: Mapping[str, Callable[[BackendSpec], Backend]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "simulated": _simulated,
}
