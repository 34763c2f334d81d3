"""A policy's channels and branches taken out of a model, the remaining layers making up for them."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from autocomp.compress.affine import Norm
from autocomp.compress.means import FoldedMeans, fold_means
from autocomp.compress.naming import value_of
from autocomp.compress.ordering import select
from autocomp.compress.ranges import Ranges
from autocomp.compress.recalibrate import divergence, recalibrated
from autocomp.compress.reconstruct import reconstruct
from autocomp.compress.sequential import solve_in_sequence
from autocomp.compress.statistics import Statistics, Watcher
from autocomp.compress.surgery import batches, kept_positions, rebuild, slice_tensors, tensors_of
from autocomp.compress.tracing import Traced
from autocomp.graph import Branch, LayerGraph
from autocomp.policy import Policy, Recipe

__all__ = ["Clock", "Observation", "Pruned", "observe", "observed_images", "prune"]

# Images behind renewed batch norm statistics, and those (others, where there are enough) that ranges and divergence
# come from: a few hundred settle both, and every trial pays for them.
RECALIBRATION_IMAGES, OBSERVED_IMAGES = 128, 128
# Of a trial that drops branches: images that it is solved on in sequence, multiply-accumulates of the model that these
# may take (about a second), and how many images are worth beginning with.
SEQUENCE_IMAGES, SEQUENCE_MACS, FEWEST_IN_SEQUENCE = 64, 2 * 10**10, 4

Tensors = Mapping[str, Tensor]
Positions = Mapping[tuple[str, int], NDArray[np.int64]]


@dataclass(frozen=True)
class Pruned:
    """A float model under a policy's channels and branches.

    Attributes:
        module: sliced and reconstructed, dropped branches bypassed.
        branches: those dropped.
        kept: pruned group -> channels that stayed.
        recalibrated, divergence_before, divergence_after: see `Compressed`.
        ranges: value -> its bounds on held-out calibration images; None where no value is to be quantized.
    """

    module: fx.GraphModule
    branches: tuple[Branch, ...]
    kept: Mapping[str, tuple[int, ...]]
    recalibrated: bool
    divergence_before: float | None
    divergence_after: float | None
    ranges: Mapping[str, tuple[float, float]] | None


@dataclass
class Clock:
    """Adds up the wall time of stages."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def prune(
    traced: Traced,
    statistics: Statistics,
    policy: Policy,
    recipe: Recipe,
    images: Tensor,
    observed: Sequence[str],
    clock: Clock,
) -> Pruned:
    """Select, slice, reconstruct, recalibrate.

    Args:
        policy: normalised.
        images: the calibration images behind ``statistics``, in their order.
        observed: values whose ranges are wanted.
    """
    graph = traced.graph
    with clock("select"):
        original = tensors_of(traced.module)
        kept = select(statistics.orders, policy)
        positions = kept_positions(graph, kept)
    made, folded = dict[str, Tensor](), FoldedMeans()
    if recipe.reconstruction != "none":
        with clock("reconstruct"):
            made = _reconstructed(graph, policy, statistics, recipe, original, positions)
    with clock("select"):
        others = {name: tensor for name, tensor in original.items() if name not in made}
        tensors = made | slice_tensors(others, positions)
    if recipe.reconstruction != "none":
        with clock("reconstruct"):
            folded = fold_means(traced, policy, statistics.means, statistics.ranges, tensors, positions)
            tensors |= folded.biases
    branches = tuple(graph.branch_by_name[name] for name in sorted(policy.dropped))
    with clock("build"):
        module = rebuild(traced.module, graph, tensors, branches)
    if count := _images_in_sequence(graph, policy, recipe):
        with clock("sequence"):
            tensors |= solve_in_sequence(traced, module, policy, positions, images[:count], recipe, statistics.outputs)
            module = rebuild(traced.module, graph, tensors, branches)

    def look(candidate: fx.GraphModule) -> Observation:
        with clock("observe"):
            seen = observed_images(recipe)
            return observe(candidate, graph, observed, recipe, images[-seen:], statistics.logits[-seen:])

    before = after = None
    seen: Observation | None = None
    renewed = False
    if traced.norms and _worth_recalibrating(policy, recipe):
        with clock("recalibrate"):
            norms = _sliced(traced.norms, graph, positions)
            norms |= {
                name: replace(norms[name], beta=norms[name].beta + folded.added[name])
                for name in norms.keys() & folded.added
            }
            fresh = recalibrated(module, graph, norms, images[:RECALIBRATION_IMAGES])
            candidate = rebuild(traced.module, graph, tensors | fresh, branches)
        if recipe.recalibration == "auto":
            without, seen = look(module), look(candidate)
            before, after = without.divergence, seen.divergence
            renewed = after <= before
            seen = seen if renewed else without
        else:
            renewed = True
        module = candidate if renewed else module
    ranges = seen.ranges if seen else None
    if observed and ranges is None:
        ranges = statistics.ranges if _ranges_kept(policy, recipe) else look(module).ranges
    return Pruned(module, branches, kept, renewed, before, after, ranges if observed else None)


