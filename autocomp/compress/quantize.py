"""Fake quantization of a module at the places and with the parameters that an engine will use."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx

from autocomp.capabilities import Numerics
from autocomp.compress.naming import value_of
from autocomp.graph import LayerGraph
from autocomp.quantization import QuantParams, QuantPlan, activation_params, dequantize_weight, quantize_weight

__all__ = ["fake_quantize_activations", "params_of", "round_weights"]


def params_of(plan: QuantPlan, ranges: Mapping[str, tuple[float, float]], numerics: Numerics) -> dict[str, QuantParams]:
    """Parameters of every quantized value; those that share a source share them."""
    sources = {source: activation_params(*ranges[source], numerics) for source in plan.observed}
    return {value: sources[source] for value, source in plan.values.items()}


def round_weights(
    tensors: Mapping[str, Tensor], graph: LayerGraph, layers: Iterable[str], numerics: Numerics
) -> dict[str, Tensor]:
    """The tensors, with the weights of int8 layers replaced by what their codes stand for."""
    result = dict(tensors)
    for name in layers:
        parameter = graph.layer_by_name[name].weight
        codes = quantize_weight(result[parameter].detach().numpy(), numerics)
        result[parameter] = torch.from_numpy(dequantize_weight(*codes))
    return result


def fake_quantize_activations(module: fx.GraphModule, params: Mapping[str, QuantParams], numerics: Numerics) -> None:
    """Put a fake-quantize node behind each quantized value; all its readers read the quantized one. In place."""
    smallest, largest = numerics.activation_range
    for node in list(module.graph.nodes):
        chosen = params.get(value_of(node)) if node.op in ("placeholder", "call_function") else None
        if chosen is None:
            continue
        with module.graph.inserting_after(node):
            quantized = module.graph.create_node(
                "call_function",
                torch.ops.aten.fake_quantize_per_tensor_affine.default,
                (node, chosen.scale, chosen.zero_point, smallest, largest),
                name=f"{node.name}_quantized",
            )
        node.replace_all_uses_with(quantized, delete_user_cb=lambda user, own=quantized: user is not own)
    module.recompile()
