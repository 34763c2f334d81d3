"""What engines need of a GPU."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from autocomp.capabilities import DeviceInfo
from autocomp.engines.remedies import explain, one_line

__all__ = ["Cuda", "GpuInfo", "reported"]


def reported(error: str) -> str:
    """What an error of the driver means, and what to do about it."""
    found = explain(error)
    return found if found != one_line(error) else f"the GPU reported {found}: see 'autocomp doctor'"


@dataclass(frozen=True, slots=True)
class GpuInfo:
    """A GPU and its driver.

    Attributes:
        name: as the driver has it.
        capability: compute capability (major, minor).
        driver: newest CUDA version that the driver serves, as ``13.0``.
        memory_bytes: of the device.
        bus: PCI address, as ``0000:01:00.0``.
    """

    name: str
    capability: tuple[int, int]
    driver: str
    memory_bytes: int
    bus: str

    @property
    def target(self) -> str:
        """The compute capability as TensorRT writes it: ``SM89``."""
        return f"SM{self.capability[0]}{self.capability[1]}"

    def device(self, engine: str, threads: int, **details: str) -> DeviceInfo:
        """Fingerprint of this GPU under an engine, given as name and version."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        capability = ".".join(map(str, self.capability))
        known = {"gpu": self.name, "compute_capability": capability, "cuda_driver": self.driver, **details}
        return DeviceInfo(slug, engine, threads, tuple(known.items()))


class Cuda(Protocol):
    """One GPU. Addresses are integers, streams are handles as TensorRT takes them; events, and what launches a graph,
    belong to the package below and go when they are dropped.

    Every method raises EngineError, with a remedy, where the driver reports an error.
    """

    @property
    def package(self) -> str:
        """That drives the GPU."""
        ...

    @property
    def info(self) -> GpuInfo: ...

    def allocate(self, size_bytes: int) -> int: ...

    def free(self, address: int) -> None: ...

    def upload(self, address: int, values: NDArray[Any], stream: int) -> None:
        """Copy a contiguous array to the device, in the stream's order."""
        ...

    def download(self, values: NDArray[Any], address: int, stream: int) -> None:
        """Fill a contiguous array from the device, and wait for it."""
        ...

    def stream(self) -> int: ...

    def release(self, stream: int) -> None:
        """Give a stream back; nothing runs on it any more."""
        ...

    def event(self) -> Any: ...

    def record(self, event: Any, stream: int) -> None: ...

    def elapsed_ms(self, begin: Any, end: Any) -> float:
        """Device time between two recorded events, once the second has passed."""
        ...

    def synchronize(self, stream: int) -> None: ...

    def capture(self, stream: int, work: Callable[[], None]) -> Callable[[], None] | None:
        """Record what ``work`` enqueues as a graph; what launches it, or None where it cannot be captured."""
        ...