def observed_images(recipe: Recipe) -> int:
    """Calibration images, from their end, that ranges and divergence come from; a histogram's tail needs them all."""
    return recipe.images if recipe.ranges == "entropy" else OBSERVED_IMAGES


@dataclass(frozen=True)
class Observation:
    """One pass over held-out calibration images."""

    ranges: Mapping[str, tuple[float, float]]
    divergence: float


def _images_in_sequence(graph: LayerGraph, policy: Policy, recipe: Recipe) -> int:
    """How many images layers are solved on in sequence: where a branch goes, what the layers behind it read is too
    unlike the unpruned model's statistics for the closed form. Of a large model a trial takes fewer images, or none,
    since one pass over them would cost more than all the rest of it."""
    if recipe.reconstruction == "sequential" and _loses(policy):
        return recipe.images
    if recipe.reconstruction != "auto" or not policy.dropped:
        return 0
    affordable = min(SEQUENCE_IMAGES, SEQUENCE_MACS // graph.macs(Policy()))
    return affordable if affordable >= FEWEST_IN_SEQUENCE else 0


def _worth_recalibrating(policy: Policy, recipe: Recipe) -> bool:
    """Whether fresh batch norm statistics are looked at: a reconstruction keeps mean and variance where channels go,
    without running the model, but where branches go the streams' variance falls. A trial's solve in sequence takes
    the place of such a look."""
    if recipe.recalibration == "always" or recipe.reconstruction == "none":
        return recipe.recalibration != "never" and bool(policy.kept or policy.dropped)
    return recipe.recalibration == "auto" and recipe.reconstruction != "auto" and bool(policy.dropped)


def _ranges_kept(policy: Policy, recipe: Recipe) -> bool:
    """Whether values still have the unpruned model's ranges, at least nearly: a pass over images for every policy would
    cost more than all the rest. The closed form keeps mean and variance; finalists are looked at anew."""
    if not _loses(policy):
        return True
    closed = recipe.reconstruction in ("closed_form", "auto") and not policy.dropped
    return closed and recipe.recalibration != "always"


def _loses(policy: Policy) -> bool:
    """Whether channels, branches or ranks go."""
    return bool(policy.kept or policy.dropped or any(found.rank for found in policy.precisions.values()))


def _reconstructed(
    graph: LayerGraph, policy: Policy, statistics: Statistics, recipe: Recipe, original: Tensors, positions: Positions
) -> dict[str, Tensor]:
    """Weights and biases of the remaining layers that lose inputs."""
    gone = graph.removed_layers(policy)
    result = {}
    for name, moments in statistics.moments.items():
        layer = graph.layer_by_name[name]
        if name in gone or (layer.weight, 1) not in positions:
            continue
        weight, bias, cross = original[layer.weight], original[layer.bias], statistics.cross.get(name)
        kept, rows = positions[layer.weight, 1], positions.get((layer.weight, 0))
        made = reconstruct(layer, weight, bias, kept, moments, recipe.ridge, cross, rows)
        result[layer.weight], result[layer.bias] = made
    return result


def _sliced(norms: Mapping[str, Norm], graph: LayerGraph, positions: Positions) -> dict[str, Norm]:
    """The norms of the channels that stay."""

    def cut(name: str, norm: Norm) -> Norm:
        rows = positions.get((graph.layer_by_name[name].weight, 0))
        if rows is None:
            return norm
        index = torch.from_numpy(rows)
        return Norm(norm.beta[index], norm.gamma[index], norm.epsilon[index])

    return {name: cut(name, norm) for name, norm in norms.items()}


def observe(
    module: fx.GraphModule,
    graph: LayerGraph,
    values: Sequence[str],
    recipe: Recipe,
    images: Tensor,
    reference: Tensor,
) -> Observation:
    """Run a module once over held-out calibration images.

    Args:
        values: whose ranges are wanted.
        reference: the uncompressed model's logits on the images.
    """
    ranges = Ranges(recipe, values, len(images))

    def watch(node: fx.Node, value: Any, _read: object) -> None:
        ranges.watch(value_of(node), value)

    watcher = Watcher(module, watch)
    with torch.no_grad():
        logits = torch.cat([watcher.run(part) for part in batches(images, 128)])
    return Observation(ranges.bounds(graph), divergence(reference, logits))
