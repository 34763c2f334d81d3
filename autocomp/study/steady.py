"""Measurements of finalists wait for a device that runs as it did during the search."""

from collections.abc import Callable, Iterator, Sequence
from time import sleep

from autocomp.engines import estimate
from autocomp.outcome import Note, Observer
from autocomp.results import Timing

__all__ = ["DRIFT", "WAITS_S", "Patience"]

DRIFT = 0.10
"""How much slower than usual the reference may be, as a fraction."""
WAITS_S = (5.0, 10.0)
"""Pauses before a measurement is repeated, for all finalists of a run together."""


class Patience:
    """Repeats measurements that the device's state spoils, with pauses between, until the pauses are used up.

    Other work on a device, or on the machine it is a part of, slows the uncompressed engine down. A measurement is
    then thrown away for what the reference says, before anyone looks at the candidate; so nothing is measured until
    it passes. When the pauses are used up what was measured last counts. A device that is faster than usual is not
    waited for: it was the usual latency that other work had slowed down.

    Args:
        observer: told of each pause.
        waits_s: the pauses.
        pause: in place of ``time.sleep``.
    """

    def __init__(
        self, observer: Observer, waits_s: Sequence[float] = WAITS_S, pause: Callable[[float], None] = sleep
    ) -> None:
        self._observer = observer
        self._waits: Iterator[float] = iter(waits_s)
        self._pause = pause

    def measure(self, take: Callable[[], Timing], usual_ms: float) -> Timing:
        """Call ``take`` until the reference's median is at most `DRIFT` over ``usual_ms``, or no pause is left."""
        while True:
            timing = take()
            found = estimate(timing, "p50").reference_ms.value
            wait = None if found / usual_ms - 1 <= DRIFT else next(self._waits, None)
            if wait is None:
                return timing
            self._observer(
                Note(
                    f"the uncompressed engine runs at {found:.1f} ms instead of {usual_ms:.1f} ms: the device is busy "
                    f"or changed its clocks; measuring again in {wait:.0f} s"
                )
            )
            self._pause(wait)
