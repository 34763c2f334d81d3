"""Device times of something that is launched again and again, and when they are not to be trusted."""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from autocomp.engines.cuda.telemetry import GpuState, Telemetry
from autocomp.errors import EngineError
from autocomp.results import Copies

__all__ = ["Clock", "Stopwatch", "copies", "unsteady"]

SLOWEST_CLOCK = 0.9  # of the highest clock seen under load: below it a sample is thrown away
_ATTEMPTS = 3
_PAUSE_S = 5.0
_COPIES = 20


def unsteady(before: GpuState | None, after: GpuState | None, highest_mhz: int) -> str | None:
    """Why the times between two readings are not to be trusted, or None.

    Args:
        before, after: readings; None where the driver tells nothing.
        highest_mhz: SM clock seen so far at the end of a measurement, when the GPU is warm.
    """
    for state in (before, after):
        if state is not None and state.throttled is not None:
            return f"it is slowed down by {state.throttled} at {state.temperature_c} °C and {state.power_w:.0f} W"
    if after is not None and after.sm_mhz < SLOWEST_CLOCK * highest_mhz:
        return f"its clock fell to {after.sm_mhz} MHz from {highest_mhz} MHz"
    return None


def copies(clock: "Clock", stream: int, upload: Callable[[], object], download: Callable[[], object]) -> Copies:
    """What both moves take, by events on their own stream.

    Args:
        upload: enqueues the copy of a batch to the device.
        download: enqueues, or waits for, the copy of its results from there.
    """
    begin, middle, end = (clock.event() for _ in range(3))
    times = []
    for _ in range(_COPIES):
        clock.record(begin, stream)
        upload()
        clock.record(middle, stream)
        download()
        clock.record(end, stream)
        clock.synchronize(stream)
        times.append((clock.elapsed_ms(begin, middle), clock.elapsed_ms(middle, end)))
    there, back = np.median(np.array(times), axis=0)
    return Copies(float(there), float(back))


class Clock(Protocol):
    """The part of `Cuda` that timing needs."""

    def event(self) -> Any: ...

    def record(self, event: Any, stream: int) -> None: ...

    def elapsed_ms(self, begin: Any, end: Any) -> float: ...

    def synchronize(self, stream: int) -> None: ...


class Stopwatch:
    """Times launches by events on their own stream.

    The GPU's state is read before and after, never in between: reading it disturbs what runs. What was measured while
    clocks were held back is thrown away and, after a pause, taken again.

    Args:
        cuda: the GPU.
        telemetry: of it.
        pause: called with seconds between attempts.
    """

    def __init__(self, cuda: Clock, telemetry: Telemetry, pause: Callable[[float], None] = time.sleep) -> None:
        self._cuda = cuda
        self._telemetry = telemetry
        self._pause = pause
        self._highest_mhz = 0
        self._events: list[object] = []
        self.rejected = 0
        """Measurements thrown away so far."""

    def time(self, launch: Callable[[], None], stream: int, repeats: int) -> NDArray[np.float64]:
        """Device time in ms of each of ``repeats`` launches in a row.

        Raises:
            EngineError: the GPU's clocks were held back in every attempt, or it reported an error or no time.
        """
        why = None
        for attempt in range(_ATTEMPTS):
            if attempt:
                self._pause(_PAUSE_S)
            before = self._telemetry.read()
            times = self._launches(launch, stream, repeats)
            after = self._telemetry.read()
            if after is not None:
                self._highest_mhz = max(self._highest_mhz, after.sm_mhz)
            why = unsteady(before, after, self._highest_mhz)
            if why is None:
                return times
            self.rejected += 1
        raise EngineError(
            f"the GPU does not run at its full clock, {why}: let it cool down, or lock the clocks with nvidia-smi -lgc"
        )

    def _launches(self, launch: Callable[[], None], stream: int, repeats: int) -> NDArray[np.float64]:
        cuda = self._cuda
        while len(self._events) < repeats + 1:
            self._events.append(cuda.event())
        events = self._events[: repeats + 1]
        cuda.record(events[0], stream)
        for event in events[1:]:
            launch()
            cuda.record(event, stream)
        cuda.synchronize(stream)
        times = np.array([cuda.elapsed_ms(begin, end) for begin, end in pairwise(events)])
        if not (np.isfinite(times) & (times > 0)).all():
            raise EngineError("the GPU reported no time for a run: update the driver and measure again")
        return times
