"""A compressed float model whose weights were trained, quantized under its policy."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from autocomp.capabilities import Numerics
from autocomp.compress.apply import Compressed
from autocomp.compress.arrays import arrays_of
from autocomp.compress.prune import observe, observed_images
from autocomp.compress.quantize import Quantized, assemble, quantize
from autocomp.compress.surgery import rebuild, tensors_of
from autocomp.errors import CompressError
from autocomp.policy import Policy, Recipe
from autocomp.quantization import QuantParams, QuantWeight, place

__all__ = ["quantize_learned", "quantize_tuned"]


def quantize_tuned(
    pruned: Compressed,
    tensors: Mapping[str, NDArray[np.float32]],
    policy: Policy,
    recipe: Recipe,
    numerics: Numerics,
    images: Tensor,
    reference: Tensor,
) -> Compressed:
    """Put trained tensors into a float model, calibrate their ranges anew, and quantize.

    Args:
        pruned: under the policy's channels and branches alone, in float.
        tensors: in place of its own, by name; of their shapes.
        policy: with the precisions.
        images: of calibration.
        reference: logits of the uncompressed model on them.

    Raises:
        CompressError: a value is not finite on the images.
    """
    graph = pruned.graph
    policy = _checked(pruned, policy)
    module = _trained(pruned, tensors)
    plan = place(graph, policy)
    if not plan.observed:
        arrays = arrays_of(tensors_of(module))
        return replace(pruned, policy=policy, module=module, tensors=arrays, plan=plan, numerics=numerics)
    count = observed_images(recipe)
    seen = observe(module, graph, plan.observed, recipe, images[-count:], reference[-count:])
    quantized = quantize(
        module,
        lambda found: rebuild(module, graph, found),
        graph,
        policy,
        seen.ranges,
        recipe,
        numerics,
        images,
        reference,
    )
    return _compressed(pruned, module, policy, quantized, numerics)


def quantize_learned(
    pruned: Compressed,
    tensors: Mapping[str, NDArray[np.float32]],
    policy: Policy,
    weights: Mapping[str, QuantWeight],
    params: Mapping[str, QuantParams],
    numerics: Numerics,
) -> Compressed:
    """Put trained tensors into a float model that was trained with its codes: nothing is calibrated.

    Args:
        pruned: under the policy's channels and branches alone, in float.
        tensors: in place of its own, by name; of their shapes.
        policy: with the precisions.
        weights: parameter -> codes of every integer layer.
        params: of every quantized value.
    """
    policy = _checked(pruned, policy)
    module, graph = _trained(pruned, tensors), pruned.graph
    built = assemble(
        tensors_of(module), lambda found: rebuild(module, graph, found), graph, policy, weights, params, numerics
    )
    return _compressed(pruned, module, policy, built, numerics)


def _checked(pruned: Compressed, policy: Policy) -> Policy:
    policy = pruned.graph.normalise(policy)
    if policy.kept != pruned.policy.kept or policy.dropped != pruned.policy.dropped:
        raise CompressError("the trained model has other channels or branches than the policy: train it again")
    return policy


def _trained(pruned: Compressed, tensors: Mapping[str, NDArray[np.float32]]) -> fx.GraphModule:
    found = {name: torch.from_numpy(array) for name, array in tensors.items()}
    return rebuild(pruned.module, pruned.graph, {**tensors_of(pruned.module), **found})


def _compressed(
    pruned: Compressed, module: fx.GraphModule, policy: Policy, quantized: Quantized, numerics: Numerics
) -> Compressed:
    return replace(
        pruned,
        policy=policy,
        module=quantized.module,
        tensors={**arrays_of(tensors_of(module)), **quantized.biases},
        weights=quantized.weights,
        params=quantized.params,
        bias_corrected=quantized.bias_corrected,
        plan=place(pruned.graph, policy),
        numerics=numerics,
    )
