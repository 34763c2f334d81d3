"""Weights below 8 bits: which way each one is rounded, and the shift that rounding leaves in a layer's output."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import cos, pi, prod
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, fx

from autocomp.capabilities import Numerics
from autocomp.compress.moments import draw_positions, patches_at
from autocomp.compress.naming import op_of
from autocomp.compress.surgery import batches
from autocomp.graph import Layer, LayerGraph
from autocomp.policy import Recipe
from autocomp.quantization import FUSED_ACTIVATIONS, QuantWeight, code_max

__all__ = ["adaround", "corrected_biases"]

BATCH = 64
VALUE_BYTES = 512 * 10**6  # of one value over all images; with larger maps fewer images are used
ROWS = 8192  # sampled outputs behind one layer's rounding
STEPS, ROWS_PER_STEP, RATE = 300, 512, 0.05
WARM_UP = 0.2  # share of the steps without regularisation
BETA = (20.0, 2.0)  # of the regulariser, from the end of the warm-up to the last step
WEIGHT = 20.0  # of the regulariser, in units of the error of rounding to nearest
STRETCH = (-0.1, 1.1)

Read = Callable[[fx.Node], Any]


def corrected_biases(
    module: fx.GraphModule, rounded: fx.GraphModule, graph: LayerGraph, layers: tuple[str, ...], images: Tensor
) -> dict[str, Tensor]:
    """Biases that take back the mean shift that quantization leaves in each output channel of integer layers.

    The empirical form of Nagel et al. (arXiv:1906.04721), section 4.2 and appendix D: the mean output of each layer
    is compared with that of the float model on the same images, in the order of the graph, each layer reading what
    the layers corrected before it give. Outputs are compared where they really are computed, so padding counts.

    Args:
        module: float.
        rounded: the same with its weights and activations quantized.
        layers: names of the integer layers.
        images: (n, *input_shape), run through ``rounded`` in one batch.

    Returns:
        parameter name -> bias, of each layer.
    """
    nodes = {graph.layer_by_name[name].node: graph.layer_by_name[name] for name in layers}
    means: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}

    def gather(node: fx.Node, value: Any, _read: Read) -> Any:
        if node.name in nodes:
            share = _channel_means(value, nodes[node.name]) * (len(value) / len(images))
            means[node.name] = means[node.name] + share if node.name in means else share
        return value

    def correct(node: fx.Node, value: Any, _read: Read) -> Any:
        layer = nodes.get(node.name)
        if layer is None:
            return value
        shift = (means[node.name] - _channel_means(value, layer)).float()
        biases[layer.bias] = rounded.get_parameter(layer.bias).detach() + shift
        return value + shift.reshape(-1, *[1] * (value.ndim - 2 if layer.op == "conv" else 0))

    with torch.no_grad():
        for part in batches(images, BATCH):
            _Editor(module, gather).run(part)
        _Editor(rounded, correct).run(images)
    return biases


def adaround(
    module: fx.GraphModule,
    rounded: fx.GraphModule,
    graph: LayerGraph,
    weights: Mapping[str, QuantWeight],
    numerics: Numerics,
    recipe: Recipe,
    images: Tensor,
) -> dict[str, QuantWeight]:
    """Choose for each weight below 8 bits whether it is rounded up or down, so that its layer's output changes least.

    Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization (arXiv:2004.10568), sections 3.2 to
    3.4: layer by layer in the order of the graph, the inputs those of the quantized layers before (asymmetric
    reconstruction), the target the float layer's output behind its activation, the relaxed choice a rectified sigmoid
    that an annealed regulariser drives to 0 or 1. Only the choices are learned, the scales stay.

    Args:
        module: float.
        rounded: the same with its activations quantized and its weights rounded to nearest.
        weights: parameter name -> codes by rounding to nearest.
        images: (n, *input_shape) of calibration.

    Returns:
        parameter name -> codes; a layer keeps those to nearest where no better ones were found.
    """
    largest = 4 * max(prod(node.shape) for node in graph.nodes)
    images = images[: max(1, VALUE_BYTES // largest)]
    nodes = {layer.node: layer for layer in graph.layers if layer.weight in weights and weights[layer.weight].bits < 8}
    result = dict(weights)
    targets = _targets(module, nodes, images, recipe.seed)

    def choose(node: fx.Node, value: Any, read: Read) -> Any:
        layer = nodes.get(node.name)
        if layer is None:
            return value
        nearest = weights[layer.weight]
        rows = _sampled(read(node.args[0]), layer, len(images), _seeded(recipe.seed))  # type: ignore[arg-type]
        view = _View.of(layer, module, node)
        limit = code_max(numerics, nearest.bits)
        result[layer.weight] = _up_or_down(view, rows, targets.pop(layer.node), nearest, limit, _seeded(recipe.seed))
        arguments = [read(entry) if isinstance(entry, fx.Node) else entry for entry in node.args]
        arguments[1] = torch.from_numpy(result[layer.weight].real)
        return node.target(*arguments)  # type: ignore[operator]

    with torch.no_grad():
        _Editor(rounded, choose).run(images)
    return result


@dataclass(frozen=True)
class _View:
    """A layer as a product of rows with its weight.

    Attributes:
        weight: float, (groups, out / groups, features).
        bias: float, (out,).
        activation: that follows, fused.
    """

    weight: Tensor
    bias: Tensor
    activation: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, layer: Layer, module: fx.GraphModule, node: fx.Node) -> Self:
        weight = module.get_parameter(layer.weight).detach()
        groups = layer.groups_of(len(weight))
        grouped = weight.reshape(groups, len(weight) // groups, -1)
        return cls(grouped, module.get_parameter(layer.bias).detach(), _activation_behind(node))

    def __call__(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Outputs (n, out) behind the activation, of rows (n, groups * features)."""
        groups, _, features = weight.shape
        if groups == 1:
            return self.activation(torch.addmm(self.bias, rows, weight[0].T))
        product = torch.bmm(rows.reshape(-1, groups, features).transpose(0, 1), weight.transpose(1, 2))
        return self.activation(product.transpose(0, 1).flatten(1) + self.bias)


