"""The GPU through NVIDIA's cuda-bindings, which torch brings."""

from collections.abc import Callable
from typing import Any

from cuda.bindings import driver
from numpy.typing import NDArray

from autocomp.engines.cuda.protocol import GpuInfo, reported
from autocomp.errors import ConfigError, EngineError

__all__ = ["CudaBindings", "capture_graph"]


class _Owned:
    """A handle of the driver that is destroyed with the object: an engine leaves a graph and hundreds of events."""

    def __init__(self, handle: Any, destroy: Callable[[Any], object]) -> None:
        self.handle, self._destroy = handle, destroy

    def __del__(self) -> None:
        self._destroy(self.handle)


class CudaBindings:
    """See `Cuda`. Shares the device's primary context with torch and TensorRT."""

    package = "cuda-bindings"

    def __init__(self, index: int = 0) -> None:
        """Raises: ConfigError: no driver, no GPU, or none of that number."""
        try:
            checked(driver.cuInit(0))
            device = checked(driver.cuDeviceGet(index))
            context = checked(driver.cuDevicePrimaryCtxRetain(device))
            checked(driver.cuCtxSetCurrent(context))
        except EngineError as error:
            raise ConfigError(str(error)) from error
        except (RuntimeError, OSError) as error:  # the driver's library is missing
            raise ConfigError(
                "no NVIDIA driver is found: install one, on Ubuntu with 'sudo ubuntu-drivers install'"
            ) from error
        self._info = _info(device)

    @property
    def info(self) -> GpuInfo:
        return self._info

    def allocate(self, size_bytes: int) -> int:
        return int(checked(driver.cuMemAlloc(size_bytes)))

    def free(self, address: int) -> None:
        checked(driver.cuMemFree(address))

    def upload(self, address: int, values: NDArray[Any], stream: int) -> None:
        checked(driver.cuMemcpyHtoDAsync(address, values.ctypes.data, values.nbytes, stream))

    def download(self, values: NDArray[Any], address: int, stream: int) -> None:
        checked(driver.cuMemcpyDtoHAsync(values.ctypes.data, address, values.nbytes, stream))
        self.synchronize(stream)

    def stream(self) -> int:
        return int(checked(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)))

    def release(self, stream: int) -> None:
        checked(driver.cuStreamDestroy(stream))

    def event(self) -> Any:
        return _Owned(checked(driver.cuEventCreate(driver.CUevent_flags.CU_EVENT_DEFAULT)), driver.cuEventDestroy)

    def record(self, event: Any, stream: int) -> None:
        checked(driver.cuEventRecord(event.handle, stream))

    def elapsed_ms(self, begin: Any, end: Any) -> float:
        checked(driver.cuEventSynchronize(end.handle))
        return float(checked(driver.cuEventElapsedTime(begin.handle, end.handle)))

    def synchronize(self, stream: int) -> None:
        checked(driver.cuStreamSynchronize(stream))

    def capture(self, stream: int, work: Callable[[], None]) -> Callable[[], None] | None:
        return capture_graph(stream, work)


def capture_graph(stream: int, work: Callable[[], None]) -> Callable[[], None] | None:
    """See `Cuda.capture`; streams of any package will do, for handles are the driver's."""
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    checked(driver.cuStreamBeginCapture(stream, mode))
    failed = False
    try:
        work()
    except EngineError:
        failed = True
    code, graph = driver.cuStreamEndCapture(stream)
    if failed or code != driver.CUresult.CUDA_SUCCESS:
        return None
    runnable = _Owned(checked(driver.cuGraphInstantiate(graph, 0)), driver.cuGraphExecDestroy)
    checked(driver.cuGraphDestroy(graph))

    def launch() -> None:
        checked(driver.cuGraphLaunch(runnable.handle, stream))

    return launch


def checked(result: tuple[Any, ...]) -> Any:
    """The value of a call. Raises: EngineError with a remedy: the call failed."""
    code, *values = result
    if code != driver.CUresult.CUDA_SUCCESS:
        raise EngineError(reported(str(getattr(code, "name", code))))
    return values[0] if values else None


def _info(device: Any) -> GpuInfo:
    parts = [f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{part}" for part in ("MAJOR", "MINOR")]
    attributes = [getattr(driver.CUdevice_attribute, part) for part in parts]
    major, minor = (int(checked(driver.cuDeviceGetAttribute(entry, device))) for entry in attributes)
    version = int(checked(driver.cuDriverGetVersion()))
    return GpuInfo(
        name=_text(checked(driver.cuDeviceGetName(256, device))),
        capability=(major, minor),
        driver=f"{version // 1000}.{version % 1000 // 10}",
        memory_bytes=int(checked(driver.cuDeviceTotalMem(device))),
        bus=_text(checked(driver.cuDeviceGetPCIBusId(64, device))),
    )


def _text(data: bytes) -> str:
    return data.split(b"\0")[0].decode(errors="replace")
