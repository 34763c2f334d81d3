"""Intervals against simulated truth, drift, and the order of blocks."""

import gc
import json
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from autocomp.engines import clear_of, compare, estimate, merge
from autocomp.errors import BudgetError, EngineError
from autocomp.results import Block, Timing, TimingProtocol
from tests.engines.replay import TRACES, Standin, replayed

RATIO = 0.5


def synthetic(seed: int, between: float, within: float, builds: int = 3, blocks: int = 8, runs: int = 5) -> Timing:
    """Log-normal times of known ratio; both sides of a block share a common drift."""
    rng = np.random.default_rng(seed)
    found = []
    for build in range(builds):
        effect = rng.normal(0, between)
        for _ in range(blocks):
            drift, own = rng.normal(0, 0.02), rng.normal(0, within)
            reference = 20 * np.exp(drift + rng.normal(0, 0.005, runs))
            candidate = 20 * RATIO * np.exp(drift + effect + own + rng.normal(0, 0.005, runs))
            found.append(Block(build, tuple(candidate), tuple(reference)))
    return Timing(tuple(found))


class Scripted(Standin):
    """An engine whose times come from a list and then repeat its last entry."""

    def __init__(self, times: Sequence[float], log: list[str] | None = None, name: str = "") -> None:
        self.times, self.log, self.name, self.collected = list(times), log, name, False

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        return images

    def time(self, repeats: int) -> NDArray[np.float64]:
        if self.log is not None:
            self.log.append(self.name)
        self.collected = gc.isenabled()
        return np.full(repeats, self.times.pop(0) if len(self.times) > 1 else self.times[0])


