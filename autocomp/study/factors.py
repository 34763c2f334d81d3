"""Costs as sums of factors, each of a few decisions, as a solver takes them: latency, multiply-accumulates, bytes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from math import prod
from typing import Generic, TypeVar

import numpy as np

from autocomp.controllers import Factor
from autocomp.graph import Layer, elements
from autocomp.hardware import ENTRY, Kernel, kernels_of
from autocomp.policy import FP32, Policy, Precision
from autocomp.space import PolicySpace
from autocomp.study.knowledge import Terms

__all__ = ["layer_terms", "shape_terms"]

PATTERNS, ALTOGETHER = 64, 4096
"""Combinations of precisions and branches told apart for one kernel, and for all, at most; farther layers are taken to
be alike."""
TOGETHER = 128
"""Combinations of channel counts told apart for one layer, at most; beyond, groups that it reads count one by one."""

Item = TypeVar("Item")
Choices = Mapping[int, int]
"""Decision -> index of an option, of some of the decisions."""


def layer_terms(terms: Terms, value: Callable[[Sequence[Kernel]], Sequence[float]], batch: int) -> tuple[Factor, ...]:
    """A cost that is a sum over kernels, as factors of the decisions that each kernel depends on.

    Which these are is found by changing one decision at a time, on the model in its widest and in its narrowest
    precision. A layer that reads the concatenation of many groups has a factor for each of them (see `_tables`).

    Args:
        value: of many kernels at once, for example their times.
        batch: of the kernels.
    """
    space, losses = terms.space, _Losses(terms)
    tables: list[_Table[Kernel]] = []
    sites = _sites(terms, batch)
    patterns = min(PATTERNS, ALTOGETHER // len(sites))
    for site, depends in sites.items():
        layer = None if site == ENTRY else space.graph.layer_by_name[site]
        inner = {terms.tied[d] for d in depends if d in terms.tied}
        others = [d for d in sorted(depends) if space.decisions[d].kind != "channels" and d not in inner]
        others.sort(key=lambda d: space.decisions[d].name != site)
        while prod(len(terms.options[d]) for d in others) > patterns and len(others) > 1:
            others.pop()
        own = [d for d in others if layer is not None and _is_about(terms, d, layer)]
        widths = [d for d in sorted(depends) if space.decisions[d].kind == "channels" and layer is not None]
        reads = [d for d in widths if layer is not None and losses.only_reads(d, layer)]
        tables += _tables(terms, others, own, widths, reads, _kernel_at(terms, losses, site, layer, batch))
    kernels = [kernel for table in tables for kernel in (*table.items, *table.less)]
    values = iter(value(kernels)) if kernels else iter(())
    return tuple(table.factor([next(values) for _ in (*table.items, *table.less)]) for table in tables)


def shape_terms(terms: Terms, value: Callable[[Layer, int, int, Precision], float]) -> tuple[Factor, ...]:
    """A cost that is a sum over layers of what their weights' shape and precision say: multiply-accumulates, bytes.

    Args:
        value: of a layer, its weight elements, its output channels, and its precision.
    """
    space, losses = terms.space, _Losses(terms)
    factors: list[Factor] = []
    for layer in space.graph.layers:
        widths = [d for d, entry in enumerate(space.decisions) if entry.kind == "channels" and losses.touches(d, layer)]
        own = [d for d in range(len(space.decisions)) if _is_about(terms, d, layer)]
        if any(d in terms.tied for d in (*own, *widths)):  # they tell whether a branch is gone
            own = [d for d in own if space.decisions[d].kind != "branch"]
        reads = [d for d in widths if losses.only_reads(d, layer)]
        for table in _tables(terms, own, own, widths, reads, _weights_at(terms, losses, layer)):
            shapes = (*table.items, *table.less)
            costs = [value(layer, elements(shape, precision.rank), shape[0], precision) for shape, precision in shapes]
            factors.append(table.factor(costs))
    return tuple(factors)


class _Losses:
    """What counts of channels take off the weights of layers."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._shapes = cache(lambda name, count: terms.space.graph.parameter_shapes(Policy({name: count})))

    def of(self, decision: int, choice: int, layer: Layer) -> tuple[int, ...] | None:
        """Sizes by axis; None where the group is gone with its branch."""
        count = self._terms.options[decision][choice]
        if not isinstance(count, int):
            return None
        shape = self._shapes(self._terms.space.decisions[decision].name, count)[layer.weight]
        return tuple(whole - size for whole, size in zip(layer.weight_shape, shape, strict=True))

    def touches(self, decision: int, layer: Layer) -> bool:
        group = self._terms.space.graph.group_by_name[self._terms.space.decisions[decision].name]
        return any(member.parameter == layer.weight for member in group.members)

    def only_reads(self, decision: int, layer: Layer) -> bool:
        """Whether the group narrows the layer's input alone."""
        least = self.of(decision, len(self._terms.space.decisions[decision].options) - 1, layer)
        return layer.groups == 1 and least is not None and least[0] == 0


