"""Where int8 begins and ends in a graph, and the scales it uses: decided once, here, for torch and for every engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from autocomp.capabilities import Numerics
from autocomp.errors import InputError
from autocomp.graph import LayerGraph, Node
from autocomp.policy import FP8, Policy

__all__ = [
    "FP8_MAX",
    "SPREAD",
    "QuantParams",
    "QuantPlan",
    "QuantWeight",
    "activation_params",
    "code_max",
    "codes_at",
    "fp8_key",
    "fp8_params",
    "place",
    "quantize_fp8",
    "quantize_weight",
    "quantize_weights",
    "round_biases",
]

# Activations that an engine folds into the producing layer: the value is quantized behind them.
FUSED_ACTIVATIONS = frozenset({"relu", "hardtanh", "relu6", "clamp"})
# Operators that only move values, or pick some: their output keeps the input's scale.
PASSING = frozenset(
    {"slice", "pad", "view", "reshape", "flatten", "permute", "transpose"}
    | {"max_pool2d", "dropout", "squeeze", "unsqueeze"}
)
SPREAD = 1 / 1024
"""Smallest scale of a layer's channels, as a fraction of the largest."""
FP8_MAX = 448.0
"""Largest number of E4M3 (Micikevicius et al., arXiv:2209.05433, table 1)."""
# Scales below are rounded coarsely or to 0, and engines take them for 0.
_SMALLEST = float(np.finfo(np.float32).tiny)
# Operators that run in int8 when all they read is quantized.
JOINS = frozenset({"add", "cat", "mul"})
# Operators of one value that engines look up in a table of its codes.
LOOKUPS = frozenset({"sigmoid"})


@dataclass(frozen=True, slots=True)
class QuantParams:
    """Affine quantization of one tensor: ``real = scale * (code - zero_point)``."""

    scale: float
    zero_point: int

    def to_json(self) -> dict[str, float | int]:
        return {"scale": self.scale, "zero_point": self.zero_point}


