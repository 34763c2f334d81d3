"""Lookups, interpolation and differences of profiles, on times that are known."""

from dataclasses import replace
from datetime import date
from math import log2, prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocomp.errors import ConfigError, InputError
from autocomp.hardware import (
    EngineTime,
    HardwareProfile,
    Kernel,
    KernelTime,
    Predictor,
    Question,
    difference,
    kernel_asked,
)

CONTEXT = "f conv2d relu>fp32"


def conv(channels_in: int, channels_out: int, size: int, precision: str = "fp32", context: str = CONTEXT) -> Kernel:
    return Kernel("conv", channels_in, channels_out, (3, 3), (1, 1), 1, (size, size), 8, precision, context)


def smooth(kernel: Kernel) -> float:
    """A device without steps: ms by arithmetic and traffic."""
    moved = (kernel.channels_in + kernel.channels_out) * prod(kernel.size) * kernel.batch
    return kernel.macs / 2e7 + moved / 4e6 + 0.01


def table(kernels: list[Kernel], factor: float = 1.0, samples: int = 1, deviation: float = 0.0) -> HardwareProfile:
    times = tuple(KernelTime(k, factor * smooth(k), deviation * smooth(k), samples) for k in kernels)
    engines = (EngineTime("m", 8, len(times), 1.0, 1.25),)
    return HardwareProfile("box", "runtime 1", 1, date(2026, 1, 31), True, kernels=times, engines=engines)


GRID = [conv(i, o, size) for i in (16, 32, 64, 128) for o in (16, 32, 64, 128) for size in (8, 16, 32)]
PREDICTOR = Predictor(table(GRID))


@given(kernel=st.sampled_from(GRID))
def test_a_measured_kernel_has_the_tables_time(kernel: Kernel) -> None:
    found = PREDICTOR.kernel(kernel)
    assert found.source == "measured" and found.ms == smooth(kernel)
    assert found.interval_ms == pytest.approx((0.902 * found.ms, 1.098 * found.ms))


