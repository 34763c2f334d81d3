"""Latency of a kernel, and of a whole model, from a device's profile: looked up where measured, else interpolated."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import exp, hypot, prod, sqrt
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from autocomp.errors import InputError
from autocomp.hardware.kernels import Kernel
from autocomp.hardware.profile import EngineTime, HardwareProfile, KernelTime

__all__ = ["SHORTEST_MS", "KernelEstimate", "Prediction", "Predictor"]

Source = Literal["measured", "interpolated", "extrapolated"]
SHORTEST_MS = 1e-3
"""What a kernel takes at least where it is fitted to; the runtimes' clocks are no finer."""
FEWEST = 12
"""Measured kernels below which none is interpolated."""
FEWEST_ALIKE = 150
"""Measured kernels of one family from which on it is interpolated alone."""
LARGEST_FIT = 600
"""Kernels that an interpolation is fitted to, at most."""
_NORMAL = 1.96  # standard deviations to either side that hold 95 %
_FARTHER = 2.0  # by which the deviation outside the measured range is wider than the model's own


@dataclass(frozen=True, slots=True)
class KernelEstimate:
    """Time of one kernel.

    Attributes:
        ms: of a run.
        deviation_ms: standard deviation of the estimate.
        source: ``extrapolated`` where a size lies outside all that was measured.
    """

    ms: float
    deviation_ms: float
    source: Source

    @property
    def interval_ms(self) -> tuple[float, float]:
        """Bounds of 95 %."""
        return _interval(self.ms, self.deviation_ms)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Time of a whole engine.

    Attributes:
        ms: of a run, the overhead included.
        deviation_ms: standard deviation.
        measured: share of the time that comes from kernels that were measured.
    """

    ms: float
    deviation_ms: float
    measured: float

    @property
    def interval_ms(self) -> tuple[float, float]:
        """Bounds of 95 %."""
        return _interval(self.ms, self.deviation_ms)


class Predictor:
    """Sums kernels. A kernel that was measured has that time; others come from a Gaussian process over the logarithm
    of the time, about a linear trend in the logarithms of what a kernel computes, reads and writes.

    What whole engines take is fitted to them, as a constant, a part for each kernel, and a multiple of the kernels'
    sum: an engine of many fast kernels finds more of its data in caches than those that the kernels' times come from.
    """

    def __init__(self, profile: HardwareProfile, refine: bool = True) -> None:
        """``refine``: fit the process's scales; without it they stay at their usual values, which is faster."""
        self._times = {entry.kernel: entry for entry in profile.kernels}
        self._known: dict[Kernel, KernelEstimate] = {}
        self.profile = profile
        self._refine = refine
        self.overhead_ms, self.overhead_kernel_ms, self.scale, self._spread = _overhead(profile.engines)

    def kernel(self, kernel: Kernel) -> KernelEstimate:
        """Raises: InputError where too little was measured to say anything."""
        return self.kernels([kernel])[0]

    def kernels(self, kernels: Iterable[Kernel]) -> list[KernelEstimate]:
        """The same for many at once."""
        asked = list(kernels)
        missing = []
        for kernel in dict.fromkeys(asked):
            entry = self._times.get(kernel)
            if entry is not None:
                self._known[kernel] = KernelEstimate(entry.median_ms, entry.error_ms, "measured")
            elif kernel not in self._known:
                missing.append(kernel)
        if missing:
            self._known.update(zip(missing, self._interpolate(missing), strict=True))
        return [self._known[kernel] for kernel in asked]

    def engine(self, kernels: Iterable[Kernel]) -> Prediction:
        """Time of an engine that runs these kernels, one after the other.

        Raises:
            InputError: as `kernel`.
        """
        found = self.kernels(kernels)
        total = sum(entry.ms for entry in found)
        measured = sum(entry.ms for entry in found if entry.source == "measured")
        ms = self.scale * total + self.overhead_ms + self.overhead_kernel_ms * len(found)
        own = self.scale * sqrt(sum(entry.deviation_ms**2 for entry in found))
        return Prediction(ms, hypot(own, self._spread * ms), measured / total if total else 1.0)

    def _interpolate(self, kernels: list[Kernel]) -> list[KernelEstimate]:
        if len(self._times) < FEWEST:
            raise InputError(
                f"the profile {self.profile.device} has {len(self._times)} measured kernels, too few to say what "
                f"{kernels[0]} takes: build it with 'autocomp profile build'"
            )
        found: dict[Kernel, KernelEstimate] = {}
        for family, own in _by_family(kernels).items():
            model = self._models.get(family) or self._model
            logs, deviations = model.predict(np.array([_features(kernel) for kernel in own]))
            for kernel, log, deviation in zip(own, logs, deviations, strict=True):
                inside = self._inside(kernel)
                ms = exp(log)
                wider = 1.0 if inside else _FARTHER
                source: Source = "interpolated" if inside else "extrapolated"
                found[kernel] = KernelEstimate(ms, wider * ms * deviation, source)
        return [found[kernel] for kernel in kernels]

    def _inside(self, kernel: Kernel) -> bool:
        """Whether every size lies between the smallest and the largest of measured kernels of its kind."""
        ranges = self._ranges.get(_kind(kernel))
        if ranges is None:
            return False
        low, high = ranges
        sizes = _sizes(kernel)
        return bool((sizes >= low).all() and (sizes <= high).all())

    @cached_property
    def _ranges(self) -> Mapping[object, tuple[NDArray[np.float64], NDArray[np.float64]]]:
        rows: dict[object, list[NDArray[np.float64]]] = {}
        for kernel in self._times:
            rows.setdefault(_kind(kernel), []).append(_sizes(kernel))
        return {kind: (np.min(entries, axis=0), np.max(entries, axis=0)) for kind, entries in rows.items()}

    @cached_property
    def _models(self) -> Mapping[object, "_Process"]:
        """Of each family of kernels of which enough were measured."""
        families = _by_family(self._times)
        return {family: self._fitted(own) for family, own in families.items() if len(own) >= FEWEST_ALIKE}

    @cached_property
    def _model(self) -> "_Process":
        """Of all kernels, for a family of which little is known."""
        return self._fitted(list(self._times))

    def _fitted(self, kernels: list[Kernel]) -> "_Process":
        if len(kernels) > LARGEST_FIT:
            kernels = sorted(kernels)
            kernels = [kernels[place] for place in np.linspace(0, len(kernels) - 1, LARGEST_FIT).astype(int)]
        return _Process([self._times[kernel] for kernel in kernels], self._refine)


