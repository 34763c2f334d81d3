"""Ranges of integer activations: what part of the values seen in calibration gets codes of its own."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autocomp.errors import CompressError
from autocomp.graph import LayerGraph
from autocomp.policy import INT8, Policy, Recipe
from autocomp.quantization import place

__all__ = ["FEW_IMAGES", "Ranges", "calibration_notes", "entropy_bins", "entropy_range", "least_error_range"]

FEW_IMAGES = 256
ENTROPY_IMAGES = 1000  # that TensorRT's entropy calibration is used with
ALIKE = 1e-5  # relative difference of logits that rounding explains
SAMPLES = 2**18  # kept of one value, whatever the number of images
BINS = 2048
LEVELS = 256  # of an 8-bit code
_STRIDE = 8  # of the thresholds that the entropy search tries, in bins
_SHRINK = np.linspace(1.0, 0.05, 77)

Bounds = tuple[float, float]


class Ranges:
    """Bounds of values seen in one pass, by a recipe's method.

    Memory stays bounded: the extremes are running ones, and of every value at most ``SAMPLES`` numbers are kept,
    taken at equal distances from every batch.
    """

    def __init__(self, recipe: Recipe, values: Iterable[str], images: int) -> None:
        """``images`` is how many the batches will hold together."""
        self._recipe = recipe
        self._bounds: dict[str, Bounds] = {}
        self._samples: dict[str, list[Tensor]] = {}
        self._wanted = frozenset(values)
        self._per_image = -(-SAMPLES // images)

    def watch(self, name: str, value: Any) -> None:
        """Take in one batch of a value, (n, ...)."""
        if name not in self._wanted or not isinstance(value, Tensor) or not value.is_floating_point():
            return
        low, high = (float(bound) for bound in torch.aminmax(value))
        before = self._bounds.get(name, (low, high))
        # written so that a NaN stays
        self._bounds[name] = (low if not low >= before[0] else before[0], high if not high <= before[1] else before[1])
        if self._recipe.ranges != "minmax":
            flat = value.reshape(-1)
            step = max(1, flat.numel() // (self._per_image * len(value)))
            step += step % 2 == 0 and step > 1  # an odd stride does not stay in the even columns of a map
            self._samples.setdefault(name, []).append(flat[::step].clone())

    def bounds(self, graph: LayerGraph) -> dict[str, Bounds]:
        """Value -> (low, high), in the graph's order, without what is infinite and never quantized, such as a mask.

        Raises:
            CompressError: a value is not finite.
        """
        whole = Policy(precisions={layer.name: INT8 for layer in graph.layers})
        needed = {*place(graph, whole).observed, *graph.layer_by_node}
        for node in graph.nodes:
            if node.name in self._bounds and not np.isfinite(self._bounds[node.name]).all():
                if node.name not in needed and not np.isnan(self._bounds.pop(node.name)).any():
                    continue
                layer = graph.layer_by_node.get(node.name)
                name = layer.name if layer else node.name
                raise CompressError(
                    f"the output of {name} is NaN or infinite on the calibration images: check the model's weights "
                    "and that the images are normalised as in its training"
                )
        return {name: self._chosen(name) for name in self._bounds}

    def _chosen(self, name: str) -> Bounds:
        if self._recipe.ranges == "minmax":
            return self._bounds[name]
        samples = torch.cat(self._samples[name])
        if self._recipe.ranges == "entropy":
            return entropy_range(samples, self._bounds[name])
        if self._recipe.ranges == "mse":
            return least_error_range(samples, self._bounds[name])
        tail = (100.0 - self._recipe.percentile) / 2
        low, high = np.percentile(samples.numpy(), (tail, 100.0 - tail))
        return float(low), float(high)


def calibration_notes(
    graph: LayerGraph, ranges: Mapping[str, Bounds], logits: Tensor, method: str = "minmax"
) -> tuple[str, ...]:
    """What a user should know of the calibration: too few images, or all alike, layers whose output never changes.

    Args:
        ranges: value -> its bounds on the calibration images.
        logits: of the unpruned model on them, (images, classes).
        method: by which the ranges were taken.
    """
    notes = []
    if len(logits) < FEW_IMAGES:
        notes.append(
            f"only {len(logits)} calibration images: ranges of int8 and corrections are uncertain below {FEW_IMAGES}, "
            "give more data"
        )
    elif method == "entropy" and len(logits) < ENTROPY_IMAGES:
        notes.append(
            f"entropy calibration on {len(logits)} images: TensorRT's is used with {ENTROPY_IMAGES:,} at least, give "
            "more data or a larger --calibration-images"
        )
    spread = float((logits.amax(0) - logits.amin(0)).max())
    if len(logits) > 1 and spread <= ALIKE * float(logits.abs().max()):
        notes.append(f"the model answers all {len(logits)} calibration images alike: check that they differ")
    for layer in graph.layers:
        low, high = ranges.get(layer.node, (0.0, 1.0))
        if low == high:
            notes.append(f"the output of {layer.name} is {low:g} on every calibration image: check data and weights")
    return tuple(notes)


def entropy_range(samples: Tensor, bounds: Bounds) -> Bounds:
    """The range whose 8-bit codes keep the distribution of magnitudes best (Migacz, 8-bit Inference with TensorRT,
    GTC 2017, s7310, the slides on entropy calibration).

    Magnitudes up to the threshold have 128 codes where a value has both signs, 256 where it has one. Exact zeros,
    which a ReLU makes many of, have a code in any range and are left out.

    Args:
        samples: (n,), of the value.
        bounds: its smallest and largest number.
    """
    low, high = bounds
    largest = max(-low, high)
    if not largest > 0:
        return bounds
    counts = torch.histc(samples[samples != 0].abs(), BINS, 0.0, largest).double().numpy()
    if not counts.any():
        return bounds
    one_sided = low >= 0 or high <= 0
    threshold = largest * entropy_bins(counts, LEVELS if one_sided else LEVELS // 2) / BINS
    return max(low, -threshold), min(high, threshold)


def entropy_bins(counts: NDArray[np.float64], levels: int) -> int:
    """How many bins of a histogram to keep, so that merged to ``levels`` they diverge least from what they stand for.

    Compares, for every number i of kept bins, the histogram's first i bins, what lies beyond added to the last of
    them, with the same bins merged evenly to ``levels`` and spread again over those that are not empty; the
    Kullback-Leibler divergence of the second from the first is least. Bins of one level share one value, so sums over
    levels replace those over bins.

    Args:
        counts: (bins,), more bins than levels, not all empty.
    """
    bins = len(counts)
    kept = np.arange(levels, bins + 1, _STRIDE)
    if kept[-1] != bins:
        kept = np.append(kept, bins)

    def running(values: NDArray[Any]) -> NDArray[np.float64]:
        return np.concatenate([[0.0], np.cumsum(values)])

    mass, filled = running(counts), running(counts > 0)
    entropies = running(_x_log_x(counts))
    edges = -(-np.arange(levels + 1) * kept[:, None] // levels)  # of each level, in bins
    inside, sizes = np.diff(mass[edges], axis=1), np.diff(filled[edges], axis=1)
    beyond = mass[-1] - mass[kept]
    last = counts[kept - 1]
    own = inside.copy()
    own[:, -1] += beyond
    spread = np.log(np.where(inside > 0, inside, 1.0) / np.maximum(sizes, 1.0))
    total = entropies[kept - 1] + _x_log_x(last + beyond) - (own * spread).sum(axis=1)
    divergence = total / mass[-1] + np.log(np.maximum(mass[kept], 1e-300) / mass[-1])
    divergence[(last == 0) & (beyond > 0)] = np.inf  # something is there that the merged bins say is impossible
    return int(kept[np.argmin(divergence)])


def least_error_range(samples: Tensor, bounds: Bounds) -> Bounds:
    """The range that leaves the least squared error of rounding to 8 bits, values beyond it cut off.

    Both ends are drawn in together, then each alone; the error is that of a histogram of the samples.

    Args:
        samples: (n,), of the value.
        bounds: its smallest and largest number.
    """
    low, high = min(bounds[0], 0.0), max(bounds[1], 0.0)
    if not (high > low and np.isfinite(high - low) and high - low > 1e-30):
        return bounds
    counts = torch.histc(samples.clamp(low, high), BINS, low, high).double().numpy()
    centres = low + (np.arange(BINS) + 0.5) * (high - low) / BINS

    def best(lows: NDArray[np.float64], highs: NDArray[np.float64]) -> Bounds:
        step = ((highs - lows) / (LEVELS - 1))[:, None]
        first = np.rint(lows[:, None] / step)
        codes = np.clip(np.rint(centres / step), first, first + LEVELS - 1)
        chosen = int(np.argmin(((codes * step - centres) ** 2) @ counts))
        return float(lows[chosen]), float(highs[chosen])

    low, high = best(low * _SHRINK, high * _SHRINK)
    if low < 0 < high:
        low, high = best(np.full_like(_SHRINK, low), high * _SHRINK)
        low, high = best(low * _SHRINK, np.full_like(_SHRINK, high))
    return low, high


def _x_log_x(values: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = values * np.log(np.where(values > 0, values, 1.0))
    return found