@settings(deadline=None, max_examples=30)
@given(low=st.sampled_from([16, 32, 64]), out=st.sampled_from([16, 32, 64, 128]), size=st.sampled_from([8, 16, 32]))
def test_an_interpolated_kernel_lies_between_its_neighbours(low: int, out: int, size: int) -> None:
    found = PREDICTOR.kernel(conv(low * 3 // 2, out, size))
    assert found.source == "interpolated"
    assert smooth(conv(low, out, size)) < found.ms < smooth(conv(2 * low, out, size))


def test_intervals_cover_most_of_what_was_held_out() -> None:
    """With 3 % of noise on what was measured; a quarter of the table is held out."""
    draw = np.random.default_rng(3)
    everything = [conv(i, o, size) for i in range(16, 129, 16) for o in range(16, 129, 16) for size in (8, 16, 32)]
    held = set(draw.choice(len(everything), len(everything) // 4, replace=False).tolist())
    known = [kernel for place, kernel in enumerate(everything) if place not in held]
    profile = table(known)
    noisy = tuple(
        replace(entry, median_ms=float(entry.median_ms * np.exp(0.03 * draw.standard_normal())))
        for entry in profile.kernels
    )
    found = Predictor(replace(profile, kernels=noisy)).kernels([everything[place] for place in held])
    truth = [smooth(everything[place]) for place in held]
    covered = [low <= ms <= high for (low, high), ms in zip((e.interval_ms for e in found), truth, strict=True)]
    assert np.mean(covered) >= 0.85
    errors = [abs(log2(entry.ms / ms)) for entry, ms in zip(found, truth, strict=True)]
    assert np.median(errors) < 0.05


def test_outside_the_measured_range_the_interval_is_wider() -> None:
    inside, outside, stranger = PREDICTOR.kernels(
        [conv(96, 96, 16), conv(256, 256, 64), replace(conv(96, 96, 16), kernel=(5, 5))]
    )
    assert (inside.source, outside.source, stranger.source) == ("interpolated", "extrapolated", "extrapolated")
    for found in (outside, stranger):
        assert found.deviation_ms / found.ms > 2 * inside.deviation_ms / inside.ms


def test_an_engine_has_its_kernels_and_an_overhead() -> None:
    found = PREDICTOR.engine(GRID[:4])
    assert found.measured == 1.0
    assert found.ms == pytest.approx(sum(map(smooth, GRID[:4])) + 0.25)
    low, high = found.interval_ms
    assert low < found.ms < high


def test_too_little_to_interpolate_is_said() -> None:
    with pytest.raises(InputError, match="11 measured kernels, too few to say"):
        Predictor(table(GRID[:11])).kernel(conv(24, 24, 24))


def test_a_question_takes_the_context_measured_most_often() -> None:
    often = conv(16, 16, 8, "int8", "q conv2d.q")
    rows = [KernelTime(conv(16, 16, 8, "int8", "q conv2d"), 1.0, 0.0, 4), KernelTime(often, 2.0, 0.1, 9)]
    profile = replace(table(GRID), kernels=tuple(rows))
    asked = Question("conv", 16, 16, "3", "", 1, "8", 8, "int8")
    assert kernel_asked(profile, asked) == often
    assert kernel_asked(profile, replace(asked, context="q conv2d")) == rows[0].kernel
    assert kernel_asked(profile, replace(asked, context=".q")) == often
    assert kernel_asked(profile, replace(asked, kernel="3x5", stride="2")).stride == (2, 2)
    with pytest.raises(ConfigError, match="it has conv in int8"):
        kernel_asked(profile, replace(asked, precision="fp32"))
    with pytest.raises(ConfigError, match=r"most often 'q conv2d\.q'"):
        kernel_asked(profile, replace(asked, context="add"))
    with pytest.raises(ConfigError, match="2 axes"):
        kernel_asked(profile, replace(asked, size="8x8x8"))


@pytest.mark.parametrize("op", ["linear", "entry"])
def test_other_operators_have_no_kernel(op: str) -> None:
    kernel = Kernel(op, 64, 64, (), (), 1, () if op == "linear" else (8, 8), 4, "fp32", "f linear")
    profile = replace(table(GRID), kernels=(KernelTime(kernel, 1.0, 0.0, 1),))
    size = "" if op == "linear" else "8"
    assert kernel_asked(profile, Question(op, 64, 64, size=size, batch=4)) == kernel


@given(factor=st.floats(0.5, 2.0))
def test_a_difference_says_the_scale(factor: float) -> None:
    found = difference(table(GRID, samples=100), table(GRID, factor, samples=100))
    assert found.ratios == {("conv", "fp32"): (pytest.approx(factor), len(GRID))}
    if abs(factor - 1) > 0.01:
        assert len(found.differing) == len(found.shared) == len(GRID)


def test_a_difference_with_itself_is_empty() -> None:
    found = difference(table(GRID), table(GRID))
    assert (found.differing, found.only_old, found.only_new, found.fingerprint) == ((), (), (), ())
    assert found.ratios == {("conv", "fp32"): (1.0, len(GRID))}


def test_a_difference_puts_first_what_errors_explain_least() -> None:
    old = table(GRID, samples=4, deviation=0.05)
    changed = list(old.kernels)
    changed[5] = replace(changed[5], median_ms=1.5 * changed[5].median_ms)
    changed[7] = replace(changed[7], median_ms=3.0 * changed[7].median_ms, deviation_ms=5.0 * changed[7].median_ms)
    extra = KernelTime(conv(8, 8, 8), 0.1, 0.0, 1)
    found = difference(old, replace(old, engine="runtime 2", kernels=(*changed[1:], extra)))
    assert [entry.kernel for entry in found.differing] == [GRID[5]]
    assert found.shared[1].kernel == GRID[7] and found.shared[0].ratio == pytest.approx(1.5)
    assert (found.only_old, found.only_new) == ((GRID[0],), (extra.kernel,))
    assert found.fingerprint == ("engine was runtime 1, is runtime 2",)
