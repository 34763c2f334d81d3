"""The logic of timing on a GPU, on written-down traces: what a good, a throttled and a broken device would report."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from autocomp.engines.cuda.measure import Stopwatch, unsteady
from autocomp.engines.cuda.telemetry import GpuState, Nvml
from autocomp.errors import EngineError

WARM = GpuState(1980, 2619, 400.0, 60)
HOT = GpuState(1200, 2619, 690.0, 88, reasons=0x20)
SLOW = GpuState(1500, 2619, 300.0, 60)
BRAKE = GpuState(1980, 2619, 700.0, 60, reasons=0x80)
LOCKED = GpuState(1980, 2619, 400.0, 60, reasons=0x2)


class Trace:
    """A GPU whose events pass at recorded times, and its telemetry."""

    def __init__(self, runs_ms: Sequence[Sequence[float]], states: Sequence[GpuState | None]) -> None:
        self._stamps: Iterator[float] = iter(
            [stamp for run in runs_ms for stamp in np.concatenate([[0.0], np.cumsum(run)]).tolist()]
        )
        self._states = iter(states)
        self.log: list[str] = []

    def event(self) -> list[float]:
        return [float("nan")]

    def record(self, event: list[float], stream: int) -> None:
        assert stream == 7
        event[0] = next(self._stamps)
        self.log.append("record")

    def elapsed_ms(self, begin: list[float], end: list[float]) -> float:
        return end[0] - begin[0]

    def synchronize(self, stream: int) -> None:
        self.log.append("synchronize")

    def read(self) -> GpuState | None:
        self.log.append("read")
        return next(self._states)

    def pause(self, seconds: float) -> None:
        self.log.append("pause")

    def launch(self) -> None:
        self.log.append("launch")

    def watch(self) -> Stopwatch:
        return Stopwatch(self, self, self.pause)  # type: ignore[arg-type]


def test_each_run_is_timed_between_two_events_and_the_state_read_outside() -> None:
    trace = Trace([[1.0, 1.25, 0.75]], [WARM, WARM])
    np.testing.assert_allclose(trace.watch().time(trace.launch, 7, 3), [1.0, 1.25, 0.75])
    assert trace.log == ["read", "record", *["launch", "record"] * 3, "synchronize", "read"]


def test_what_was_measured_under_throttling_is_taken_again_after_a_pause() -> None:
    trace = Trace([[1.7, 1.7], [1.0, 1.1]], [WARM, HOT, WARM, WARM])
    watch = trace.watch()
    np.testing.assert_allclose(watch.time(trace.launch, 7, 2), [1.0, 1.1])
    assert watch.rejected == 1 and trace.log.count("pause") == 1


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ([WARM, HOT] * 3, r"slowed down by temperature at 88 °C and 690 W: let it cool down.*nvidia-smi -lgc"),
        ([BRAKE, WARM] * 3, "power supply"),
    ],
)
def test_a_gpu_that_stays_throttled_is_given_up(states: list[GpuState], message: str) -> None:
    trace = Trace([[1.0]] * 3, states)
    with pytest.raises(EngineError, match=message):
        trace.watch().time(trace.launch, 7, 1)


def test_a_clock_below_what_was_seen_before_is_rejected_and_an_idle_one_before_is_not() -> None:
    idle = GpuState(345, 2619, 70.0, 35)
    trace = Trace([[1.0], [1.4], [1.0]], [idle, WARM, WARM, SLOW, idle, WARM])
    watch = trace.watch()
    assert watch.time(trace.launch, 7, 1)[0] == pytest.approx(1.0)
    assert watch.time(trace.launch, 7, 1)[0] == pytest.approx(1.0)
    assert watch.rejected == 1


@pytest.mark.parametrize("runs", [[1.0, 0.0], [1.0, float("nan")], [2.0, -1.0]])
def test_times_that_cannot_be_are_refused(runs: list[float]) -> None:
    trace = Trace([runs], [WARM, WARM])
    with pytest.raises(EngineError, match="no time for a run"):
        trace.watch().time(trace.launch, 7, 2)


def test_a_driver_that_tells_nothing_rejects_nothing() -> None:
    assert Nvml("0000:ff:1f.7").read() is None
    trace = Trace([[1.0]], [None, None])
    assert trace.watch().time(trace.launch, 7, 1) == pytest.approx([1.0])
    assert unsteady(None, None, 0) is None


def test_locked_clocks_are_no_throttling() -> None:
    assert LOCKED.locked and LOCKED.throttled is None and not WARM.locked


def test_launch_is_what_runs() -> None:
    """A launch that fails is not swallowed."""

    def fail() -> None:
        raise EngineError("out of GPU memory")

    trace, failing = Trace([[1.0]], [WARM, WARM]), fail
    work: Callable[[], None] = failing
    with pytest.raises(EngineError, match="out of GPU memory"):
        trace.watch().time(work, 7, 1)
