"""A float model made the one that an engine will compute: codes, scales, and fake quantization in their places."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from autocomp.capabilities import Numerics
from autocomp.compress.arrays import arrays_of
from autocomp.compress.naming import value_of
from autocomp.compress.recalibrate import divergence
from autocomp.compress.rounding import adaround, corrected_biases
from autocomp.compress.surgery import run, tensors_of
from autocomp.fake_quant import fake_quantize, fake_quantize_fp8
from autocomp.graph import LayerGraph
from autocomp.policy import Policy, Recipe
from autocomp.quantization import (
    FP8_MAX,
    QuantParams,
    QuantPlan,
    QuantWeight,
    activation_params,
    fp8_key,
    fp8_params,
    place,
    quantize_weights,
    round_biases,
)

__all__ = ["Quantized", "assemble", "params_of", "quantize"]

# Images behind a mean shift, and those (others, where there are enough) that tell whether correcting it helped.
CORRECTION_IMAGES, HELD_OUT_IMAGES = 64, 64

Build = Callable[[Mapping[str, Tensor]], fx.GraphModule]


@dataclass(frozen=True)
class Quantized:
    """A quantized model.

    Attributes:
        module: weights, biases and activations are what the engine's codes stand for.
        weights: parameter -> codes of every integer layer.
        biases: parameter -> those of the integer layers, on the engine's grid.
        params: quantized value -> its parameters.
        bias_corrected: whether mean shifts were taken back.
    """

    module: fx.GraphModule
    weights: Mapping[str, QuantWeight]
    biases: Mapping[str, NDArray[np.float32]]
    params: Mapping[str, QuantParams]
    bias_corrected: bool


def params_of(plan: QuantPlan, ranges: Mapping[str, tuple[float, float]], numerics: Numerics) -> dict[str, QuantParams]:
    """Parameters of every quantized value; those that share a source share them. With `fp8_key` those of fp8 layers."""
    sources = {source: activation_params(*ranges[source], numerics) for source in plan.values.values()}
    eights = {fp8_key(value): fp8_params(*ranges[value]) for value in plan.fp8.values()}
    return {**{value: sources[source] for value, source in plan.values.items()}, **eights}


def quantize(
    module: fx.GraphModule,
    build: Build,
    graph: LayerGraph,
    policy: Policy,
    ranges: Mapping[str, tuple[float, float]],
    recipe: Recipe,
    numerics: Numerics,
    images: Tensor,
    reference: Tensor,
) -> Quantized:
    """Quantize a pruned model under a policy.

    Args:
        module: float.
        build: makes a module like it around other tensors.
        policy: normalised.
        ranges: of every value that `place` observes.
        images: of calibration.
        reference: logits of the uncompressed model on them.
    """
    tensors = tensors_of(module)
    params = params_of(place(graph, policy), ranges, numerics)

    def built(weights: Mapping[str, QuantWeight]) -> fx.GraphModule:
        return _built(build, tensors, graph, policy, weights, params, numerics)

    def finished(weights: Mapping[str, QuantWeight], biases: Mapping[str, Tensor], corrected: bool) -> Quantized:
        made = assemble({**tensors, **biases}, build, graph, policy, weights, params, numerics)
        return replace(made, bias_corrected=corrected)

    weights = quantize_weights(graph, policy, arrays_of(tensors), numerics)
    few_bits = any(weight.bits < 8 for weight in weights.values())
    if few_bits and recipe.rounding == "adaround":
        weights = adaround(module, built(weights), graph, weights, numerics, recipe, images)
    if recipe.bias_correction == "never" or not weights or (recipe.bias_correction == "auto" and not few_bits):
        return finished(weights, {}, corrected=False)
    layers = place(graph, policy).layers
    biases = corrected_biases(module, built(weights), graph, layers, images[:CORRECTION_IMAGES])
    corrected = finished(weights, biases, corrected=True)
    if recipe.bias_correction == "always":
        return corrected
    plain = finished(weights, {}, corrected=False)
    held_out, logits = images[-HELD_OUT_IMAGES:], reference[-HELD_OUT_IMAGES:]
    gained = divergence(logits, run(corrected.module, held_out)) < divergence(logits, run(plain.module, held_out))
    return corrected if gained else plain


def assemble(
    tensors: Mapping[str, Tensor],
    build: Build,
    graph: LayerGraph,
    policy: Policy,
    weights: Mapping[str, QuantWeight],
    params: Mapping[str, QuantParams],
    numerics: Numerics,
) -> Quantized:
    """The model that given codes and parameters stand for, biases rounded to the engine's grid.

    Args:
        tensors: float, of the whole model.
        build: makes a module around other tensors.
        policy: normalised.
    """
    biases = round_biases(graph, policy, arrays_of(tensors), weights, params)
    on_grid = {name: torch.from_numpy(bias) for name, bias in biases.items()}
    module = _built(build, {**tensors, **on_grid}, graph, policy, weights, params, numerics)
    return Quantized(module, weights, biases, params, bias_corrected=False)


def _built(
    build: Build,
    tensors: Mapping[str, Tensor],
    graph: LayerGraph,
    policy: Policy,
    weights: Mapping[str, QuantWeight],
    params: Mapping[str, QuantParams],
    numerics: Numerics,
) -> fx.GraphModule:
    real = {name: torch.from_numpy(weight.real) for name, weight in weights.items()}
    module = build({**tensors, **real})
    _fake_quantize_activations(module, params, numerics)
    for name, value in place(graph, policy).fp8.items():
        _fake_quantize_input(module, graph.layer_by_name[name].node, params[fp8_key(value)].scale)
    return module


def _fake_quantize_activations(module: fx.GraphModule, params: Mapping[str, QuantParams], numerics: Numerics) -> None:
    """Put a fake-quantize node behind each quantized value; all its readers read the quantized one. In place."""
    smallest, largest = numerics.activation_range
    for node in list(module.graph.nodes):
        chosen = params.get(value_of(node)) if node.op in ("placeholder", "call_function") else None
        if chosen is None:
            continue
        with module.graph.inserting_after(node):
            quantized = module.graph.create_node(
                "call_function",
                fake_quantize,
                (node, chosen.scale, chosen.zero_point, smallest, largest),
                name=f"{node.name}_quantized",
            )
        node.replace_all_uses_with(quantized, delete_user_cb=lambda user, own=quantized: user is not own)
    module.recompile()


def _fake_quantize_input(module: fx.GraphModule, layer: str, scale: float) -> None:
    """Put a node that rounds to fp8 in front of a layer. In place."""
    (node,) = (node for node in module.graph.nodes if node.name == layer)
    read = node.all_input_nodes[0]
    with module.graph.inserting_before(node):
        quantized = module.graph.create_node(
            "call_function", fake_quantize_fp8, (read, scale, FP8_MAX), name=f"{layer}_input"
        )
    node.replace_input_with(read, quantized)
    module.recompile()
