"""A GPU in host memory, behind the names of both packages that drive one: what they are called with is checked against
cuda-bindings' own signatures, and what pycuda's documentation says."""

import ctypes
import inspect
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

RUN_MS = 1.5
"""That its clock goes on with every launch of a graph."""


class HostGpu:
    """Memory, streams, events and graphs. While a stream is captured, copies are recorded instead of done.

    Attributes:
        failing: operation -> name of the error that it ends with.
        memory, streams, events, graphs: what is alive.
    """

    def __init__(self) -> None:
        self.failing: dict[str, str] = {}
        self.memory: dict[int, Any] = {}
        self.streams, self.events, self.graphs = set[int](), dict[int, float](), dict[int, list[Callable[[], None]]]()
        self._captured: list[Callable[[], None]] | None = None
        self._handles = iter(range(1, 10**6))
        self._now = 0.0

    def allocate(self, size: int) -> int:
        buffer = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        assert stream in self.streams
        self._do(lambda: ctypes.memmove(target, source, size) and None)

    def stream(self) -> int:
        handle = next(self._handles)
        self.streams.add(handle)
        return handle

    def event(self) -> int:
        handle = next(self._handles)
        self.events[handle] = float("nan")
        return handle

    def record(self, event: int, stream: int) -> None:
        assert stream in self.streams
        self.events[event] = self._now

    def begin_capture(self, stream: int) -> None:
        assert stream in self.streams and self._captured is None
        self._captured = []

    def end_capture(self) -> int:
        handle = next(self._handles)
        assert self._captured is not None
        self.graphs[handle], self._captured = self._captured, None
        return handle

    def instantiate(self, graph: int) -> int:
        handle = next(self._handles)
        self.graphs[handle] = self.graphs[graph]
        return handle

    def launch(self, graph: int, stream: int) -> None:
        assert stream in self.streams
        self._now += RUN_MS
        for work in self.graphs[graph]:
            work()

    def _do(self, work: Callable[[], None]) -> None:
        if self._captured is None:
            work()
        else:
            self._captured.append(work)


