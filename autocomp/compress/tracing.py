"""From a user's model to a `LayerGraph` and the module that runs it."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from autocomp.compress.affine import Norm
from autocomp.compress.arrays import as_rows
from autocomp.compress.branches import find_branches
from autocomp.compress.coupling import admit, couple
from autocomp.compress.exporting import state_of
from autocomp.compress.lowering import Lowered, lower
from autocomp.compress.naming import op_of, reason_of, value_of
from autocomp.compress.shapes import Shapes
from autocomp.compress.surgery import kept_positions, masked, rebuild, slice_tensors, tensors_of
from autocomp.compress.wire import Packed, pack, unpack
from autocomp.errors import ModelError
from autocomp.graph import Branch, Group, Layer, LayerGraph, Node
from autocomp.models import called, first_not_finite, logits_in
from autocomp.rows import part

__all__ = ["Traced", "trace"]

PARITY = 1e-4  # largest relative difference between a pruned model and the unpruned one with zeros in its place


@dataclass(frozen=True)
class Traced:
    """A model as data, and the module that computes with it.

    Attributes:
        graph: operators, layers, prunable groups, removable branches.
        module: batch norms folded, eval mode, frozen, dynamic batch, CPU, float32.
        norms: layer -> the batch norm that was folded into it.
        notes: lines the user should read: what was left whole or left out, and why.
    """

    graph: LayerGraph
    module: fx.GraphModule
    norms: Mapping[str, Norm]
    notes: tuple[str, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (self.graph, pack(self.module), self.norms, self.notes)


def _received(graph: LayerGraph, module: Packed, norms: Mapping[str, Norm], notes: tuple[str, ...]) -> Traced:
    return Traced(graph, unpack(module), norms, notes)


def trace(model: nn.Module, example: Tensor | Mapping[str, Tensor]) -> Traced:
    """Trace a trained model. The model is copied; weights, buffers and modes of the caller's stay as they are.

    Args:
        model: maps float images to one tensor of logits.
        example: images (n, *shape) of any n of at least 1, as the model will see them. Several inputs are given by the
            names of forward()'s arguments; the traced module then reads them as rows (`autocomp.rows`), in their order.

    Raises:
        ModelError: the model cannot be copied, run or exported, returns something else than one float tensor
            (n, classes), or has no convolution or linear layer.
    """
    own, example, logits = _prepared(model, example)
    lowered = lower(own, example, logits)
    nodes = _nodes(lowered)
    layers, shared = _layers(lowered)
    if not layers:
        raise ModelError(
            "the model has no convolution or linear layer with weights of its own: there is nothing to compress"
        )
    coupling = couple(lowered.module, as_rows(example), layers, lowered.layers, shared)
    lowered = replace(lowered, module=coupling.module)
    tensors = tensors_of(lowered.module)
    parameters = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    graph = LayerGraph(nodes, "logits", layers, coupling.groups, find_branches(nodes, layers), parameters)
    trial = _Trial(lowered.module, graph, tensors, as_rows(example))
    groups = admit([group for group in graph.groups if not trial.ends(group)], trial.prunes)
    branches = admit(graph.branches, trial.drops)
    whole = {**lowered.opaque, **coupling.left_whole, **{name: _sharing(own, name) for name in sorted(shared)}}
    admitted = {group.name for group in groups}
    for group in graph.groups:
        if group.name not in admitted and not trial.ends(group):
            whole[group.name] = "a trial prune changed the model's output in another way than zeros would"
    last = {layer.name for layer in layers if layer.node == graph.output}
    whole = {name: reason for name, reason in whole.items() if name not in last or "grouped" in reason}
    graph = replace(graph, groups=groups, branches=branches, left_whole=whole)
    notes = [f"{name} is left whole: {reason}" for name, reason in whole.items()]
    notes += [f"{name} is left out: forward() does not use it" for name in lowered.unused]
    return Traced(graph, lowered.module, lowered.norms, tuple(notes))


Images = Tensor | Mapping[str, Tensor]


def _example(images: Images) -> Images:
    """From two to eight images."""
    if isinstance(images, Mapping) and images and len({len(value) for value in images.values()}) == 1:
        return {name: _example(value) for name, value in images.items()}  # type: ignore[misc]
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim < 2 or len(images) == 0:
        raise ModelError("the example must be a float tensor of images (n, ...) with n at least 1, or several by name")
    images = images.detach().to("cpu", torch.float32)
    return torch.cat([images, images])[: max(2, min(len(images), 8))]


def _prepared(model: nn.Module, example: Images) -> tuple[nn.Module, Images, Tensor]:
    """The caller's model copied to the CPU in eval mode, an example of at least two images, and its logits."""
    example = _example(example)
    count = len(as_rows(example))
    shapes = tuple(example.shape) if isinstance(example, Tensor) else {n: tuple(x.shape) for n, x in example.items()}
    try:
        own = copy.deepcopy(model).to("cpu", torch.float32).eval().requires_grad_(False)
        before = {name: value.clone() for name, value in state_of(own).items()}
        with torch.no_grad():
            outputs = called(own, example)
    except Exception as error:  # the user's code runs here: anything can come out of it
        raise ModelError(
            f"the model does not run on images of shape {shapes} ({reason_of(error)}): check the model against the data"
        ) from error
    logits = logits_in(outputs, count, "the model")
    if not bool(torch.isfinite(logits).all()):
        place = first_not_finite(own, example)
        raise ModelError(f"the model returns NaN or infinity on the example{place}: check weights and data's scaling")
    after = state_of(own)
    changed = [name for name, value in before.items() if name in after and not torch.equal(value, after[name])]
    if changed:
        raise ModelError(
            f"forward() changes {', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''} in place: weights and "
            "buffers must stay as they are outside of training, so write to them under 'if self.training:' alone"
        )
    return own, example, logits