def _is_about(terms: Terms, decision: int, layer: Layer) -> bool:
    """Whether it is the layer's precision, or a branch that the layer goes with."""
    entry, graph = terms.space.decisions[decision], terms.space.graph
    if entry.kind == "branch":
        return layer.name in graph.branch_by_name[entry.name].layers
    return entry.kind == "precision" and entry.name == layer.name


def _bases(space: PolicySpace) -> list[Policy]:
    return [space.nearest({}, precision) for precision in dict.fromkeys((space.precisions[-1], space.precisions[0]))]


def _sites(terms: Terms, batch: int) -> dict[str, set[int]]:
    """Kernel -> the decisions it depends on."""
    space = terms.space
    found: dict[str, set[int]] = {}
    for base in _bases(space):
        plain = kernels_of(space.graph, base, batch)
        indices = list(space.encode(base))
        for name in plain:
            found.setdefault(name, set())
        for position, decision in enumerate(space.decisions):
            for option in range(len(decision.options)):
                if option == indices[position]:
                    continue
                changed = space.decode([*indices[:position], option, *indices[position + 1 :]])
                other = kernels_of(space.graph, changed, batch)
                for name in found:
                    if plain.get(name) != other.get(name):
                        found[name].add(position)
                if decision.kind == "channels":
                    break  # one count shows as much as all
    return found


def _kernel_at(
    terms: Terms, losses: _Losses, site: str, layer: Layer | None, batch: int
) -> Callable[[Choices], Kernel | None]:
    """The kernel of a site, by the decisions it depends on; None where its branch, or a group's, is dropped."""
    space = terms.space

    @cache
    def whole(choices: tuple[tuple[int, int], ...]) -> Kernel | None:
        taken = {d: terms.options[d][choice] for d, choice in choices}
        own = next((option for d, option in taken.items() if space.decisions[d].name == site), None)
        indices = list(space.encode(space.nearest({}, own if isinstance(own, Precision) else space.precisions[-1])))
        for d, choice in choices:
            if taken[d] is None:
                indices[terms.tied[d]] = 1
            else:
                indices[d] = choice
        return kernels_of(space.graph, space.decode(indices), batch, site).get(site)

    def at(choices: Choices) -> Kernel | None:
        widths = [d for d in choices if space.decisions[d].kind == "channels"]
        kernel = whole(tuple((d, choice) for d, choice in choices.items() if d not in widths))
        if kernel is None or layer is None:
            return kernel
        out, read = kernel.channels_out, kernel.channels_in
        for d in widths:
            lost = losses.of(d, choices[d], layer)
            if lost is None:  # the branch is dropped: what is left then stands where nothing is lost
                return None
            out -= lost[0]
            if layer.groups == 1:
                read -= lost[1]
            else:  # loses whole groups
                read -= (layer.groups - layer.groups_of(layer.weight_shape[0] - lost[0])) * layer.weight_shape[1]
        groups = kernel.groups if kernel.groups == 1 else out // (kernel.channels_out // kernel.groups)
        return replace(kernel, channels_in=read, channels_out=out, groups=groups)

    return at


