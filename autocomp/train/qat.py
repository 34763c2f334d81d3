"""Training with the engine's codes in the loop: their scales are learned beside the weights."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from autocomp.capabilities import Numerics
from autocomp.fake_quant import fake_quantize, fake_quantize_fp8
from autocomp.quantization import (
    FP8_MAX,
    SPREAD,
    QuantParams,
    QuantPlan,
    QuantWeight,
    code_max,
    codes_at,
    fp8_params,
    quantize_fp8,
)

__all__ = ["Calibrated", "learnable", "learned", "positive", "step_of"]

Arrays = Mapping[str, NDArray[np.float32]]
WITHIN = 0.49
"""How far a weight may lie from its code, in steps: a little less than what rounds to another one."""


class Calibrated(Protocol):
    """A quantized model that training starts from, as `autocomp.compress` makes it.

    Attributes:
        module: with `fake_quantize` behind each quantized value.
        tensors: float weights and biases.
        weights: parameter -> codes of every integer layer.
        params: quantized value -> its parameters.
        plan, numerics: which values are quantized, and how.
    """

    @property
    def module(self) -> fx.GraphModule: ...
    @property
    def tensors(self) -> Arrays: ...
    @property
    def weights(self) -> Mapping[str, QuantWeight]: ...
    @property
    def params(self) -> Mapping[str, QuantParams]: ...
    @property
    def plan(self) -> QuantPlan: ...
    @property
    def numerics(self) -> Numerics: ...


def learnable(start: Calibrated) -> fx.GraphModule:
    """A module that computes what ``start`` does, with float weights and every scale a parameter.

    Values that are only moved keep their source's scale and are not rounded again. Zero points stay: a range grows and
    shrinks around zero, so that engines fuse what they fused, and latency is the calibrated model's.
    """
    fresh = fx.Graph()
    root: dict[str, Any] = dict(start.module.named_parameters()) | dict(start.module.named_buffers())
    root |= {name: _parameter(array) for name, array in start.tensors.items()}

    def rounding(value: fx.Node, owner: str, scale: Any, low: int, high: int) -> fx.Node:
        root.setdefault(step_of(owner), _parameter(scale))
        return fresh.call_function(rounded, (value, fresh.get_attr(step_of(owner)), low, high))

    env: dict[fx.Node, fx.Node] = {}
    for node in start.module.graph.nodes:
        if node.target is fake_quantize:
            read, _, zero_point, smallest, largest = node.args
            value = "input" if read.op == "placeholder" else read.name
            origin = start.plan.values[value]
            if origin == value:
                low, high = smallest - zero_point, largest - zero_point
                env[node] = rounding(env[read], origin, start.params[origin].scale, low, high)
            else:
                env[node] = env[read]
            continue
        env[node] = fresh.node_copy(node, env.__getitem__)
        if node.op == "get_attr" and node.target in start.weights:
            weight = start.weights[node.target]
            if not weight.is_integer:
                env[node] = fresh.call_function(rounded_fp8, (env[node],))
                continue
            root[node.target] = _parameter(_near(start.tensors[node.target], weight))
            high = code_max(start.numerics, weight.bits)
            env[node] = rounding(env[node], node.target, weight.scale, -high, high)
    return fx.GraphModule(root, fresh).eval()


def learned(
    start: Calibrated, tensors: Arrays
) -> tuple[dict[str, NDArray[np.float32]], dict[str, QuantWeight], dict[str, QuantParams]]:
    """What a trained `learnable` module stands for: float tensors, codes and parameters, by the names of ``start``."""

    def scale(owner: str) -> NDArray[np.float32]:
        return np.asarray(positive(torch.from_numpy(np.asarray(tensors[step_of(owner)]))).numpy())

    weights = {
        name: codes_at(tensors[name], scale(name), start.numerics, weight.bits)
        if weight.is_integer
        else quantize_fp8(tensors[name])
        for name, weight in start.weights.items()
    }
    params = {
        **start.params,
        **{value: replace(start.params[value], scale=float(scale(own))) for value, own in start.plan.values.items()},
    }
    return {name: tensors[name] for name in start.tensors.keys() & tensors.keys()}, weights, params


def rounded(value: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """The nearest multiple of the step, between two codes.

    Learned step size quantization (Esser et al., arXiv:1902.08153, sections 2.1 and 2.2): gradients pass straight
    through where a value is not cut off; the step gets that of the rounded value, the rounding itself held, divided by
    the root of (numbers per image or channel times the largest code).

    Args:
        value: (n, ...).
        step: one for all, or (n,).
        low, high: codes.
    """
    found: Tensor = _Rounded.apply(value.to(step.dtype), positive(step), low, high)  # not in half precision
    return found


def rounded_fp8(weight: Tensor) -> Tensor:
    """The weight as `quantize_fp8` leaves it; gradients pass through."""
    largest = float(weight.detach().abs().max())
    return fake_quantize_fp8(weight, fp8_params(-largest, largest).scale, FP8_MAX)


class _Rounded(torch.autograd.Function):
    """Few passes over a tensor: on a CPU each is as dear as a small convolution."""

    @staticmethod
    def forward(context: Any, value: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        ratio = value / _along(step, value)
        result = ratio.round().clamp_(low, high).mul_(_along(step, value))
        context.save_for_backward(ratio, result, step)
        context.bounds = low, high
        return result

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        ratio, result, step = context.saved_tensors
        low, high = context.bounds
        passed = torch.ops.aten.hardtanh_backward(gradient, ratio, low, high)
        # d result / d step is code - ratio where not cut off, else the code
        slope = _dot(gradient, result, step) / step - _dot(passed, ratio, step)
        return passed, slope * (ratio[0].numel() * max(-low, high)) ** -0.5, None, None


def _dot(left: Tensor, right: Tensor, step: Tensor) -> Tensor:
    """Sum of products over all numbers that share a step."""
    rows = (step.numel(), -1)
    products: Tensor = torch.linalg.vecdot(left.reshape(rows), right.reshape(rows))
    return products.reshape(step.shape)


def _along(step: Tensor, value: Tensor) -> Tensor:
    return step.reshape(-1, *[1] * (value.ndim - 1)) if step.ndim else step


def positive(step: Tensor) -> Tensor:
    """A step's magnitude; among several none is far below the largest (see `quantize_weight`)."""
    size = step.abs()
    return size.clamp_min(size.detach().max() * SPREAD)


def _near(weight: NDArray[np.float32], codes: QuantWeight) -> NDArray[np.float32]:
    """The float weights, moved where learned rounding chose another code than the nearest."""
    scale = codes.scale.reshape(-1, *[1] * (weight.ndim - 1))
    return np.clip(weight, (codes.codes - WITHIN) * scale, (codes.codes + WITHIN) * scale).astype(np.float32)


def _parameter(array: Any) -> nn.Parameter:
    return nn.Parameter(torch.tensor(array, dtype=torch.float32), requires_grad=False)


def step_of(owner: str) -> str:
    """The parameter that holds the step of a weight or value."""
    return f"{owner}_step"