def _targets(module: fx.GraphModule, nodes: Mapping[str, Layer], images: Tensor, seed: int) -> dict[str, Tensor]:
    """Node -> float outputs (rows, out) of its layer behind its activation, at the positions drawn for it."""
    found: dict[str, list[Tensor]] = {name: [] for name in nodes}
    generators = {name: _seeded(seed) for name in nodes}

    def gather(node: fx.Node, value: Any, read: Read) -> Any:
        if node.name in nodes:
            layer = nodes[node.name]
            rows = _sampled(read(node.args[0]), layer, len(images), generators[node.name])  # type: ignore[arg-type]
            view = _View.of(layer, module, node)
            found[node.name].append(view(rows, view.weight))
        return value

    with torch.no_grad():
        for part in batches(images, BATCH):
            _Editor(module, gather).run(part)
    return {name: torch.cat(parts) for name, parts in found.items()}


def _up_or_down(
    view: _View, rows: Tensor, target: Tensor, nearest: QuantWeight, largest: int, generator: torch.Generator
) -> QuantWeight:
    """Codes next to each weight that leave the least error of the outputs, found by gradient descent.

    Args:
        rows: (n, groups * features) that the layer reads.
        target: (n, out) behind the activation.
        largest: code.
    """
    scale = torch.from_numpy(nearest.scale).reshape(*view.weight.shape[:2], 1)
    ratio = view.weight / scale
    floor = ratio.floor()

    def error(codes: Tensor, chosen: Tensor | slice = slice(None)) -> Tensor:
        return (view(rows[chosen], codes.clamp(-largest, largest) * scale) - target[chosen]).square().mean()

    low, high = STRETCH
    base = error(ratio.round())
    if not base > 0:
        return nearest
    with torch.enable_grad():
        choice = torch.logit((ratio - floor - low) / (high - low)).requires_grad_(True)
        optimizer = torch.optim.Adam([choice], lr=RATE)
        for step in range(STEPS):
            up = (torch.sigmoid(choice) * (high - low) + low).clamp(0.0, 1.0)
            chosen = torch.randint(len(rows), (ROWS_PER_STEP,), generator=generator)
            loss = error(floor + up, chosen) / base
            progress = (step / STEPS - WARM_UP) / (1 - WARM_UP)
            if progress >= 0:
                beta = BETA[1] + (BETA[0] - BETA[1]) * (1 + cos(progress * pi)) / 2
                loss = loss + WEIGHT * (1 - (2 * up - 1).abs().pow(beta)).mean()
            (choice.grad,) = torch.autograd.grad(loss, choice)
            optimizer.step()
    codes = floor + (choice.detach() >= 0)
    if not error(codes) < base:
        return nearest
    array = codes.clamp(-largest, largest).reshape(nearest.codes.shape).numpy().astype(np.int8)
    return QuantWeight(array, nearest.scale, nearest.bits)


def _sampled(value: Tensor, layer: Layer, images: int, generator: torch.Generator) -> Tensor:
    """About ``ROWS`` unfolded inputs over all images; drawn alike however the images are divided into batches."""
    per_image = -(-ROWS // images)
    if layer.op == "linear":
        value = value.reshape(-1, layer.positions, value.shape[-1])
    return torch.cat(
        [patches_at(part, layer, draw_positions(part, layer, per_image, generator)) for part in batches(value, BATCH)]
    )


def _activation_behind(node: fx.Node) -> Callable[[Tensor], Tensor]:
    """The activation that engines fuse with the layer at a node, or none."""
    following = list(node.users)
    if len(following) == 1 and op_of(following[0]) in FUSED_ACTIVATIONS:
        target, arguments = following[0].target, following[0].args[1:]
        return lambda value: target(value, *arguments)  # type: ignore[operator]
    return lambda value: value


def _channel_means(value: Tensor, layer: Layer) -> Tensor:
    """Mean of each output channel (out,), float64, of (n, out, ...) or, of a linear layer, (n, ..., out)."""
    flat = value.flatten(2).sum(2) if layer.op == "conv" else value.reshape(-1, value.shape[-1])
    return flat.sum(0, dtype=torch.float64) / (value.numel() // flat.shape[1])


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class _Editor(fx.Interpreter):
    """Runs a graph and lets a function replace what operators give."""

    def __init__(self, module: fx.GraphModule, edit: Callable[[fx.Node, Any, Read], Any]) -> None:
        super().__init__(module)
        self._edit = edit

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        return self._edit(n, value, self.env.__getitem__) if n.op == "call_function" else value
