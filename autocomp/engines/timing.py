"""Timing of two engines side by side, and what the samples say."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil

import numpy as np
from numpy.typing import NDArray
from scipy import special

from autocomp.errors import BudgetError, EngineError
from autocomp.protocols import Engine
from autocomp.results import Block, Interval, LatencyEstimate, Timing, TimingProtocol

__all__ = ["Settled", "clear_of", "compare", "estimate", "merge"]

_STABLE = 0.02  # warm-up ends when times fall by less than this from one block to the next
_CLEAR = 0.2  # an engine this far from a limit, as a fraction, is clear of it after two blocks
_PATIENCE = 5  # warm-up lasts at most this many times its shortest length
_REPLICATES = 2000
_QUANTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
_SAMPLES = {"p50": 1, "p95": 200, "p99": 1000}  # fewer do not reach into the tail


Settled = Callable[[Sequence[Block]], bool]
"""Whether the blocks kept so far answer what a timing was asked for."""


def clear_of(limit: float) -> Settled:
    """For a timing that asks on which side of a ratio an engine lies: two blocks in a row far over, or far under it."""

    def settled(blocks: Sequence[Block]) -> bool:
        ratios = [float(np.median(block.candidate_ms) / np.median(block.reference_ms)) for block in blocks[-2:]]
        return len(ratios) == 2 and (min(ratios) > (1 + _CLEAR) * limit or max(ratios) < (1 - _CLEAR) * limit)

    return settled


def compare(
    candidate: Engine, reference: Engine, protocol: TimingProtocol, build: int = 0, settled: Settled | None = None
) -> Timing:
    """Time two built engines in interleaved blocks.

    Both are warmed up until stable. Then ``protocol.blocks`` pairs of blocks are taken, the order within a pair
    alternating. Pairs rejected for drift of the reference are taken again, up to as many as were asked for.

    Args:
        candidate, reference: of the same batch size, on the same device.
        protocol: see there; ``builds`` has no meaning here.
        build: number written into the blocks.
        settled: asked after each pair of blocks; ends the timing sooner.

    Raises:
        EngineError: an engine failed or reported no time.
    """
    pairs = [(candidate, _repeats(candidate, protocol)), (reference, _repeats(reference, protocol))]
    taken: list[Block] = []
    with _no_gc():
        while True:
            order = (0, 1) if len(taken) % 2 == 0 else (1, 0)
            times = {index: pairs[index][0].time(pairs[index][1]) for index in order}
            taken.append(Block(build, tuple(times[0].tolist()), tuple(times[1].tolist())))
            if len(taken) < protocol.blocks and settled is None:
                continue
            timing = merge([Timing(tuple(taken))], protocol.max_drift)
            if len(timing.blocks) >= protocol.blocks or len(taken) >= 2 * protocol.blocks:
                return timing
            if settled is not None and settled(timing.blocks):
                return timing


def merge(timings: Sequence[Timing], max_drift: float) -> Timing:
    """One timing of several; blocks whose reference median is off the median one by more than ``max_drift``
    (a fraction) are rejected and counted."""
    blocks = [block for timing in timings for block in timing.blocks]
    rejected = sum(timing.rejected for timing in timings)
    if not blocks:
        return Timing((), rejected)
    medians = np.array([np.median(block.reference_ms) for block in blocks])
    middle = np.quantile(medians, 0.5, method="lower")  # one of them, so that never all are rejected
    steady = np.abs(medians / middle - 1) <= max_drift
    kept = tuple(block for block, keep in zip(blocks, steady, strict=True) if keep)
    return Timing(kept, rejected + len(blocks) - len(kept))


def estimate(timing: Timing, statistic: str, confidence: float = 0.95, seed: int = 0) -> LatencyEstimate:
    """A statistic of the candidate, of the reference and of their ratio, with two-sided bounds.

    The bounds come from a hierarchical bootstrap (Davison and Hinkley 1997, section 3.8): builds are drawn with
    replacement, then blocks of each drawn build; runs within a block are not independent and stay together.
    With few builds percentiles are too narrow (Hesterberg 2015, section 4), so a bound also lies at least as far out
    as Student's t with the degrees of freedom that the variances between and within builds leave (Satterthwaite 1946).

    The ratio is paired: all times are divided by the reference median of their own block before the statistic of
    the candidate is divided by that of the reference.

    Args:
        timing: blocks of one or more builds.
        statistic: ``p50``, ``p95`` or ``p99``.
        confidence: of each two-sided interval.
        seed: of the bootstrap.

    Raises:
        BudgetError: unknown statistic, or too few samples for it (p95 needs 200, p99 1,000).
    """
    if statistic not in _QUANTILES:
        raise BudgetError(f"unknown statistic {statistic!r}: use p50, p95 or p99")
    if timing.samples < _SAMPLES[statistic]:
        raise BudgetError(
            f"not enough samples: {statistic} needs {_SAMPLES[statistic]:,} and there are {timing.samples:,}; "
            "time more or longer blocks"
        )
    quantile = _QUANTILES[statistic]
    counts = _draw(timing.blocks, np.random.default_rng(seed))
    medians = [float(np.median(block.reference_ms)) for block in timing.blocks]
    candidate = [np.array(block.candidate_ms) for block in timing.blocks]
    reference = [np.array(block.reference_ms) for block in timing.blocks]
    paired = [
        _quantiles([times / median for times, median in zip(side, medians, strict=True)], counts, quantile)
        for side in (candidate, reference)
    ]
    builds = np.array([block.build for block in timing.blocks])

    def interval(values: NDArray[np.float64], sides: Sequence[NDArray[np.float64]]) -> Interval:
        per_block = np.array([np.quantile(times, quantile) for times in sides])
        return _bounds(values, per_block, builds, confidence)

    ratios = [times / median for times, median in zip(candidate, medians, strict=True)]
    return LatencyEstimate(
        statistic=statistic,
        latency_ms=interval(_quantiles(candidate, counts, quantile), candidate),
        reference_ms=interval(_quantiles(reference, counts, quantile), reference),
        ratio=interval(paired[0] / paired[1], ratios),
        samples=timing.samples,
        rejected=timing.rejected,
        p50_ms=float(np.median(np.concatenate(candidate))),
        reference_p50_ms=float(np.median(np.concatenate(reference))),
    )


def _repeats(engine: Engine, protocol: TimingProtocol) -> int:
    """Warm an engine up until its times are stable; runs that then fill a block."""
    repeats, spent, before = 1, 0.0, float("inf")
    while True:
        times = engine.time(repeats)
        total, median = float(times.sum()), float(np.median(times))
        if not total > 0:
            raise EngineError("the engine reported no time: its clock is too coarse for this model")
        spent += total
        stable = median >= (1 - _STABLE) * before  # what is not warm yet only gets faster; noise goes both ways
        if spent >= protocol.warmup_ms and (stable or spent >= _PATIENCE * protocol.warmup_ms):
            return max(protocol.min_repeats, ceil(protocol.block_ms / median))
        before = median
        repeats = max(1, ceil(protocol.warmup_ms / 4 / median))


@contextmanager
def _no_gc() -> Iterator[None]:
    """No garbage collection meanwhile."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _draw(blocks: Sequence[Block], rng: np.random.Generator) -> NDArray[np.int64]:
    """How often each block occurs: shape (1 + replicates, blocks); the first row is the sample itself."""
    owner = np.array([block.build for block in blocks])
    _, builds = np.unique(owner, return_inverse=True)
    sizes = np.bincount(builds)
    members = np.argsort(builds, kind="stable")  # blocks of the first build, then those of the second, ...
    starts = np.cumsum(sizes) - sizes
    chosen = rng.integers(len(sizes), size=(_REPLICATES, len(sizes)))
    places = (rng.random((*chosen.shape, sizes.max())) * sizes[chosen][..., None]).astype(np.int64)
    drawn = members[np.minimum(starts[chosen][..., None] + places, len(blocks) - 1)]
    within = np.arange(sizes.max()) < sizes[chosen][..., None]  # as many of a build as it has
    rows = np.broadcast_to(np.arange(_REPLICATES)[:, None, None], drawn.shape)
    counts = np.bincount((rows * len(blocks) + drawn)[within], minlength=_REPLICATES * len(blocks))
    return np.concatenate([np.ones((1, len(blocks)), np.int64), counts.reshape(_REPLICATES, len(blocks))])