def _weights_at(
    terms: Terms, losses: _Losses, layer: Layer
) -> Callable[[Choices], tuple[tuple[int, ...], Precision] | None]:
    """Shape and precision of a layer's weight, by decisions; None where its branch is dropped."""

    def at(choices: Choices) -> tuple[tuple[int, ...], Precision] | None:
        shape, precision = layer.weight_shape, FP32
        for d, choice in choices.items():
            option = terms.options[d][choice]
            if option is None or option is True:
                return None
            if isinstance(option, Precision):
                precision = option
            elif terms.space.decisions[d].kind == "channels":
                shape = tuple(
                    size - less for size, less in zip(shape, losses.of(d, choice, layer) or shape, strict=True)
                )
        return shape, precision

    return at


@dataclass(frozen=True)
class _Table(Generic[Item]):
    """A factor before its costs are known.

    Attributes:
        places: of the flattened table that hold a cost; the others hold none.
        items: whose costs they are.
        less: whose costs are taken off, if any.
    """

    decisions: tuple[int, ...]
    shape: tuple[int, ...]
    places: Sequence[int]
    items: Sequence[Item]
    less: Sequence[Item]

    def factor(self, values: Sequence[float]) -> Factor:
        """Args: values: costs of the items, then of those taken off."""
        costs = np.zeros(prod(self.shape))
        costs[self.places] = values[: len(self.items)]
        if self.less:
            costs[self.places] -= values[len(self.items) :]
        return Factor(self.decisions, costs.reshape(self.shape))


def _tables(
    terms: Terms,
    others: Sequence[int],
    own: Sequence[int],
    widths: Sequence[int],
    reads: Sequence[int],
    item_at: Callable[[Choices], Item | None],
) -> Iterator[_Table[Item]]:
    """One table of all decisions where widths have few combinations.

    Else the groups that a layer only reads stand at their middle count in it, and each has a small table: what another
    count of it adds where all widths stand at theirs. So costs that are linear in the channels read stay exact there.

    Args:
        others: the decisions that are no widths.
        own: those of them without which no table can be.
        reads: the widths that narrow the input alone.
    """
    if prod(len(terms.options[d]) for d in widths) <= TOGETHER:
        yield _table(terms, (*others, *widths), {}, item_at)
        return
    apart = list(reads)
    if not any(d in terms.tied for d in (*others, *widths) if d not in apart):
        teller = next((d for d in apart if d in terms.tied), None)  # of whether the branch is gone
        apart = [d for d in apart if d != teller]
    middle = {d: len(terms.space.decisions[d].options) // 2 for d in widths}
    together = [d for d in widths if d not in apart]
    yield _table(terms, (*others, *together), {d: middle[d] for d in apart}, item_at)
    for d in apart:
        yield _table(terms, (*own, d), middle, item_at, d)


def _table(
    terms: Terms,
    decisions: tuple[int, ...],
    fixed: Choices,
    item_at: Callable[[Choices], Item | None],
    moved: int | None = None,
) -> _Table[Item]:
    """Every combination of the decisions' options, the others as given.

    Args:
        moved: the decision whose fixed choice is what the items are taken off from.
    """
    shape = tuple(len(terms.options[d]) for d in decisions)
    places, items, less = [], [], []
    for place, taken in enumerate(product(*map(range, shape))):
        choices = {**fixed, **dict(zip(decisions, taken, strict=True))}
        item = item_at(choices)
        before = None if moved is None else item_at({**choices, moved: fixed[moved]})
        if item is not None and (moved is None or before is not None):
            places.append(place)
            items.append(item)
            if before is not None:
                less.append(before)
    return _Table(decisions, shape, places, items, less)