class _Process:
    """A linear trend and a Gaussian process about it (Rasmussen and Williams 2006, section 2.7)."""

    def __init__(self, entries: list[KernelTime], refine: bool) -> None:
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
        from sklearn.linear_model import Ridge
        from sklearn.preprocessing import StandardScaler

        features = np.array([_features(entry.kernel) for entry in entries])
        logs = np.log([max(entry.median_ms, SHORTEST_MS) for entry in entries])
        self._scaler: Any = StandardScaler().fit(features)
        scaled = self._scaler.transform(features)
        self._trend: Any = Ridge(alpha=1.0).fit(scaled, logs)
        covariance = ConstantKernel(0.05, (1e-4, 1e1)) * Matern(3.0, (0.3, 1e2), nu=1.5) + WhiteKernel(1e-3, (1e-6, 1))
        self._process: Any = GaussianProcessRegressor(
            covariance, optimizer="fmin_l_bfgs_b" if refine else None, random_state=0
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a length or a noise at the end of its range, which is no harm
            self._process.fit(scaled, logs - self._trend.predict(scaled))

    def predict(self, features: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation of log ms."""
        scaled = self._scaler.transform(features)
        mean, deviation = self._process.predict(scaled, return_std=True)
        return mean + self._trend.predict(scaled), deviation


def _interval(ms: float, deviation_ms: float) -> tuple[float, float]:
    margin = _NORMAL * deviation_ms
    return max(0.0, ms - margin), ms + margin


def _overhead(engines: tuple[EngineTime, ...]) -> tuple[float, float, float, float]:
    """Constant, part per kernel, and multiple of the kernels' sum that engines take, and the relative spread about it.

    The part is fitted where engines have different numbers of kernels, the multiple where there are enough of them.
    """
    from scipy.optimize import nnls

    if not engines:
        return 0.0, 0.0, 1.0, 0.0
    counts, sums, times = np.array([(entry.kernels, entry.kernels_ms, entry.ms) for entry in engines], np.float64).T
    scaled = len(engines) >= FEWEST
    columns = np.column_stack([np.ones_like(counts), counts * (np.ptp(counts) > 0), sums * scaled])
    wanted = times if scaled else np.maximum(times - sums, 0.0)
    (constant, part, scale), _ = nnls(columns / times[:, None], wanted / times)
    scale = scale if scaled else 1.0
    spread = float(np.std(1 - (constant + part * counts + scale * sums) / times))
    return float(constant), float(part), float(scale), spread


def _by_family(kernels: Iterable[Kernel]) -> dict[object, list[Kernel]]:
    """Kernels that one kind of code computes, whose times follow one trend: depthwise ones move data and compute
    little, and int8 gains where much is computed."""
    found: dict[object, list[Kernel]] = {}
    for kernel in kernels:
        found.setdefault((kernel.op, kernel.depthwise, kernel.precision), []).append(kernel)
    return found


def _sizes(kernel: Kernel) -> NDArray[np.float64]:
    return np.array([kernel.channels_in, kernel.channels_out, prod(kernel.size), kernel.batch], dtype=float)


def _kind(kernel: Kernel) -> object:
    return kernel.op, kernel.kernel, kernel.stride, kernel.groups > 1, kernel.precision


def _features(kernel: Kernel) -> NDArray[np.float64]:
    """What a kernel computes and moves, in logarithms, how its channels fit vector widths, and what it fuses."""
    positions = kernel.batch * prod(kernel.size)
    read = kernel.channels_in * positions * prod(kernel.stride)
    written = kernel.channels_out * positions
    weights = kernel.channels_in * kernel.channels_out // kernel.groups * prod(kernel.kernel)
    sizes = [kernel.channels_in, kernel.channels_out, positions, read, written, weights, kernel.macs + 1]
    padded = [
        -(-channels // step) * step / channels
        for channels in (kernel.channels_in, kernel.channels_out)
        for step in (8, 16, 32)
    ]
    context = kernel.context
    marks = [
        kernel.op == "linear", kernel.op == "entry", kernel.depthwise, kernel.precision == "int8",
        kernel.precision == "fp32", context.startswith("q"), context.count(".q"), context.count("fp32"),
        context.count("int8"), context.count("add"), context.count("(f"), len(context.split()),
    ]  # fmt: skip
    return np.array([*np.log2(sizes), *np.log2(padded), prod(kernel.kernel) ** 0.5, *map(float, marks)])