def _quantiles(times: Sequence[NDArray[np.float64]], counts: NDArray[np.int64], quantile: float) -> NDArray[np.float64]:
    """Pooled quantile of the blocks' samples for each row of ``counts``; shape (rows,)."""
    pooled = np.concatenate(times)
    owner = np.repeat(np.arange(len(times)), [len(entry) for entry in times])
    order = np.argsort(pooled, kind="stable")
    pooled, owner = pooled[order], owner[order]
    below = np.cumsum(owner[:, None] == np.arange(len(times)), axis=0)  # of each block, up to each sample
    wanted = quantile * (counts @ below[-1])
    low, high = np.zeros(len(counts), np.int64), np.full(len(counts), len(pooled) - 1)
    while np.any(low < high):  # bisection for the first sample at which each row has reached what it wants
        middle = (low + high) // 2
        enough = np.einsum("rb,rb->r", counts, below[middle]) >= wanted
        low, high = np.where(enough, low, middle + 1), np.where(enough, middle, high)
    found: NDArray[np.float64] = pooled[low]
    return found


def _bounds(
    values: NDArray[np.float64], per_block: NDArray[np.float64], builds: NDArray[np.int64], confidence: float
) -> Interval:
    """The wider, on each side, of the bootstrap's percentiles and of Student's t with the larger standard error.

    Args:
        values: the estimate, then the bootstrap's replicates of it.
        per_block: the statistic of each block, from which the degrees of freedom and an error come.
        builds: of each block.
        confidence: two-sided.
    """
    point, tail = float(values[0]), (1 + confidence) / 2
    low, high = np.quantile(values[1:], [1 - tail, tail])
    error, freedom = _standard_error(per_block, builds)
    margin = 0.0
    if freedom > 0:
        margin = float(special.stdtrit(freedom, tail)) * max(error, float(np.std(values[1:])))
    return Interval(point, max(0.0, min(float(low), point - margin)), max(float(high), point + margin))


def _standard_error(per_block: NDArray[np.float64], builds: NDArray[np.int64]) -> tuple[float, float]:
    """Error of the mean over blocks nested in builds, and its degrees of freedom (0 for a single block)."""
    groups = [per_block[builds == build] for build in np.unique(builds)]
    count, within_freedom = len(groups), len(per_block) - len(groups)
    means = np.array([group.mean() for group in groups])
    between = float(np.var(means, ddof=1)) / count if count > 1 else 0.0
    if within_freedom == 0:
        return float(np.sqrt(between)), float(count - 1)
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in groups)
    within = squares / within_freedom / len(per_block)
    if between <= within:
        return float(np.sqrt(within)), float(within_freedom)
    freedom = between**2 / ((between - within) ** 2 / (count - 1) + within**2 / within_freedom)
    return float(np.sqrt(between)), freedom
