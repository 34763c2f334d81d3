"""The GPU through NVIDIA's cuda-bindings, which torch brings."""

from collections.abc import Callable
from typing import Any

from cuda.bindings import driver
from numpy.typing import NDArray

from autocomp.engines.cuda.protocol import GpuInfo
from autocomp.errors import ConfigError, EngineError

__all__ = ["CudaBindings", "capture_graph"]

_REMEDIES = {
    "CUDA_ERROR_OUT_OF_MEMORY": "out of GPU memory: give a smaller --batch, or end other programs on the GPU",
    "CUDA_ERROR_NO_DEVICE": "no CUDA device is found: run 'autocomp doctor' to see what is missing",
    "CUDA_ERROR_INVALID_DEVICE": "there is no GPU of that number: see 'nvidia-smi'",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "the NVIDIA driver does not fit its library: restart after the update",
    "CUDA_ERROR_INSUFFICIENT_DRIVER": "the NVIDIA driver is too old for this CUDA version: install a newer one",
}


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

    def event(self) -> Any:
        return checked(driver.cuEventCreate(driver.CUevent_flags.CU_EVENT_DEFAULT))

    def record(self, event: Any, stream: int) -> None:
        checked(driver.cuEventRecord(event, stream))

    def elapsed_ms(self, begin: Any, end: Any) -> float:
        checked(driver.cuEventSynchronize(end))
        return float(checked(driver.cuEventElapsedTime(begin, end)))

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
    runnable = checked(driver.cuGraphInstantiate(graph, 0))

    def launch() -> None:
        checked(driver.cuGraphLaunch(runnable, stream))

    return launch


def checked(result: tuple[Any, ...]) -> Any:
    """The value of a call. Raises: EngineError with a remedy: the call failed."""
    code, *values = result
    if code != driver.CUresult.CUDA_SUCCESS:
        name = str(getattr(code, "name", code))
        raise EngineError(_REMEDIES.get(name, f"the GPU reported {name}: see 'autocomp doctor'"))
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
