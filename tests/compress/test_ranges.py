"""Ranges of activations against plain loops and brute force."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from autocomp.capabilities import Numerics
from autocomp.compress import calibration_notes, collect, compress
from autocomp.compress.ranges import BINS, SAMPLES, Ranges, entropy_bins, entropy_range, least_error_range
from autocomp.policy import INT8, Policy, Recipe
from autocomp.quantization import activation_params
from tests.compress.conftest import UNSIGNED, Case
from tests.compress.nets import images


def migacz(counts: NDArray[np.float64], levels: int, stride: int) -> int:
    """The talk's pseudocode, one bin at a time."""
    best, least = len(counts), np.inf
    for kept in range(levels, len(counts) + 1, stride):
        p = counts[:kept].copy()
        p[-1] += counts[kept:].sum()
        q = np.zeros(kept)
        for level in range(levels):
            members = [b for b in range(kept) if b * levels // kept == level]
            filled = [b for b in members if counts[b] > 0]
            for b in filled:
                q[b] = sum(counts[m] for m in members) / len(filled)
        if ((p > 0) & (q == 0)).any() or not q.any():
            continue
        p, q = p / p.sum(), q / q.sum()
        divergence = sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
        if divergence < least - 1e-12:
            best, least = kept, divergence
    return best


@pytest.mark.parametrize("seed", range(6))
def test_entropy_is_the_talks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.abs(rng.standard_t(3, 3000)) if seed % 2 else rng.exponential(1.0, 2000) ** 1.5
    counts = np.histogram(values, 200)[0].astype(np.float64)
    assert entropy_bins(counts, 16) == migacz(counts, 16, 8)


def test_entropy_cuts_off_what_is_rare() -> None:
    rng = np.random.default_rng(0)
    values = torch.from_numpy(np.concatenate([rng.normal(0, 1, 100_000), [40.0, -30.0]])).float()
    low, high = entropy_range(values, (-30.0, 40.0))
    assert -12 < low < -2.5 and 2.5 < high < 12
    assert low == -high
    flat = torch.from_numpy(rng.random(100_000)).float()
    assert entropy_range(flat, (0.0, 1.0))[1] > 0.95
    sparse = torch.cat([torch.zeros(500_000), flat])  # what a ReLU gives: zeros say nothing about the range
    assert entropy_range(sparse, (0.0, 1.0)) == entropy_range(flat, (0.0, 1.0))


def error(values: NDArray[np.float64], low: float, high: float, numerics: Numerics) -> float:
    params = activation_params(low, high, numerics)
    first, last = numerics.activation_range
    codes = np.clip(np.rint(values / params.scale) + params.zero_point, first, last)
    return float(((params.scale * (codes - params.zero_point) - values) ** 2).mean())


@pytest.mark.parametrize("tail", ["normal", "relu", "skewed", "uniform", "rare"])
def test_least_error_is_near_brute_force(tail: str) -> None:
    rng = np.random.default_rng(1)
    values = {
        "normal": rng.standard_t(3, 20_000),
        "relu": np.maximum(rng.standard_t(3, 20_000), 0),
        "skewed": rng.gamma(0.3, 1.0, 20_000) - 0.2 * rng.gamma(2.0, 1.0, 20_000),
        "uniform": rng.uniform(-1, 3, 20_000),
        "rare": np.append(rng.uniform(0, 0.3, 300_000), 1.0),  # one number far out costs less than its range
    }[tail]
    values = values.astype(np.float32).astype(np.float64)
    low, high = min(values.min(), 0.0), values.max()
    found = error(values, *least_error_range(torch.from_numpy(values).float(), (low, high)), UNSIGNED)
    grid = np.linspace(0.05, 1.0, 40)
    brute = min(error(values, a * low, b * high, UNSIGNED) for a in (grid if low < 0 else [1.0]) for b in grid)
    assert found <= 1.03 * brute
    assert found <= error(values, low, high, UNSIGNED) * (0.8 if tail == "rare" else 1.001)


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse"])
def test_every_method_stays_inside_what_was_seen(chain: Case, method: str) -> None:
    recipe = replace(Recipe(), ranges=method)
    widest = collect(chain.traced, chain.images, Recipe()).ranges
    found = collect(chain.traced, chain.images, recipe).ranges
    assert found.keys() == widest.keys()
    for name, (low, high) in found.items():
        least, most = min(widest[name][0], 0.0), max(widest[name][1], 0.0)  # zero always has a code
        assert least - 1e-6 <= low <= high <= most + 1e-6
    assert (found == widest) == (method == "minmax")
    again = collect(chain.traced, chain.images, recipe).ranges
    assert found == again


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
def test_batches_do_not_matter(chain: Case, method: str) -> None:
    recipe = replace(Recipe(), ranges=method)
    value = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0)).relu()
    bounds = []
    for size in (64, 16):
        ranges = Ranges(recipe, ["relu"], 64)
        for part in value.split(size):
            ranges.watch("relu", part)
        bounds.append(ranges.bounds(chain.traced.graph)["relu"])
    assert bounds[0] == bounds[1]


