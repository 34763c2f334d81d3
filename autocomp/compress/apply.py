"""A policy turned into weights."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from autocomp.capabilities import Numerics
from autocomp.compress.ordering import select
from autocomp.compress.prune import Clock, prune
from autocomp.compress.quantize import fake_quantize_activations, params_of, round_weights
from autocomp.compress.statistics import Statistics, check_images
from autocomp.compress.surgery import kept_positions, rebuild, slice_tensors, tensors_of
from autocomp.compress.tracing import Traced
from autocomp.errors import CompressError
from autocomp.graph import LayerGraph
from autocomp.policy import Policy, Recipe
from autocomp.quantization import QuantParams, QuantPlan, place, round_biases

__all__ = ["Compressed", "compress", "structure"]


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
    clock, graph = Clock(), traced.graph
    policy = _checked(graph, policy)
    images = check_images(images, graph)[: recipe.images]
    if len(images) != len(statistics.logits):
        raise CompressError(
            f"{len(images)} calibration images do not fit statistics of {len(statistics.logits)}: collect them again"
        )
    plan = place(graph, policy)
    pruned = prune(traced, statistics, policy, recipe, images, plan.observed, clock)
    module, tensors = pruned.module, tensors_of(pruned.module)
    params: dict[str, QuantParams] = {}
    if pruned.ranges is not None:
        with clock("quantize"):
            params = params_of(plan, pruned.ranges, numerics)
            rounded = round_biases(graph, policy, _arrays(tensors), params, numerics)
            tensors = {**tensors, **{name: torch.from_numpy(bias) for name, bias in rounded.items()}}
            weights = round_weights(tensors, graph, plan.layers, numerics)
            module = rebuild(traced.module, graph, weights, pruned.branches)
            fake_quantize_activations(module, params, numerics)
    return Compressed(
        policy=policy,
        module=module,
        tensors=_arrays(tensors),
        params=params,
        kept=pruned.kept,
        recalibrated=pruned.recalibrated,
        divergence_before=pruned.divergence_before,
        divergence_after=pruned.divergence_after,
        graph=graph,
        plan=plan,
        numerics=numerics,
        seconds=clock.seconds,
    )


def _checked(graph: LayerGraph, policy: Policy) -> Policy:
    graph.validate(policy)
    return graph.normalise(policy)


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[np.float32]]:
    return {name: tensor.numpy() for name, tensor in tensors.items() if tensor.is_floating_point()}
