"""Clocks, power and temperature of a GPU, read through the driver's own library before and after a measurement."""

import ctypes
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["GpuState", "Nvml", "Telemetry"]

# NVML's bits of why clocks are not higher.
_LOCKED = 0x2  # clocks of applications were set
_THROTTLED = {
    0x8: "hardware slowdown",
    0x20: "temperature",
    0x40: "temperature, by hardware",
    0x80: "power supply",
}
_SM_CLOCK, _MEMORY_CLOCK, _GPU_TEMPERATURE = 1, 2, 0


@dataclass(frozen=True, slots=True)
class GpuState:
    """A reading.

    Attributes:
        sm_mhz, memory_mhz: current clocks.
        power_w: drawn.
        temperature_c: of the GPU.
        reasons: NVML's bits of why the clocks are not higher.
    """

    sm_mhz: int
    memory_mhz: int
    power_w: float
    temperature_c: int
    reasons: int = 0

    @property
    def throttled(self) -> str | None:
        """What slows the GPU down, or None."""
        return next((reason for bit, reason in _THROTTLED.items() if self.reasons & bit), None)

    @property
    def locked(self) -> bool:
        """Whether somebody set the clocks of applications."""
        return bool(self.reasons & _LOCKED)


class Telemetry(Protocol):
    """Reads the state of one GPU."""

    def read(self) -> GpuState | None:
        """None where the driver does not tell."""
        ...


class Nvml:
    """`Telemetry` by the driver's management library; where it is missing every reading is None."""

    def __init__(self, bus: str) -> None:
        self._handle: Any = ctypes.c_void_p()
        try:
            self._library: Any = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            self._library = None
            return
        opened = self._library.nvmlInit_v2() == 0
        found = self._library.nvmlDeviceGetHandleByPciBusId_v2(bus.encode(), ctypes.byref(self._handle))
        if not opened or found != 0:
            self._library = None

    def read(self) -> GpuState | None:
        if self._library is None:
            return None
        sm = self._number("nvmlDeviceGetClockInfo", _SM_CLOCK)
        memory = self._number("nvmlDeviceGetClockInfo", _MEMORY_CLOCK)
        power = self._number("nvmlDeviceGetPowerUsage")
        temperature = self._number("nvmlDeviceGetTemperature", _GPU_TEMPERATURE)
        reasons = ctypes.c_ulonglong()
        self._library.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle, ctypes.byref(reasons))
        return GpuState(sm, memory, power / 1000, temperature, reasons.value)

    def driver_version(self) -> str | None:
        if self._library is None:
            return None
        text = ctypes.create_string_buffer(96)
        self._library.nvmlSystemGetDriverVersion(text, 96)
        return text.value.decode(errors="replace")

    def highest_mhz(self) -> int | None:
        """SM clock that the GPU has at most."""
        return self._number("nvmlDeviceGetMaxClockInfo", _SM_CLOCK) or None if self._library is not None else None

    def _number(self, call: str, *which: int) -> int:
        value = ctypes.c_uint()
        getattr(self._library, call)(self._handle, *which, ctypes.byref(value))
        return value.value
