"""What small changes do to a model's outputs, each measured from the place on where it begins to matter."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import isfinite
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from autocomp.capabilities import Numerics
from autocomp.compress.apply import compress
from autocomp.compress.recalibrate import divergence
from autocomp.compress.statistics import Statistics, check_images
from autocomp.compress.surgery import batches, run, tensors_of
from autocomp.compress.tracing import Traced
from autocomp.errors import CompressError
from autocomp.policy import Policy, Recipe

__all__ = ["divergences"]

Measure = Callable[[NDArray[np.float32], NDArray[np.float32]], float]
BATCH = 64  # images that go through the rest of a model together


def divergences(
    traced: Traced,
    statistics: Statistics,
    recipe: Recipe,
    numerics: Numerics,
    calibration: Tensor,
    images: Tensor,
    policies: Iterable[Policy],
    measure: Measure | None = None,
) -> Iterator[float]:
    """How far each policy's model, as `compress` gives it, is from the uncompressed one.

    What lies before a policy's first change is computed once and shared with the policies that follow: give those
    that change early layers first. A recipe that recalibrates changes every normalised layer and shares little.

    Args:
        calibration: the images behind ``statistics``, in their order.
        images: (n, *input_shape), what the two models' outputs are compared on.
        measure: (the uncompressed model's outputs, the other's), both (n, outputs), -> a number, 0 for equal ones; None
            for the KL divergence in nats.

    Yields:
        one divergence a policy, in their order, when it is asked for.

    Raises:
        DataError, InputError: as `compress`.
        CompressError: as `compress`, or outputs are not finite.
    """
    images = check_images(images, traced.graph)
    reference = run(traced.module, images, BATCH)
    walk = _Walk(traced.module, images)
    for policy in policies:
        changed = compress(traced, statistics, policy, recipe, numerics, calibration).module
        place = _first_difference(traced.module, changed)
        with torch.no_grad():
            logits = torch.cat([_finish(changed, place, values) for values in walk.to(place)])
        found = divergence(reference, logits) if measure is None else measure(reference.numpy(), logits.numpy())
        if not isfinite(found):
            raise CompressError(
                f"the model of {policy.to_json()} gives NaN or infinite outputs: raise the recipe's ridge, or take the "
                "choice out of the search space"
            )
        yield max(found, 0.0)  # rounding leaves equal outputs a little below zero


class _Walk:
    """The uncompressed model run up to a place among its operators; holds only what is read from there on."""

    def __init__(self, module: fx.GraphModule, images: Tensor) -> None:
        self._interpreter = fx.Interpreter(module)
        self._images = images
        self._operators = _operators(module)
        index = {node: place for place, node in enumerate(self._operators)}
        ends = len(self._operators)
        self._last_read = {node: max((index.get(user, ends) for user in node.users), default=-1) for node in index}
        tensors = [node for node in module.graph.nodes if node.op == "get_attr"]
        self._tensors = {node: self._interpreter.run_node(node) for node in tensors}
        self._place, self._values = 0, self._beginning()

    def to(self, place: int) -> list[dict[str, Tensor]]:
        """Values by node name, one mapping a batch, that operators from ``place`` on read from before it."""
        if place < self._place:
            self._place, self._values = 0, self._beginning()
        with torch.no_grad():
            for values in self._values:
                self._advance(values, place)
        self._place = place
        return [{node.name: value for node, value in values.items()} for values in self._values]

    def _beginning(self) -> list[dict[fx.Node, Any]]:
        (source,) = (node for node in self._operators if node.op == "placeholder")
        return [{source: part} for part in batches(self._images, BATCH)]

    def _advance(self, values: dict[fx.Node, Any], place: int) -> None:
        self._interpreter.env = {**self._tensors, **values}
        for node in self._operators[max(self._place, 1) : place]:  # the input is there
            values[node] = self._interpreter.env[node] = self._interpreter.run_node(node)
        for node in [node for node in values if self._last_read[node] < place]:
            del values[node]


def _operators(module: fx.GraphModule) -> list[fx.Node]:
    """The nodes that compute something, the input first."""
    return [node for node in module.graph.nodes if node.op not in ("get_attr", "output")]


def _first_difference(original: fx.GraphModule, changed: fx.GraphModule) -> int:
    """How many operators from the input on are the same in both, their tensors too; at least the input."""
    before, after = tensors_of(original), tensors_of(changed)
    place = 0
    for first, second in zip(_operators(original), _operators(changed), strict=False):
        read = [str(node.target) for node in first.all_input_nodes if node.op == "get_attr"]
        if _call(first) != _call(second) or not all(torch.equal(before[name], after[name]) for name in read):
            break
        place += 1
    return place


def _call(node: fx.Node) -> tuple[Any, ...]:
    """What a node computes from what, tensors by name."""
    arguments = fx.map_arg((node.args, node.kwargs), lambda entry: entry.name)
    return node.name, node.target, arguments


def _finish(module: fx.GraphModule, place: int, values: Mapping[str, Tensor]) -> Tensor:
    """The output of a module whose first ``place`` operators are known; those nobody reads any more need no value."""
    env = {node: values.get(node.name) for node in _operators(module)[:place]}
    found: Tensor = fx.Interpreter(module).run(initial_env=env)
    return found
