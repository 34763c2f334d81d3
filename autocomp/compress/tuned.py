"""A compressed float model whose weights were trained, quantized under its policy."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autocomp.capabilities import Numerics
from autocomp.compress.apply import Compressed
from autocomp.compress.arrays import arrays_of
from autocomp.compress.prune import OBSERVED_IMAGES, observe
from autocomp.compress.quantize import quantize
from autocomp.compress.surgery import rebuild, tensors_of
from autocomp.errors import CompressError
from autocomp.policy import Policy, Recipe
from autocomp.quantization import place

__all__ = ["quantize_tuned"]


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
    policy = graph.normalise(policy)
    if policy.kept != pruned.policy.kept or policy.dropped != pruned.policy.dropped:
        raise CompressError("the trained model has other channels or branches than the policy: train it again")
    trained = {name: torch.from_numpy(array) for name, array in tensors.items()}
    module = rebuild(pruned.module, graph, {**tensors_of(pruned.module), **trained})
    arrays, plan = arrays_of(tensors_of(module)), place(graph, policy)
    if not plan.layers:
        return replace(pruned, policy=policy, module=module, tensors=arrays, plan=plan, numerics=numerics)
    seen = observe(module, graph, plan.observed, recipe, images[-OBSERVED_IMAGES:], reference[-OBSERVED_IMAGES:])
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
    return replace(
        pruned,
        policy=policy,
        module=quantized.module,
        tensors={**arrays, **quantized.biases},
        weights=quantized.weights,
        params=quantized.params,
        bias_corrected=quantized.bias_corrected,
        plan=plan,
        numerics=numerics,
    )