def test_memory_stays_bounded(chain: Case) -> None:
    ranges = Ranges(Recipe(ranges="mse"), ["relu"], 2**11)
    for _ in range(2**5):
        ranges.watch("relu", torch.rand(64, 2**11))
    assert sum(len(part) for part in ranges._samples["relu"]) <= 1.1 * SAMPLES
    assert BINS == 2048


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse"])
@pytest.mark.parametrize("value", [0.0, 2.5, -2.5, 1e-42])
def test_a_constant_value_keeps_its_number(chain: Case, method: str, value: float) -> None:
    ranges = Ranges(replace(Recipe(), ranges=method), ["relu"], 8)
    ranges.watch("relu", torch.full((8, 3), value))
    low, high = ranges.bounds(chain.traced.graph)["relu"]
    assert error(np.full(3, value), low, high, UNSIGNED) <= 1e-4 * value**2 + 1e-12


def test_entropy_is_of_all_calibration_images(chain: Case) -> None:
    """Also where a pruned model is looked at anew, for which other methods take the last ones alone."""
    loud, quiet = 4 * images(200, 8), images(136, 8, seed=1)
    calibration = torch.cat([loud, quiet])
    recipe = Recipe(reconstruction="sequential", ranges="entropy", images=len(calibration))
    graph = chain.traced.graph
    first = graph.nodes[0].name
    group = next(group for group in graph.groups if group.name == graph.layers[0].name)
    policy = graph.normalise(Policy({group.name: group.channels // 2}, precisions={graph.layers[0].name: INT8}))
    made = compress(chain.traced, collect(chain.traced, calibration, recipe), policy, recipe, UNSIGNED, calibration)
    bounds = float(calibration.min()), float(calibration.max())
    expected = activation_params(*entropy_range(calibration.reshape(-1), bounds), UNSIGNED).scale
    assert made.params[first].scale == pytest.approx(expected, rel=1e-3)
    alone = activation_params(*entropy_range(quiet.reshape(-1), (float(quiet.min()), float(quiet.max()))), UNSIGNED)
    assert made.params[first].scale > 1.5 * alone.scale


def test_a_dead_layer_and_few_images_are_told(chain: Case) -> None:
    graph = chain.traced.graph
    notes = calibration_notes(graph, chain.statistics.ranges, torch.randn(255, 4))
    assert len(notes) == 1 and "255 calibration images" in notes[0]
    assert calibration_notes(graph, chain.statistics.ranges, torch.randn(256, 4)) == ()
    assert calibration_notes(graph, chain.statistics.ranges, torch.randn(1000, 4), "entropy") == ()
    (few,) = calibration_notes(graph, chain.statistics.ranges, torch.randn(999, 4), "entropy")
    assert "entropy calibration on 999 images: TensorRT's is used with 1,000 at least" in few
    dead = copy.deepcopy(chain.traced)
    dead.module.get_parameter("conv2.weight").data.zero_()
    dead.module.get_parameter("conv2.bias").data.fill_(-1.5)
    found = calibration_notes(graph, collect(dead, chain.images, Recipe()).ranges, torch.randn(1024, 4))
    assert "the output of conv2 is -1.5 on every" in found[0]
    # whatever comes behind a layer that is all zero can be constant too
    assert not any("conv1" in note for note in found)
