"""A policy turned into weights."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from autocomp.capabilities import Numerics
from autocomp.compress.arrays import arrays_of
from autocomp.compress.ordering import select
from autocomp.compress.prune import Clock, prune
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
        graph: of the unpruned model.
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
    shapes = traced.graph.parameter_shapes(policy)
    plan = place(traced.graph, policy)
    arrays = arrays_of({name: tensor for name, tensor in sliced.items() if name in shapes})
    arrays |= sparse_weights(traced.graph, policy, arrays)
    weights = {}
    for name in plan.layers:
        parameter, bits = traced.graph.layer_by_name[name].weight, policy.precision(name).weight_bits
        codes = quantize_weight(arrays[parameter], replace(numerics, weight_max=code_max(numerics, bits)))
        weights[parameter] = replace(codes, bits=bits)
    eights = (traced.graph.layer_by_name[name].weight for name in plan.fp8)
    weights |= {parameter: quantize_fp8(arrays[parameter]) for parameter in eights}
    return arrays, weights, params_of(plan, statistics.ranges, numerics)


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
    pruned = prune(traced, statistics, policy, recipe, images, plan.observed, clock)
    module, tensors = pruned.module, arrays_of(tensors_of(pruned.module))
    sparse = sparse_weights(graph, policy, tensors)
    if sparse:
        tensors |= sparse
        found = tensors_of(module) | {name: torch.from_numpy(weight) for name, weight in sparse.items()}
        module = rebuild(traced.module, graph, found, pruned.branches)
    quantized: Quantized | None = None
    if pruned.ranges is not None:
        with clock("quantize"):
            quantized = quantize(
                module,
                lambda found: rebuild(traced.module, graph, found, pruned.branches),
                graph,
                policy,
                pruned.ranges,
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