@dataclass(frozen=True, slots=True, eq=False)
class QuantWeight:
    """Symmetric codes of a layer's weight: ``real = scale * code``.

    Attributes:
        codes: int8 or float8_e4m3fn, of the weight's shape.
        scale: float32, (out,), one per output channel; (1,) for float8.
        bits: that a code takes when it is stored; engines compute with int8 whatever they are.
    """

    codes: NDArray[Any]
    scale: NDArray[np.float32]
    bits: int = 8

    @property
    def is_integer(self) -> bool:
        return bool(self.codes.dtype == np.int8)

    @property
    def real(self) -> NDArray[np.float32]:
        """The weights that the codes stand for."""
        return (self.codes.astype(np.float32) * _by_channel(self.scale, self.codes.ndim)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class QuantPlan:
    """Which values and weights of a graph are quantized under a policy.

    Attributes:
        values: quantized value -> the value whose range it uses (itself, or the source it was moved from).
        layers: names of the layers that run in int8.
        fp8: name of a layer that runs in fp8 -> the value that it reads, which is quantized for such layers alone.
    """

    values: Mapping[str, str]
    layers: tuple[str, ...]
    fp8: Mapping[str, str] = field(default_factory=dict)

    @property
    def observed(self) -> tuple[str, ...]:
        """Values whose ranges must be known."""
        return tuple(dict.fromkeys((*self.values.values(), *self.fp8.values())))


def place(graph: LayerGraph, policy: Policy) -> QuantPlan:
    """Place Q/DQ pairs so that every int8 layer of the policy runs as int8.

    A layer's input is quantized, and its output behind a fused activation. Every reader of a quantized value reads
    the quantized one. An addition, concatenation or product whose inputs are all quantized is computed in int8 as
    well, so its output is quantized too, and so is that of a sigmoid; this is repeated along the graph. One factor for
    each channel of a quantized map is quantized with it. What an fp8 layer reads is rounded in front of it, whatever it
    is to others, and what it writes is float. Float stays what a linear layer over several axes writes,
    for norms, attention and additions to a float stream read it, and the logits behind a linear layer.

    Raises:
        InputError: a layer's activations would have fewer than 8 bits, which no engine computes with.
    """
    for name, precision in policy.precisions.items():
        if precision.is_integer and precision.activation_bits != 8:
            raise InputError(f"{name} cannot run as {precision}: choose int8, or w2a8 to w7a8 for fewer weight bits")
    graph, policy = graph.paired(policy)
    removed = graph.removed_layers(policy)
    ops = {node.name: node for node in graph.live(policy)}
    readers: dict[str, list[Node]] = {name: [] for name in ops}
    for node in ops.values():
        for value in node.inputs:
            readers[value].append(node)

    def behind_activation(node: Node) -> str:
        following = readers[node.name]
        if len(following) == 1 and following[0].op in FUSED_ACTIVATIONS and node.name != graph.output:
            return following[0].name
        return node.name

    layers = tuple(
        layer.name for layer in graph.layers if layer.name not in removed and policy.precision(layer.name).is_integer
    )
    quantized: set[str] = set()
    for name in layers:
        layer = graph.layer_by_name[name]
        node = ops[layer.node]
        quantized.add(node.inputs[0])
        written = behind_activation(node)
        if layer.op == "conv" or (len(node.shape) == 1 and written != graph.output):
            quantized.add(written)

    def source(value: str) -> str | None:
        """The quantized value that ``value`` was moved from, or None."""
        node = ops[value]
        if node.op in PASSING and node.inputs:
            origin = source(node.inputs[0])
            if origin is not None:
                return origin
        return value if value in quantized else None

    for node in ops.values():
        known = [source(value) is not None for value in node.inputs]
        if node.op in LOOKUPS and all(known) and node.name != graph.output:
            quantized.add(node.name)
        if node.op == "mul" and len(known) == 2 and known[0] != known[1]:
            factor = node.inputs[known.index(False)]
            known = [_is_factor(ops[factor], node)] * 2
        if node.op in JOINS and len(known) > 1 and all(known):
            quantized.update(node.inputs)
            if node.name != graph.output:
                quantized.add(behind_activation(node))
    values = {name: source(name) or name for name in ops if name in quantized}
    eights = (
        layer
        for layer in graph.layers
        if layer.name not in removed and policy.precision(layer.name).weight == FP8.weight
    )
    return QuantPlan(values, layers, {layer.name: ops[layer.node].inputs[0] for layer in eights})


def _is_factor(node: Node, product: Node) -> bool:
    """Whether a factor has one value for a whole map of many."""
    return len(node.shape) == len(product.shape) > 1 and prod(node.shape[1:]) == 1 < prod(product.shape[1:])


def activation_params(low: float, high: float, numerics: Numerics) -> QuantParams:
    """Scale and zero point of a tensor with values in [low, high]; zero is always representable."""
    smallest, largest = numerics.activation_range
    low, high = min(low, 0.0), max(high, 0.0)
    if numerics.symmetric_activations:
        bound = max(-low, high)
        middle = 0 if numerics.signed_activations else 128
        return QuantParams(_float32(bound / (largest - middle)), middle)
    scale = _float32((high - low) / (largest - smallest))
    zero_point = round(smallest - low / scale)
    return QuantParams(scale, int(np.clip(zero_point, smallest, largest)))


def fp8_key(value: str) -> str:
    """The name of a value's fp8 parameters beside its int8 ones."""
    return f"{value}.fp8"


def fp8_params(low: float, high: float) -> QuantParams:
    """Scale of a tensor with values in [low, high] that makes the largest magnitude `FP8_MAX`."""
    return QuantParams(_float32(max(-low, high, 0.0) / FP8_MAX), 0)


def quantize_fp8(weight: NDArray[np.float32]) -> QuantWeight:
    """A weight in E4M3, rounded to nearest, ties to even, under one scale that makes its largest number `FP8_MAX`."""
    scale = np.float32(fp8_params(float(weight.min(initial=0.0)), float(weight.max(initial=0.0))).scale)
    codes = np.clip(weight / scale, -FP8_MAX, FP8_MAX).astype(ml_dtypes.float8_e4m3fn)
    return QuantWeight(codes, np.array([scale], np.float32))


def _float32(scale: float) -> float:
    """The scale as an engine stores it; a constant tensor, or one of subnormal numbers, gets 1."""
    return float(np.float32(scale)) if np.isfinite(scale) and scale >= _SMALLEST else 1.0


def code_max(numerics: Numerics, bits: int) -> int:
    """Largest weight code of ``bits`` bits. Raises: InputError if the bits are not 2 to 8."""
    if not 2 <= bits <= 8:
        raise InputError(f"weights of {bits} bits cannot be stored: choose 2 to 8")
    return int(min(2 ** (bits - 1) - 1, numerics.weight_max))


def quantize_weight(weight: NDArray[np.float32], numerics: Numerics, bits: int = 8) -> QuantWeight:
    """Symmetric codes by rounding to nearest, one scale per output channel (axis 0).

    With 8 bits a channel's largest weight gets the largest code. With fewer the scale is the one of least squared
    error (see `_least_error`), which cuts the largest weights off.

    The scale of a nearly dead channel is kept within `SPREAD` of the largest one: engines store the bias in 32 bits in
    units of it, which overflowed otherwise.

    Args:
        weight: (out, ...), finite.
        bits: 2 to 8.

    Raises:
        InputError: the bits are out of range.
    """
    largest = code_max(numerics, bits)
    flat = weight.reshape(weight.shape[0], -1)
    bound = np.abs(flat).max(axis=1, initial=0.0)
    bound = np.maximum(bound, bound.max(initial=0.0) * SPREAD)
    scale = np.where(bound >= largest * _SMALLEST, bound / largest, 1.0).astype(np.float32)
    if bits < 8:
        scale = _least_error(flat, scale, largest)
    return codes_at(weight, scale, numerics, bits)


def codes_at(weight: NDArray[np.float32], scale: NDArray[np.float32], numerics: Numerics, bits: int = 8) -> QuantWeight:
    """Symmetric codes by rounding to nearest at given scales (out,)."""
    largest = code_max(numerics, bits)
    codes = np.clip(np.rint(weight / _by_channel(scale, weight.ndim)), -largest, largest)
    return QuantWeight(codes.astype(np.int8), scale, bits)


_FRACTIONS = np.arange(39, 7, -1, dtype=np.float32) / 40


def _least_error(flat: NDArray[np.float32], scale: NDArray[np.float32], largest: int) -> NDArray[np.float32]:
    """For each row the scale that leaves the least squared rounding error.

    Fractions of the largest scale are tried, then the winner's codes are fitted once by least squares.

    Args:
        flat: (out, weights).
        scale: (out,), with which nothing is cut off.
        largest: code.
    """

    def codes_of(tried: NDArray[np.float32]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = np.rint(flat / tried[:, None])
        return np.clip(found, -largest, largest, out=found)

    def error_of(tried: NDArray[np.float32]) -> NDArray[np.float32]:
        left = codes_of(tried) * tried[:, None] - flat
        error: NDArray[np.float32] = np.einsum("ij,ij->i", left, left)
        return error

    best, least = scale, error_of(scale)

    def take(tried: NDArray[np.float32]) -> None:
        nonlocal best, least
        error = error_of(tried)
        best, least = np.where(error < least, tried, best), np.minimum(error, least)

    for fraction in _FRACTIONS:
        take(scale * fraction)
    codes = codes_of(best)
    size = np.einsum("ij,ij->i", codes, codes)
    fitted = np.einsum("ij,ij->i", codes, flat) / np.maximum(size, 1.0)
    take(np.where((size > 0) & (fitted > scale / 64), fitted, best).astype(np.float32))
    return best


def quantize_weights(
    graph: LayerGraph, policy: Policy, tensors: Mapping[str, NDArray[np.float32]], numerics: Numerics
) -> dict[str, QuantWeight]:
    """Parameter name -> codes by rounding to nearest, for every integer and fp8 layer of the policy that is left."""
    graph, policy = graph.paired(policy)
    plan = place(graph, policy)
    names = {graph.layer_by_name[name].weight: policy.precision(name) for name in plan.layers}
    eights = (graph.layer_by_name[name].weight for name in plan.fp8)
    return {
        **{name: quantize_weight(tensors[name], numerics, kind.weight_bits) for name, kind in names.items()},
        **{name: quantize_fp8(tensors[name]) for name in eights},
    }


def round_biases(
    graph: LayerGraph,
    policy: Policy,
    tensors: Mapping[str, NDArray[np.float32]],
    weights: Mapping[str, QuantWeight],
    params: Mapping[str, QuantParams],
) -> dict[str, NDArray[np.float32]]:
    """Biases of the policy's int8 layers, on the grid on which engines add them.

    An engine that computes in integers rounds the bias to a multiple of input scale x weight scale. The step is a
    small part of the output's, but where a model does not do the same, results near a tie fall to the other side, and
    those errors add up over the layers. The rounded bias is still a float tensor.

    Args:
        tensors: float32 biases by parameter name.
        weights: codes of every integer layer, by parameter name.
        params: for each value of ``place(graph, policy)``.

    Returns:
        parameter name -> rounded bias; to replace those of ``tensors`` in the torch model and in the engine's file.
    """
    graph, policy = graph.paired(policy)
    bypass = {graph.branch_by_name[name].add: graph.branch_by_name[name].stream for name in policy.dropped}
    rounded: dict[str, NDArray[np.float32]] = {}
    for name in place(graph, policy).layers:
        layer = graph.layer_by_name[name]
        if layer.bias not in tensors:
            continue
        read = graph.node_by_name[layer.node].inputs[0]
        while read in bypass:
            read = bypass[read]
        step = np.float32(params[read].scale) * weights[layer.weight].scale
        rounded[layer.bias] = (np.rint(tensors[layer.bias] / step) * step).astype(np.float32)
    return rounded


def _by_channel(scale: NDArray[np.float32], axes: int) -> NDArray[np.float32]:
    """Scales (out,) in a shape that broadcasts along a weight's first axis."""
    return scale.reshape(-1, *[1] * (axes - 1))
