"""Layers solved one after the other on what the compressed layers before them really give."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from autocomp.compress.damping import damped_cholesky
from autocomp.compress.moments import MIN_ROWS, ROWS_PER_FEATURE, draw_positions, inner_products, outputs_at, patches_at
from autocomp.compress.naming import value_of
from autocomp.compress.surgery import shared_parameters, tensors_of
from autocomp.compress.tracing import Traced
from autocomp.errors import CompressError
from autocomp.graph import Layer, LayerGraph, Node
from autocomp.policy import Policy, Recipe

__all__ = ["solve_in_sequence"]

ACTIVATIONS_BYTES = 10**9  # of the maps that both models hold at once; fewer images where they would be larger
PATCHES_BYTES = 256 * 10**6  # of one layer's unfolded inputs; larger layers keep their closed-form solution
IMAGE_ROWS = 64  # of one image: neighbouring positions tell little more, narrow layers do without
LEAST_ROWS = 2  # samples a feature; fewer would be followed into their noise
RECTIFIED = 3  # passes in which outputs that a ReLU cuts off anyway may stay where they fall
RECTIFIED_TRIAL = 1  # the first brings nearly all of it: policies rank the same, a fifth of the time is saved


def solve_in_sequence(
    traced: Traced,
    module: fx.GraphModule,
    policy: Policy,
    positions: Mapping[tuple[str, int], NDArray[np.int64]],
    images: Tensor,
    recipe: Recipe,
    known: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """New weights and biases of the layers from the first change on; those before it stay as they are, bit for bit.

    Both models run side by side over the calibration images. Each layer of the compressed one is solved, by ridge
    regression towards the weight it has, for the output that the original gives at the same positions, from the
    inputs that the layers solved before give (He et al., Channel Pruning, ICCV 2017, section 3.2). Where the output
    goes into an addition only, its target is what is missing there from the original sum, the error of the stream
    included (section 3.3, multi-branch enhancement). Behind it a ReLU forgives what both models cut off (Zhang et
    al., Accelerating Very Deep CNNs, TPAMI 2016, section 3.2.1, in the limit of a large penalty). A layer of reduced
    rank that is solved has it from here on, so that those behind it make up for what it loses (section 3.3 there).

    A layer whose weight several operators read keeps what it has: no solution is for all of them.

    Args:
        module: compressed, in float, branches bypassed.
        policy: that led to it, normalised.
        positions: what stays on the sliced axes, see `kept_positions`.
        images: (n, *input_shape); as many are used as fit in 1 GB of activations.
        known: value -> what the original gives on as many images or more, where that was computed before.

    Returns:
        parameter name -> tensor.

    Raises:
        CompressError: a solve gives no finite weights.
    """
    graph = traced.graph
    count = max(1, min(len(images), ACTIVATIONS_BYTES // _live_bytes(graph)))
    solver = _Solver(traced, module, policy, positions, images[:count], recipe, known or {})
    with torch.no_grad():
        return solver.run()


def _live_bytes(graph: LayerGraph) -> int:
    """Bytes of activations that one image needs at most at once, in two models."""
    last = {value: index for index, node in enumerate(graph.nodes) for value in node.inputs}
    live, most = 0, 1
    sizes = {node.name: 4 * int(np.prod(node.shape)) if node.shape else 0 for node in graph.nodes}
    for index, node in enumerate(graph.nodes):
        live += sizes[node.name]
        most = max(most, live)
        live -= sum(sizes[value] for value in set(node.inputs) if last[value] == index)
    return 2 * most


class _Values:
    """Values of one model on all images: computed when asked for, forgotten behind their last reader."""

    def __init__(self, module: fx.GraphModule, tensors: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> None:
        self.nodes = {value_of(node): node for node in module.graph.nodes if node.op != "get_attr"}
        self._tensors = tensors
        self._known: dict[str, Any] = dict(known)

    def __getitem__(self, name: str) -> Any:
        if name not in self._known:
            node = self.nodes[name]
            assert callable(node.target)
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._argument)
            self._known[name] = node.target(*args, **kwargs)
        return self._known[name]

    def _argument(self, node: fx.Node) -> Any:
        return self._tensors[str(node.target)] if node.op == "get_attr" else self[value_of(node)]

    def reads(self, name: str) -> tuple[list[str], dict[str, Tensor]]:
        """The values that a node reads, and its tensors by name."""
        inputs = self.nodes[name].all_input_nodes
        tensors = {str(node.target): self._tensors[str(node.target)] for node in inputs if node.op == "get_attr"}
        return [value_of(node) for node in inputs if node.op != "get_attr"], tensors

    def take(self, name: str, value: Any) -> None:
        """A value that is known without computing it."""
        self._known[name] = value

    def renew(self, name: str) -> None:
        """Compute a value, and what was computed from it ahead, anew."""
        pending = [name]
        while pending:
            name = pending.pop()
            if self._known.pop(name, None) is not None:
                pending.extend(value_of(user) for user in self.nodes[name].users)

    def forget(self, order: Mapping[str, int], until: int) -> None:
        """Drop what no node after position ``until`` of the order reads."""
        for name in list(self._known):
            if all(order.get(value_of(user), len(order)) <= until for user in self.nodes[name].users):
                del self._known[name]


class _Solver:
    """The original and the compressed model, side by side."""

    def __init__(
        self,
        traced: Traced,
        module: fx.GraphModule,
        policy: Policy,
        positions: Mapping[tuple[str, int], NDArray[np.int64]],
        images: Tensor,
        recipe: Recipe,
        known: Mapping[str, Tensor],
    ) -> None:
        count = len(images)
        self._count, self._graph = count, traced.graph
        known = {name: value for name in known if (value := self._first(known[name], name, count)) is not None}
        self._tensors = tensors_of(module)
        self._original = _Values(traced.module, tensors_of(traced.module), {**known, "input": images})
        self._compressed = _Values(module, self._tensors, {"input": images})
        self._kept = {name: torch.from_numpy(rows) for (name, axis), rows in positions.items() if axis == 0}
        self._bypass = {
            branch.add: branch.stream for branch in map(traced.graph.branch_by_name.__getitem__, policy.dropped)
        }
        self._recipe, self._policy = recipe, policy
        self._shared = shared_parameters(traced.module)

    def run(self) -> dict[str, Tensor]:
        solved: dict[str, Tensor] = {}
        order = {node.name: index for index, node in enumerate(self._graph.nodes)}
        same: set[str] = set()
        for index, node in enumerate(self._graph.nodes):
            if self._equal(node.name, same):
                same.add(node.name)
                self._compressed.take(node.name, self._original[node.name])
            elif node.name in self._compressed.nodes:
                layer = self._graph.layer_by_node.get(node.name)
                if layer is not None and layer.weight not in self._shared:
                    found = self._solve(layer)
                    self._tensors.update(found)
                    self._compressed.renew(node.name)
                    solved |= found
                self._compressed[node.name]
            self._original[node.name]
            self._original.forget(order, index)
            self._compressed.forget(order, index)
        return solved

    def _equal(self, name: str, same: set[str]) -> bool:
        """Whether a node gives the same in both models, where the values in ``same`` do."""
        layer = self._graph.layer_by_node.get(name)
        if name not in self._compressed.nodes or (layer and self._policy.precision(layer.name).rank):
            return False
        (before, old), (now, new) = self._original.reads(name), self._compressed.reads(name)
        return now == before and same.issuperset(now) and all(torch.equal(old[key], new[key]) for key in new)

    def _solve(self, layer: Layer) -> dict[str, Tensor]:
        """Weight and bias of a layer; none where samples are too few, or too wide for enough of them to be held."""
        weight, bias = self._tensors[layer.weight], self._tensors[layer.bias]
        read = self._compressed[value_of(self._compressed.nodes[layer.node].all_input_nodes[0])]
        groups = layer.groups_of(weight.shape[0])
        features = weight[0].numel()
        least = min(MIN_ROWS, IMAGE_ROWS * self._count)
        rows = min(max(least, ROWS_PER_FEATURE * features), PATCHES_BYTES // (4 * features * groups))
        if rows < LEAST_ROWS * features:
            return {}
        generator = torch.Generator().manual_seed(self._recipe.seed)  # a layer's own: others may be skipped
        chosen = draw_positions(read, layer, -(-rows // self._count), generator)
        patches = patches_at(read, layer, chosen)
        if len(patches) < LEAST_ROWS * features:
            return {}
        inputs = patches.reshape(len(patches), groups, features).transpose(0, 1)
        rank = self._policy.precision(layer.name).rank
        fit = _Fit.of(inputs, weight.reshape(groups, -1, features), self._recipe.ridge, rank)
        target, beside, rectified = self._target(layer, chosen)
        target, beside = (fit.grouped(value) for value in (target, beside))
        solution = fit.solve(target)
        passes = RECTIFIED_TRIAL if self._recipe.reconstruction == "auto" else RECTIFIED
        for _ in range(passes if rectified else 0):
            whole, reached = target + beside, fit.outputs(solution) + beside
            solution = fit.solve(torch.where(whole > 0, whole, reached.clamp(max=0)) - beside)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in solution):
            raise CompressError(f"solving {layer.name} in sequence gave NaN: raise the recipe's ridge")
        return {layer.weight: solution[0].reshape(weight.shape), layer.bias: solution[1].reshape(bias.shape)}

    def _first(self, value: Tensor, name: str, count: int) -> Tensor | None:
        """What a value is on the first images; None where these are too few, or not what its first axis is made of."""
        shape = self._graph.node_by_name[name].shape
        images = value.numel() // int(np.prod(shape))
        if images < count or tuple(value.shape) not in ((images, *shape), (images * shape[0], *shape[1:])):
            return None
        return value[: count * (len(value) // images)]

    def _target(self, layer: Layer, chosen: Tensor) -> tuple[Tensor, Tensor, bool]:
        """What a layer is to give, (samples, out), what is added to it, and whether a ReLU follows.

        Behind an addition both lack the error of its other input.
        """
        wanted = self._output(self._original[layer.node], layer, chosen)
        readers = self._readers(layer.node)
        if len(readers) == 1 and readers[0].op == "add" and readers[0].name not in self._bypass:
            others = [value for value in readers[0].inputs if value != layer.node]
            if len(others) == 1 and self._shape(others[0]) == self._shape(layer.node):
                before = self._output(self._original[others[0]], layer, chosen)
                beside = outputs_at(self._compressed[self._resolve(others[0])], layer, chosen)
                return wanted + before - beside, beside, self._rectified(readers[0].name)
        return wanted, torch.zeros_like(wanted), self._rectified(layer.node)

    def _output(self, value: Tensor, layer: Layer, chosen: Tensor) -> Tensor:
        rows = outputs_at(value, layer, chosen)
        kept = self._kept.get(layer.weight)
        return rows if kept is None else rows[:, kept]

    def _readers(self, value: str) -> list[Node]:
        return [self._graph.node_by_name[name] for name in self._graph.consumers[value]]

    def _rectified(self, value: str) -> bool:
        return [node.op for node in self._readers(value)] == ["relu"]

    def _shape(self, value: str) -> tuple[int, ...]:
        return self._graph.node_by_name[value].shape

    def _resolve(self, value: str) -> str:
        while value in self._bypass:
            value = self._bypass[value]
        return value


@dataclass(frozen=True)
class _Fit:
    """Ridge regression of a layer's outputs on its inputs, towards the weight it has.

    Attributes:
        inputs: centred, (groups, samples, features).
        mean: of the inputs, (groups, features).
        weight: (groups, out, features).
        given: what the weight gives of the centred inputs, (groups, samples, out).
        factor: Cholesky factor of the ridged second moment, (groups, features, features).
        rank: of the solution's weight; None for any.
    """

    inputs: Tensor
    mean: Tensor
    weight: Tensor
    given: Tensor
    factor: Tensor
    rank: int | None

    @classmethod
    def of(cls, inputs: Tensor, weight: Tensor, ridge: float, rank: int | None) -> "_Fit":
        """inputs: (groups, samples, features)."""
        mean = inputs.mean(1)
        inputs = inputs - mean[:, None]
        gram = (inner_products(inputs) / inputs.shape[1]).double()
        factor = damped_cholesky(gram, max(ridge, 1e-6))  # dead inputs keep their weights
        return cls(inputs, mean, weight, inputs @ weight.transpose(1, 2), factor, rank)

    def grouped(self, values: Tensor) -> Tensor:
        """(samples, groups * out) as (groups, samples, out)."""
        return values.reshape(len(values), len(self.inputs), -1).transpose(0, 1)

    def outputs(self, solution: tuple[Tensor, Tensor]) -> Tensor:
        """(groups, samples, out) of a weight (groups, out, features) and bias (groups, out)."""
        weight, bias = solution
        shift = bias + (weight @ self.mean[:, :, None]).squeeze(2)
        return self.inputs @ weight.transpose(1, 2) + shift[:, None]

    def solve(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias for a target (groups, samples, out)."""
        centre = target.mean(1)
        missing = target - centre[:, None] - self.given
        moment = self.inputs.transpose(1, 2) @ missing / self.inputs.shape[1]
        weight = self.weight + torch.cholesky_solve(moment.double(), self.factor).float().transpose(1, 2)
        if self.rank is not None and bool(torch.isfinite(weight).all()):
            weight = self._reduced(weight, self.rank)
        return weight, centre - (weight @ self.mean[:, :, None]).squeeze(2)

    def _reduced(self, weight: Tensor, rank: int) -> Tensor:
        """The weight of a rank whose outputs are nearest: these on their principal axes (Izenman, Reduced-rank
        regression for the multivariate linear model, Journal of Multivariate Analysis 1975, section 2)."""
        spread = weight.double() @ self.factor
        axes: Tensor = torch.linalg.eigh(spread @ spread.transpose(1, 2)).eigenvectors[:, :, -rank:]
        return (axes @ (axes.transpose(1, 2) @ weight.double())).float()