def _sharing(model: nn.Module, layer: str) -> str:
    """Why a layer whose weight several operators read is left whole."""
    named = dict(model.named_parameters(remove_duplicate=False))
    weight = named.get(f"{layer}.weight")
    others = [name.rpartition(".")[0] for name, value in named.items() if value is weight and name != f"{layer}.weight"]
    return f"its weight is shared with {', '.join(others)}" if others else "forward() uses it several times"


def _nodes(lowered: Lowered) -> tuple[Node, ...]:
    nodes = []
    for node in lowered.module.graph.nodes:
        name = value_of(node)
        if name in lowered.shapes:
            inputs = tuple(value_of(entry) for entry in node.all_input_nodes if value_of(entry) in lowered.shapes)
            if op_of(node) in ("add", "mul", "cat") and not node.kwargs:
                inputs = _in_order(node, lowered.shapes)
            if node.target is part:
                nodes.append(Node(name, "input", (), lowered.shapes[name]))
            elif node.op != "placeholder":
                nodes.append(Node(name, op_of(node), inputs, lowered.shapes[name]))
            elif part not in {user.target for user in node.users}:
                nodes.append(Node(name, "input", inputs, lowered.shapes[name]))
    return tuple(nodes)


def _in_order(node: fx.Node, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Inputs with repetitions, as they stand in the call."""
    found: list[str] = []
    fx.map_arg(node.args, lambda entry: found.append(value_of(entry)))
    return tuple(name for name in found if name in shapes)


def _layers(lowered: Lowered) -> tuple[tuple[Layer, ...], frozenset[str]]:
    """Layers in topological order, and the names of those whose weight several operators read."""
    layers: dict[str, Layer] = {}
    shared = set()
    for node in lowered.module.graph.nodes:
        name = lowered.layers.get(node.name)
        if name is None:
            continue
        weight = node.args[1]
        weight_shape = tuple(lowered.module.get_parameter(weight.target).shape)
        shape = lowered.shapes[value_of(node)]
        conv = op_of(node) != "linear"
        positions = prod(shape) // weight_shape[0]
        if name in layers:  # one weight, used again: its work adds up, everything else is that of the first use
            shared.add(name)
            layers[name] = replace(layers[name], positions=layers[name].positions + positions)
            continue
        stride, padding, dilation = (tuple(entry) for entry in node.args[3:6]) if conv else ((), (), ())
        layers[name] = Layer(
            name=name,
            op="conv" if conv else "linear",
            node=node.name,
            weight_shape=weight_shape,
            positions=positions,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=node.args[6] if conv else 1,
            normalised=name in lowered.norms,
        )
    return tuple(layers.values()), frozenset(shared)


@dataclass(frozen=True)
class _Trial:
    """Trial prunes of a traced model on an example."""

    module: fx.GraphModule
    graph: LayerGraph
    tensors: Mapping[str, Tensor]
    example: Tensor

    def ends(self, group: Group) -> bool:
        """Whether the group holds the channels of the last layer, the logits."""
        last = {layer.name for layer in self.graph.layers if layer.node == self.graph.output}
        return not last.isdisjoint(group.writers)

    def prunes(self, groups: Sequence[Group]) -> bool:
        """Whether every second channel of all groups can go as if it were zero."""
        kept = {group.name: tuple(range(0, group.channels, 2)) for group in groups}
        pruned = slice_tensors(self.tensors, kept_positions(self.graph, kept))
        found = self._outputs(pruned)
        expected = self._outputs(masked(self.graph, self.tensors, groups, kept))
        if found is None or expected is None or found.shape != expected.shape:
            return False
        scale = max(float(expected.abs().max()), 1e-12)
        return float((found - expected).abs().max()) <= PARITY * scale

    def drops(self, branches: Sequence[Branch]) -> bool:
        """Whether the model without these branches still gives logits of its shape."""
        example = self.example.to("meta")
        found = _tried(lambda: Shapes(rebuild(self.module, self.graph, self.tensors, branches)).run(example))
        return found is not None and found.shape[1:] == self.graph.output_shape

    def _outputs(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        return _tried(lambda: rebuild(self.module, self.graph, tensors)(self.example))


def _tried(compute: Callable[[], Any]) -> Tensor | None:
    """A tensor, None where shapes do not fit: what a trial is there to find out."""
    try:
        with torch.no_grad():
            found = compute()
    except (RuntimeError, ValueError, IndexError):
        return None
    return found if isinstance(found, Tensor) else None