def as_bindings(gpu: HostGpu) -> SimpleNamespace:
    """In place of ``cuda.bindings.driver``."""
    from cuda.bindings import driver

    results = driver.CUresult
    calls: dict[str, Callable[..., Any]] = {
        "cuInit": lambda flags: None,
        "cuDeviceGet": lambda index: index,
        "cuDevicePrimaryCtxRetain": lambda device: 1,
        "cuCtxSetCurrent": lambda context: None,
        "cuDeviceGetAttribute": lambda attribute, device: 8 if attribute.name.endswith("MAJOR") else 9,
        "cuDriverGetVersion": lambda: 13000,
        "cuDeviceGetName": lambda size, device: b"NVIDIA L4\0\0",
        "cuDeviceTotalMem": lambda device: 24 * 2**30,
        "cuDeviceGetPCIBusId": lambda size, device: b"0000:01:00.0\0",
        "cuMemAlloc": gpu.allocate,
        "cuMemFree": gpu.memory.pop,
        "cuMemcpyHtoDAsync": gpu.copy,
        "cuMemcpyDtoHAsync": gpu.copy,
        "cuStreamCreate": lambda flags: gpu.stream(),
        "cuStreamDestroy": gpu.streams.remove,
        "cuStreamSynchronize": lambda stream: None,
        "cuEventCreate": lambda flags: gpu.event(),
        "cuEventDestroy": gpu.events.pop,
        "cuEventRecord": gpu.record,
        "cuEventSynchronize": lambda event: None,
        "cuEventElapsedTime": lambda begin, end: gpu.events[end] - gpu.events[begin],
        "cuStreamBeginCapture": lambda stream, mode: gpu.begin_capture(stream),
        "cuStreamEndCapture": lambda stream: gpu.end_capture(),
        "cuGraphInstantiate": lambda graph, flags: gpu.instantiate(graph),
        "cuGraphDestroy": gpu.graphs.pop,
        "cuGraphExecDestroy": gpu.graphs.pop,
        "cuGraphLaunch": gpu.launch,
    }

    def checked(name: str, work: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
        signature = inspect.signature(getattr(driver, name))

        def call(*given: Any) -> tuple[Any, ...]:
            signature.bind(*given)
            if name in gpu.failing:
                return (getattr(results, gpu.failing[name]),)
            return results.CUDA_SUCCESS, work(*given)

        return call

    kinds = ("CUresult", "CUdevice_attribute", "CUstream_flags", "CUevent_flags", "CUstreamCaptureMode")
    enums = {name: getattr(driver, name) for name in kinds}
    return SimpleNamespace(**enums, **{name: checked(name, work) for name, work in calls.items()})


def as_pycuda(gpu: HostGpu, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In place of the package; what happened to the context is in the list that is returned."""
    log: list[str] = []

    class Error(Exception):
        pass

    def fails(name: str) -> None:
        if name in gpu.failing:
            raise Error(f"{name} failed: {gpu.failing[name]}")

    class Context:
        def push(self) -> None:
            log.append("push")

        def pop(self) -> None:
            log.append("pop")

    class Device:
        def __init__(self, index: int) -> None:
            assert index == 0

        retain_primary_context = staticmethod(Context)
        compute_capability = staticmethod(lambda: (8, 9))
        total_memory = staticmethod(lambda: 24 * 2**30)
        name = staticmethod(lambda: "NVIDIA L4")
        pci_bus_id = staticmethod(lambda: "0000:01:00.0")

    class Allocation:
        def __init__(self, size: int) -> None:
            fails("cuMemAlloc")
            self._address = gpu.allocate(size)

        def __int__(self) -> int:
            return self._address

        def free(self) -> None:
            del gpu.memory[self._address]

    class Stream:
        def __init__(self) -> None:
            self.handle = gpu.stream()

        def synchronize(self) -> None: ...

        def __del__(self) -> None:
            gpu.streams.remove(self.handle)

    class Event:
        def __init__(self) -> None:
            self._handle = gpu.event()

        def record(self, stream: Stream) -> None:
            gpu.record(self._handle, stream.handle)

        def synchronize(self) -> None: ...

        def time_till(self, end: "Event") -> float:
            return gpu.events[end._handle] - gpu.events[self._handle]

        def __del__(self) -> None:
            del gpu.events[self._handle]

    def memcpy_htod_async(dest: int, src: NDArray[np.generic], stream: Stream) -> None:
        gpu.copy(dest, src.ctypes.data, src.nbytes, stream.handle)

    def memcpy_dtoh_async(dest: NDArray[np.generic], src: int, stream: Stream) -> None:
        gpu.copy(dest.ctypes.data, src, dest.nbytes, stream.handle)

    driver = SimpleNamespace(
        init=lambda: fails("cuInit"), Error=Error, Device=Device, Stream=Stream, Event=Event, mem_alloc=Allocation,
        memcpy_htod_async=memcpy_htod_async, memcpy_dtoh_async=memcpy_dtoh_async, get_driver_version=lambda: 13000,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pycuda", SimpleNamespace(driver=driver))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)  # type: ignore[arg-type]
    forget(monkeypatch)
    return log


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the module above pycuda imported anew, now and after the test."""
    monkeypatch.setitem(sys.modules, "autocomp.engines.cuda.with_pycuda", None)  # type: ignore[arg-type]
    del sys.modules["autocomp.engines.cuda.with_pycuda"]


class Library:
    """The driver's management library for one GPU, as ctypes sees it."""

    def __init__(self, reasons: int) -> None:
        self._numbers = {
            "nvmlDeviceGetClockInfo": {1: 1980, 2: 6251},
            "nvmlDeviceGetMaxClockInfo": {1: 2040, 2: 6251},
            "nvmlDeviceGetTemperature": {0: 61},
        }
        self._reasons = reasons

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetHandleByPciBusId_v2(self, bus: bytes, handle: Any) -> int:  # noqa: N802
        handle._obj.value = 7
        return 0 if bus == b"0000:01:00.0" else 6

    def nvmlDeviceGetPowerUsage(self, handle: Any, found: Any) -> int:  # noqa: N802
        found._obj.value = 72_000
        return 0

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any, found: Any) -> int:  # noqa: N802
        assert handle.value == 7 and isinstance(found._obj, ctypes.c_ulonglong)
        found._obj.value = self._reasons
        return 0

    def nvmlSystemGetDriverVersion(self, text: Any, size: int) -> int:  # noqa: N802
        text.value = b"580.65.06"
        return 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        numbers = self._numbers[name]

        def call(handle: Any, which: int, found: Any) -> int:
            assert handle.value == 7 and isinstance(found._obj, ctypes.c_uint)
            found._obj.value = numbers[which]
            return 0

        return call
