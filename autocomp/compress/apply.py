"""A policy turned into weights."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from autocomp.capabilities import Numerics
from autocomp.compress.arrays import arrays_of
from autocomp.compress.low_rank import factorized, paired
from autocomp.compress.ordering import select
from autocomp.compress.prune import Clock, observe, observed_images, prune
from autocomp.compress.quantize import Quantized, params_of, quantize
from autocomp.compress.sparsity import sparse_weights
from autocomp.compress.statistics import Statistics, check_images
from autocomp.compress.surgery import kept_positions, rebuild, slice_tensors, tensors_of
from autocomp.compress.tracing import Traced
from autocomp.errors import CompressError
from autocomp.graph import LayerGraph
from autocomp.policy import Policy, Recipe
from autocomp.quantization import (
    QuantParams,
    QuantPlan,
    QuantWeight,
    code_max,
    place,
    quantize_fp8,
    quantize_weight,
)

__all__ = ["Compressed", "compress", "structure"]


@dataclass(frozen=True)
class Compressed:
    """A compressed model.

    Attributes:
        policy: normalised.
        module: sliced and reconstructed, dropped branches bypassed, int8 values and weights as their codes stand for.
        tensors: parameter -> float weights before int8 rounding, and biases (of int8 layers on the engine's grid).
        weights: parameter -> codes of every int8 layer's weight, also those of fewer bits.
        params: quantized value -> its parameters.
        kept: pruned group -> channels that stayed.
        recalibrated: whether the batch norms' statistics were renewed.
        divergence_before, divergence_after: KL in nats on calibration images without and with recalibration; None
            where the recipe does not compare the two, or nothing was pruned.
        bias_corrected: whether the mean shifts that rounding leaves were taken back.
        graph: of the unpruned model, layers of reduced rank as pairs.
        plan: where int8 begins and ends.
        numerics: of int8.
        seconds: stage -> wall time.
    """

    policy: Policy
    module: fx.GraphModule
    tensors: Mapping[str, NDArray[np.float32]]
    weights: Mapping[str, QuantWeight]
    params: Mapping[str, QuantParams]
    kept: Mapping[str, tuple[int, ...]]
    recalibrated: bool
    divergence_before: float | None
    divergence_after: float | None
    bias_corrected: bool
    graph: LayerGraph
    plan: QuantPlan
    numerics: Numerics
    seconds: Mapping[str, float]


def structure(
    traced: Traced, policy: Policy, statistics: Statistics, numerics: Numerics, recipe: Recipe
) -> tuple[dict[str, NDArray[np.float32]], dict[str, QuantWeight], dict[str, QuantParams]]:
    """Tensors, codes and int8 parameters of the right shapes and kinds, in milliseconds: what a timing needs.

    Args:
        recipe: that of `compress`.

    Returns:
        the original tensors, sliced but not reconstructed; codes as many bits wide as the policy says, but of no
        use otherwise; and parameters from the unpruned model's ranges.

    Raises:
        InputError: the policy is not one of this model.
    """
    policy = _checked(traced.graph, policy)
    tensors = tensors_of(traced.module)
    kept = select(statistics.orders, policy)
    sliced = slice_tensors(tensors, kept_positions(traced.graph, kept))
    graph, policy = traced.graph.paired(policy)
    shapes = graph.parameter_shapes(policy)
    plan = place(graph, policy)
    arrays = arrays_of({name: tensor for name, tensor in sliced.items() if name in shapes})
    ranges = dict(statistics.ranges)
    # Pairs of layers have neither weights nor ranges yet. All differ: engines share what is equal.
    for number, layer in enumerate(graph.layers, start=1):
        ranges.setdefault(layer.node, (-1.0, float(number)))
        for name in (layer.weight, layer.bias):
            if name in shapes and (name not in arrays or arrays[name].shape != shapes[name]):
                arrays[name] = np.full(shapes[name], number / prod(shapes[name]), np.float32)
    arrays |= sparse_weights(graph, policy, arrays)
    weights = {}
    for name in plan.layers:
        parameter, bits = graph.layer_by_name[name].weight, policy.precision(name).weight_bits
        codes = quantize_weight(arrays[parameter], replace(numerics, weight_max=code_max(numerics, bits)))
        weights[parameter] = replace(codes, bits=bits)
    eights = (graph.layer_by_name[name].weight for name in plan.fp8)
    weights |= {parameter: quantize_fp8(arrays[parameter]) for parameter in eights}
    return arrays, weights, params_of(plan, ranges, numerics)


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
    clock, graph = Clock(), traced.graph
    policy = _checked(graph, policy)
    images = check_images(images, graph)[: recipe.images]
    if len(images) != len(statistics.logits):
        raise CompressError(
            f"{len(images)} calibration images do not fit statistics of {len(statistics.logits)}: collect them again"
        )
    plan = place(graph, policy)
    observed = [value for value in plan.observed if value in graph.node_by_name]
    pruned = prune(traced, statistics, policy, recipe, images, observed, clock)
    module, source, ranges = pruned.module, traced.module, pruned.ranges
    graph, plain = traced.graph.paired(policy)
    if graph is not traced.graph:
        with clock("factorize"):
            source = paired(traced.module, traced.graph, graph)
            positions = kept_positions(traced.graph, pruned.kept)
            found = factorized(traced.graph, policy, tensors_of(module), statistics.moments, positions)
            module = rebuild(source, graph, found, pruned.branches)
    tensors = arrays_of(tensors_of(module))
    sparse = sparse_weights(graph, plain, tensors)
    if sparse:
        tensors |= sparse
        found = tensors_of(module) | {name: torch.from_numpy(weight) for name, weight in sparse.items()}
        module = rebuild(source, graph, found, pruned.branches)
    # Values within pairs were not there yet, and weights that lost their smaller half change all that follows.
    unseen = [value for value in plan.observed if sparse or value not in observed]
    if ranges is not None and unseen:
        with clock("observe"):
            seen = observed_images(recipe)
            found_anew = observe(module, graph, unseen, recipe, images[-seen:], statistics.logits[-seen:])
            ranges = {**ranges, **found_anew.ranges}
    quantized: Quantized | None = None
    if ranges is not None:
        with clock("quantize"):
            quantized = quantize(
                module,
                lambda found: rebuild(source, graph, found, pruned.branches),
                graph,
                plain,
                ranges,
                recipe,
                numerics,
                images,
                statistics.logits,
            )
        module, tensors = quantized.module, {**tensors, **quantized.biases}
    return Compressed(
        policy=policy,
        module=module,
        tensors=tensors,
        weights=quantized.weights if quantized else {},
        params=quantized.params if quantized else {},
        kept=pruned.kept,
        recalibrated=pruned.recalibrated,
        divergence_before=pruned.divergence_before,
        divergence_after=pruned.divergence_after,
        bias_corrected=quantized is not None and quantized.bias_corrected,
        graph=graph,
        plan=plan,
        numerics=numerics,
        seconds=clock.seconds,
    )


def _checked(graph: LayerGraph, policy: Policy) -> Policy:
    graph.validate(policy)
    return graph.normalise(policy)
