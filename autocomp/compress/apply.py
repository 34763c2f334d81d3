"""A policy turned into weights."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from autocomp.capabilities import Numerics
from autocomp.compress.lowering import Norm
from autocomp.compress.naming import value_of
from autocomp.compress.ordering import select
from autocomp.compress.quantize import fake_quantize_activations, params_of, round_weights
from autocomp.compress.recalibrate import divergence, recalibrated
from autocomp.compress.reconstruct import reconstruct
from autocomp.compress.statistics import Ranges, Statistics, Watcher, check_images
from autocomp.compress.surgery import batches, kept_positions, rebuild, slice_tensors, tensors_of
from autocomp.compress.tracing import Traced
from autocomp.errors import CompressError
from autocomp.graph import LayerGraph
from autocomp.policy import Policy, Recipe
from autocomp.quantization import QuantParams, QuantPlan, place, round_biases

__all__ = ["Compressed", "compress", "structure"]

# Images behind renewed batch norm statistics, and those (others, where there are enough) that ranges and divergence
# come from: a few hundred settle both, and every trial pays for them.
RECALIBRATION_IMAGES, OBSERVED_IMAGES = 128, 128

Tensors = Mapping[str, Tensor]
Positions = Mapping[tuple[str, int], NDArray[np.int64]]


@dataclass(frozen=True)
class Compressed:
    """A compressed model.

    Attributes:
        policy: normalised.
        module: sliced and reconstructed, dropped branches bypassed, int8 values and weights as their codes stand for.
        tensors: parameter -> float weights before int8 rounding, and biases (of int8 layers on the engine's grid).
        params: quantized value -> its parameters.
        kept: pruned group -> channels that stayed.
        recalibrated: whether the batch norms' statistics were renewed.
        divergence_before, divergence_after: KL in nats on calibration images without and with recalibration; None
            where the recipe does not compare the two, or nothing was pruned.
        graph: of the unpruned model.
        plan: where int8 begins and ends.
        numerics: of int8.
        seconds: stage -> wall time.
    """

    policy: Policy
    module: fx.GraphModule
    tensors: Mapping[str, NDArray[np.float32]]
    params: Mapping[str, QuantParams]
    kept: Mapping[str, tuple[int, ...]]
    recalibrated: bool
    divergence_before: float | None
    divergence_after: float | None
    graph: LayerGraph
    plan: QuantPlan
    numerics: Numerics
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class _Observation:
    """One pass over held-out calibration images."""

    ranges: Mapping[str, tuple[float, float]]
    divergence: float


@dataclass
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def structure(
    traced: Traced, policy: Policy, statistics: Statistics, numerics: Numerics, recipe: Recipe
) -> tuple[dict[str, NDArray[np.float32]], dict[str, QuantParams]]:
    """Tensors and int8 parameters of the right shapes and kinds, in milliseconds: what a timing needs.

    Args:
        recipe: that of `compress`.

    Returns:
        the original tensors, sliced but not reconstructed, and parameters from the unpruned model's ranges.

    Raises:
        InputError: the policy is not one of this model.
    """
    policy = _checked(traced.graph, policy)
    tensors = tensors_of(traced.module)
    kept = select(statistics.orders, policy)
    sliced = slice_tensors(tensors, kept_positions(traced.graph, kept))
    shapes = traced.graph.parameter_shapes(policy)
    params = params_of(place(traced.graph, policy), statistics.ranges, numerics)
    return _arrays({name: tensor for name, tensor in sliced.items() if name in shapes}), params


def compress(
    traced: Traced, statistics: Statistics, policy: Policy, recipe: Recipe, numerics: Numerics, images: Tensor
) -> Compressed:
    """Apply a policy: select, slice, reconstruct, recalibrate, quantize. Equal inputs give equal results.

    Args:
        images: the calibration images that ``statistics`` come from, in their order.

    Raises:
        InputError: the policy is not one of this model.
        DataError: the images do not fit the model.
        CompressError: the images are not those of the statistics, or a layer's output is not finite.
    """
    clock, graph = _Clock(), traced.graph
    policy = _checked(graph, policy)
    images = check_images(images, graph)[: recipe.images]
    if len(images) != len(statistics.logits):
        raise CompressError(
            f"{len(images)} calibration images do not fit statistics of {len(statistics.logits)}: collect them again"
        )
    with clock("select"):
        original = tensors_of(traced.module)
        kept = select(statistics.orders, policy)
        positions = kept_positions(graph, kept)
        tensors = slice_tensors(original, positions)
    if recipe.reconstruction == "closed_form":
        with clock("reconstruct"):
            tensors |= _reconstructed(graph, policy, statistics, recipe, original, positions)
    branches = [graph.branch_by_name[name] for name in sorted(policy.dropped)]
    with clock("build"):
        module = rebuild(traced.module, graph, tensors, branches)
    plan = place(graph, policy)

    def observe(candidate: fx.GraphModule) -> _Observation:
        with clock("observe"):
            held_out, reference = images[-OBSERVED_IMAGES:], statistics.logits[-OBSERVED_IMAGES:]
            return _observe(candidate, graph, plan.observed, recipe, held_out, reference)

    before = after = observed = None
    renewed = False
    if recipe.recalibration != "never" and traced.norms and (policy.kept or policy.dropped):
        with clock("recalibrate"):
            norms = _sliced(traced.norms, graph, positions)
            fresh = recalibrated(module, graph, norms, images[:RECALIBRATION_IMAGES])
            candidate = rebuild(traced.module, graph, tensors | fresh, branches)
        if recipe.recalibration == "auto":
            without, observed = observe(module), observe(candidate)
            before, after = without.divergence, observed.divergence
            renewed = after <= before
            observed = observed if renewed else without
        else:
            renewed = True
        module = candidate if renewed else module
    if plan.values and observed is None:
        observed = observe(module)
    tensors = tensors_of(module)
    params: dict[str, QuantParams] = {}
    with clock("quantize"):
        if observed is not None and plan.values:
            params = params_of(plan, observed.ranges, numerics)
            rounded = round_biases(graph, policy, _arrays(tensors), params, numerics)
            tensors = {**tensors, **{name: torch.from_numpy(bias) for name, bias in rounded.items()}}
            module = rebuild(traced.module, graph, round_weights(tensors, graph, plan.layers, numerics), branches)
            fake_quantize_activations(module, params, numerics)
    return Compressed(
        policy=policy,
        module=module,
        tensors=_arrays(tensors),
        params=params,
        kept=kept,
        recalibrated=renewed,
        divergence_before=before,
        divergence_after=after,
        graph=graph,
        plan=plan,
        numerics=numerics,
        seconds=clock.seconds,
    )


def _checked(graph: LayerGraph, policy: Policy) -> Policy:
    graph.validate(policy)
    return graph.normalise(policy)


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
        weight, bias = original[layer.weight], original[layer.bias]
        if (layer.weight, 0) in positions:
            rows = torch.from_numpy(positions[layer.weight, 0])
            weight, bias = weight[rows], bias[rows]
        kept = positions[layer.weight, 1]
        result[layer.weight], result[layer.bias] = reconstruct(layer, weight, bias, kept, moments, recipe.ridge)
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


def _observe(
    module: fx.GraphModule,
    graph: LayerGraph,
    values: Sequence[str],
    recipe: Recipe,
    images: Tensor,
    reference: Tensor,
) -> _Observation:
    ranges = Ranges(recipe, values, len(images))

    def watch(node: fx.Node, value: Any, _read: object) -> None:
        ranges.watch(value_of(node), value)

    watcher = Watcher(module, watch)
    with torch.no_grad():
        logits = torch.cat([watcher.run(part) for part in batches(images, 128)])
    return _Observation(ranges.bounds(graph), divergence(reference, logits))


def _arrays(tensors: Tensors) -> dict[str, NDArray[np.float32]]:
    return {name: tensor.numpy() for name, tensor in tensors.items() if tensor.is_floating_point()}
