"""What two profiles say about the same kernels."""

from dataclasses import dataclass
from math import hypot
from statistics import median
from typing import Any

from autocomp.hardware.kernels import Kernel
from autocomp.hardware.predict import SHORTEST_MS
from autocomp.hardware.profile import HardwareProfile, KernelTime

__all__ = ["KernelDifference", "ProfileDifference", "difference"]

BEYOND = 1.96
"""Standard errors beyond which two times count as different, once in twenty where they are equal."""


@dataclass(frozen=True, slots=True)
class KernelDifference:
    """One kernel in both profiles.

    Attributes:
        kernel: both measured it.
        old, new: its times.
    """

    kernel: Kernel
    old: KernelTime
    new: KernelTime

    @property
    def ratio(self) -> float:
        """New over old; times below what clocks resolve count as that."""
        return max(self.new.median_ms, SHORTEST_MS) / max(self.old.median_ms, SHORTEST_MS)

    @property
    def errors(self) -> float:
        """By how many of their common standard errors the times differ."""
        error = hypot(self.old.error_ms, self.new.error_ms)
        return abs(self.new.median_ms - self.old.median_ms) / error if error else 0.0


@dataclass(frozen=True, slots=True)
class ProfileDifference:
    """Two profiles side by side.

    Attributes:
        fingerprint: what the second device has otherwise; its name does not count.
        shared: kernels in both, those that differ most beyond their errors first.
        ratios: (op, precision) -> median of new over old, and of how many kernels.
        only_old, only_new: kernels in one alone.
    """

    fingerprint: tuple[str, ...]
    shared: tuple[KernelDifference, ...]
    ratios: dict[tuple[str, str], tuple[float, int]]
    only_old: tuple[Kernel, ...]
    only_new: tuple[Kernel, ...]

    @property
    def differing(self) -> tuple[KernelDifference, ...]:
        """Those of ``shared`` whose times differ by more than their errors explain."""
        return tuple(entry for entry in self.shared if entry.errors > BEYOND)

    def to_json(self) -> dict[str, Any]:
        return {
            "fingerprint": list(self.fingerprint),
            "shared": len(self.shared),
            "differing": [
                {
                    "kernel": str(entry.kernel),
                    "old_ms": entry.old.median_ms,
                    "new_ms": entry.new.median_ms,
                    "ratio": entry.ratio,
                    "errors": entry.errors,
                }
                for entry in self.differing
            ],
            "ratios": [
                {"op": op, "precision": precision, "ratio": ratio, "kernels": count}
                for (op, precision), (ratio, count) in self.ratios.items()
            ],
            "only_old": list(map(str, self.only_old)),
            "only_new": list(map(str, self.only_new)),
        }


def difference(old: HardwareProfile, new: HardwareProfile) -> ProfileDifference:
    """What ``new`` says otherwise than ``old``."""
    before, after = ({entry.kernel: entry for entry in profile.kernels} for profile in (old, new))
    shared = [KernelDifference(kernel, before[kernel], after[kernel]) for kernel in sorted(before) if kernel in after]
    kinds: dict[tuple[str, str], list[float]] = {}
    for entry in shared:
        kinds.setdefault((entry.kernel.op, entry.kernel.precision), []).append(entry.ratio)
    return ProfileDifference(
        old.unlike(new),
        tuple(sorted(shared, key=lambda entry: -entry.errors)),
        {kind: (median(ratios), len(ratios)) for kind, ratios in kinds.items()},
        tuple(kernel for kernel in sorted(before) if kernel not in after),
        tuple(kernel for kernel in sorted(after) if kernel not in before),
    )
