"""The GPU through pycuda."""

import atexit
from collections.abc import Callable
from typing import Any

import pycuda.driver as driver
from numpy.typing import NDArray

from autocomp.engines.cuda.protocol import GpuInfo, reported
from autocomp.errors import ConfigError, EngineError

__all__ = ["PyCuda"]


class PyCuda:
    """See `Cuda`. Shares the device's primary context with torch and TensorRT."""

    package = "pycuda"

    def __init__(self, index: int = 0) -> None:
        """Raises: ConfigError: no driver, no GPU, or none of that number."""
        try:
            driver.init()
            device = driver.Device(index)
            self._context = device.retain_primary_context()
            self._context.push()
        except driver.Error as error:
            raise ConfigError(reported(str(error))) from error
        atexit.register(self._context.pop)  # pycuda aborts a process that ends with a context pushed
        major, version = device.compute_capability(), driver.get_driver_version()
        self._info = GpuInfo(
            name=device.name(),
            capability=tuple(major),
            driver=f"{version // 1000}.{version % 1000 // 10}",
            memory_bytes=device.total_memory(),
            bus=device.pci_bus_id(),
        )
        self._memory: dict[int, Any] = {}
        self._streams: dict[int, Any] = {}

    @property
    def info(self) -> GpuInfo:
        return self._info

    def allocate(self, size_bytes: int) -> int:
        memory = _called(lambda: driver.mem_alloc(size_bytes))
        self._memory[int(memory)] = memory
        return int(memory)

    def free(self, address: int) -> None:
        _called(self._memory.pop(address).free)

    def upload(self, address: int, values: NDArray[Any], stream: int) -> None:
        _called(lambda: driver.memcpy_htod_async(address, values, self._streams[stream]))

    def download(self, values: NDArray[Any], address: int, stream: int) -> None:
        _called(lambda: driver.memcpy_dtoh_async(values, address, self._streams[stream]))
        self.synchronize(stream)

    def stream(self) -> int:
        made = _called(driver.Stream)
        self._streams[made.handle] = made
        return int(made.handle)

    def release(self, stream: int) -> None:
        del self._streams[stream]

    def event(self) -> Any:
        return _called(driver.Event)

    def record(self, event: Any, stream: int) -> None:
        _called(lambda: event.record(self._streams[stream]))

    def elapsed_ms(self, begin: Any, end: Any) -> float:
        _called(end.synchronize)
        return float(_called(lambda: begin.time_till(end)))

    def synchronize(self, stream: int) -> None:
        _called(self._streams[stream].synchronize)

    def capture(self, stream: int, work: Callable[[], None]) -> Callable[[], None] | None:
        try:  # pycuda has no graphs of its own
            from autocomp.engines.cuda.with_bindings import capture_graph
        except ImportError:
            return None
        return capture_graph(stream, work)


def _called(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except driver.Error as error:
        raise EngineError(reported(str(error))) from error