@pytest.mark.parametrize(("between", "within"), [(0.0, 0.01), (0.01, 0.003)])
def test_interval_covers_the_true_ratio(between: float, within: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autocomp.engines.timing._REPLICATES", 200)
    intervals = [estimate(synthetic(seed, between, within), "p50").ratio for seed in range(60)]
    covered = np.mean([interval.low <= RATIO <= interval.high for interval in intervals])
    assert covered >= 0.85  # nominal 0.95; 60 draws
    assert np.mean([interval.value for interval in intervals]) == pytest.approx(RATIO, rel=0.01)


def test_pairing_cancels_common_drift() -> None:
    """Blocks drift by 2% here, yet the ratio is far tighter than either latency."""
    found = estimate(synthetic(0, 0.0, 0.001), "p50")

    def width(interval) -> float:
        return (interval.high - interval.low) / interval.value

    assert width(found.ratio) < 0.5 * width(found.latency_ms)


def test_confidence_widens_and_seeds_repeat() -> None:
    timing = synthetic(3, 0.005, 0.01)
    usual, strict = estimate(timing, "p50"), estimate(timing, "p50", confidence=0.99)
    assert strict.ratio.low < usual.ratio.low < usual.ratio.value < usual.ratio.high < strict.ratio.high
    assert estimate(timing, "p50", seed=4) == estimate(timing, "p50", seed=4)


@pytest.mark.parametrize(("statistic", "quantile", "runs"), [("p50", 50, 5), ("p95", 95, 20), ("p99", 99, 60)])
def test_statistics_are_the_pooled_quantiles(statistic: str, quantile: float, runs: int) -> None:
    timing = synthetic(1, 0.0, 0.01, runs=runs)
    pooled = np.concatenate([block.candidate_ms for block in timing.blocks])
    found = estimate(timing, statistic)
    assert found.latency_ms.value == pytest.approx(np.percentile(pooled, quantile, method="inverted_cdf"))
    assert found.latency_ms.low <= found.latency_ms.value <= found.latency_ms.high
    assert found.samples == len(pooled)


def test_equal_times_give_a_point() -> None:
    block = Block(0, (2.0, 2.0), (4.0, 4.0))
    found = estimate(Timing((block, block)), "p50")
    assert (found.ratio.low, found.ratio.value, found.ratio.high) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(("statistic", "needed"), [("p95", 200), ("p99", 1000)])
def test_too_few_samples_for_a_tail(statistic: str, needed: int) -> None:
    short = Timing((Block(0, (1.0,) * (needed - 1), (2.0,)),))
    with pytest.raises(BudgetError, match=f"not enough samples: {statistic} needs {needed:,}"):
        estimate(short, statistic)
    estimate(Timing((Block(0, (1.0,) * needed, (2.0,)),)), statistic)


def test_nothing_kept_and_unknown_statistics() -> None:
    with pytest.raises(BudgetError, match="not enough samples"):
        estimate(Timing((), rejected=5), "p50")
    with pytest.raises(BudgetError, match="p42"):
        estimate(synthetic(0, 0, 0.01), "p42")


def test_drifted_blocks_are_rejected_and_counted() -> None:
    steady = [Block(0, (5.0,), (10.0 + shift,)) for shift in (0.0, 0.2, -0.2, 0.1)]
    slow, fast = Block(1, (9.0,), (12.0,)), Block(1, (3.0,), (8.5,))
    merged = merge([Timing((*steady, slow), rejected=2), Timing((fast,))], max_drift=0.10)
    assert merged.blocks == tuple(steady)
    assert merged.rejected == 4
    assert merge([], 0.1) == Timing(())


def test_blocks_alternate_and_last_long_enough() -> None:
    log: list[str] = []
    protocol = TimingProtocol(warmup_ms=10, blocks=4, block_ms=30, min_repeats=3)
    candidate, reference = Scripted([4.0], log, "c"), Scripted([20.0], log, "r")
    timing = compare(candidate, reference, protocol, build=7)
    assert "".join(log[-8:]) == "crrccrrc"
    assert {block.build for block in timing.blocks} == {7}
    assert {(len(b.candidate_ms), len(b.reference_ms)) for b in timing.blocks} == {(8, 3)}
    assert not candidate.collected
    assert gc.isenabled()


def test_warm_up_goes_on_until_stable() -> None:
    """Falling times do not set the number of repeats; the settled ones do."""
    protocol = TimingProtocol(warmup_ms=10, blocks=1, block_ms=30, min_repeats=1)
    timing = compare(Scripted([20.0, 9.0, 5.0, 3.0, 3.0]), Scripted([1.0]), protocol)
    assert len(timing.blocks[0].candidate_ms) == 10


def test_warm_up_does_not_wait_for_noise_to_end() -> None:
    """Times that go up and down by more than a stable engine's, without getting faster."""
    log: list[str] = []
    protocol = TimingProtocol(warmup_ms=40, blocks=1, block_ms=10, min_repeats=1)
    compare(Scripted([10.0, 9.0, 11.0] * 20, log, "c"), Scripted([10.0], [], "r"), protocol)
    assert len(log) <= 6  # four runs of ten ms, one more where the last was faster, and the block


@pytest.mark.parametrize(
    ("candidate", "blocks"),
    [
        ([7.0], 2),  # at 0.7x, far over the limit of 0.5x
        ([3.0], 2),
        ([5.9], 5),  # over it, but not by enough
        ([4.1], 5),
        ([7.0, 3.0, 7.0, 7.0], 4),  # two in a row
        ([7.0, 3.0, 7.0, 3.0, 7.0, 3.0], 5),
    ],
)
def test_a_timing_far_from_its_limit_ends_after_two_blocks(candidate: list[float], blocks: int) -> None:
    protocol = TimingProtocol(warmup_ms=1, blocks=5, block_ms=1, min_repeats=1)
    timing = compare(Scripted([*candidate[:1], *candidate]), Scripted([10.0]), protocol, settled=clear_of(0.5))
    assert len(timing.blocks) == blocks


def test_two_blocks_of_which_one_drifted_settle_nothing() -> None:
    protocol = TimingProtocol(warmup_ms=1, blocks=5, block_ms=1, min_repeats=1)
    timing = compare(Scripted([9.0]), Scripted([10.0, 10.0, 14.0, 10.0]), protocol, settled=clear_of(0.5))
    assert (len(timing.blocks), timing.rejected) == (2, 1)


def test_drifted_blocks_are_taken_again_but_not_for_ever() -> None:
    protocol = TimingProtocol(warmup_ms=1, blocks=4, block_ms=1, min_repeats=1)
    steady = compare(Scripted([1.0]), Scripted([10.0, 10.0, 10.0, 20.0, 10.0]), protocol)
    assert (len(steady.blocks), steady.rejected) == (4, 1)
    wild = compare(Scripted([1.0]), Scripted([10.0 * 1.3**n for n in range(50)]), protocol)
    assert len(wild.blocks) + wild.rejected == 8


@pytest.mark.parametrize("name", ["steady", "busy", "slowed"])
def test_recorded_runs_of_one_file_beside_itself_give_a_ratio_of_one(name: str) -> None:
    """Real traces, of a machine with little to do, with seven other programs on the same processor, and with one that
    came and went."""
    timing = replayed(name)
    assert timing.rejected == json.loads((TRACES / f"{name}.json").read_text())["rejected"]
    medians = [float(np.median(block.reference_ms)) for block in timing.blocks]
    assert max(medians) < 1.25 * min(medians)  # within a tenth of the middle one
    ratio = estimate(timing, "p50").ratio
    assert ratio.low < 1.0 < ratio.high


def test_the_worse_a_recorded_run_the_less_is_claimed() -> None:
    timings = {name: replayed(name) for name in ("steady", "busy", "slowed")}
    widths = {name: (found := estimate(timing, "p50").ratio).high - found.low for name, timing in timings.items()}
    assert widths["steady"] < 0.1 and widths["steady"] < min(widths["busy"], widths["slowed"])
    assert timings["steady"].rejected < min(timings["busy"].rejected, timings["slowed"].rejected)
    slow = json.loads((TRACES / "slowed.json").read_text())
    times = sorted(float(np.median(answer)) for answer in slow["reference"])
    kept = [float(np.median(block.reference_ms)) for block in timings["slowed"].blocks]
    assert max(kept) < times[-1] / 1.25  # what the other program slowed is not among them


def test_an_engine_without_a_clock_is_refused() -> None:
    with pytest.raises(EngineError, match="no time"):
        compare(Scripted([0.0]), Scripted([1.0]), TimingProtocol())
