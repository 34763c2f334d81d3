"""What a guided search knows before its first trial: the loss of every option, and what options cost together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod

import numpy as np
from numpy.typing import NDArray

from autocomp.controllers import Factor
from autocomp.graph import Layer, LayerGraph, elements
from autocomp.hardware import ENTRY, Kernel, kernels_of
from autocomp.policy import FP32, Policy, Precision
from autocomp.space import Decision, PolicySpace
from autocomp.study.sensitivity import Sensitivity
from autocomp.study.starts import losses_of

__all__ = ["Terms", "layer_terms", "losses", "shape_terms", "terms_of"]

PATTERNS = 64
"""Combinations of precisions and branches told apart for one kernel, at most; farther layers are taken to be alike."""
UNMEASURED_PRECISION = 1e-5
"""Nats that an integer layer is taken to lose where its sensitivity was not measured."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Terms:
    """A space's decisions as a `Problem` has them.

    Attributes:
        space: with the decisions.
        options: of each decision: the space's own, and one more, None, where a dropped branch can take its effect away.
        tied: decision -> the branch's decision that takes its effect away.
    """

    space: PolicySpace
    options: tuple[tuple[int | bool | Precision | None, ...], ...]
    tied: Mapping[int, int]

    def policy(self, choices: Sequence[int]) -> Policy:
        """The policy of one index per decision."""
        own = zip(self.options, choices, strict=True)
        return self.space.decode([0 if options[choice] is None else choice for options, choice in own])

    def choices(self, policy: Policy) -> tuple[int, ...]:
        """The reverse. Raises: InputError where the space does not hold the policy."""
        taken = self.space.encode(policy)
        gone = {inner for inner, outer in self.tied.items() if taken[outer] == 1}
        return tuple(len(self.options[d]) - 1 if d in gone else choice for d, choice in enumerate(taken))


def terms_of(space: PolicySpace) -> Terms:
    """Which decisions have no effect once a branch is dropped; of branches inside each other the outer one counts."""
    graph = space.graph
    tied: dict[int, int] = {}
    for outer, decision in enumerate(space.decisions):
        if decision.kind != "branch":
            continue
        layers = set(graph.branch_by_name[decision.name].layers)
        for inner, other in enumerate(space.decisions):
            if other.kind != "branch" and _layers(graph, other) <= layers:
                before = tied.get(inner)
                if before is None or len(layers) > len(graph.branch_by_name[space.decisions[before].name].layers):
                    tied[inner] = outer
    options = tuple(
        (*decision.options, None) if position in tied else decision.options
        for position, decision in enumerate(space.decisions)
    )
    return Terms(space, options, tied)


def losses(terms: Terms, sensitivity: Sensitivity) -> tuple[Array, ...]:
    """Divergence of every option made alone, in nats; what was not measured is interpolated (see `losses_of`)."""
    channels = {name: losses_of(rows) for name, rows in sensitivity.of("channels").items()}
    branches = {name: rows[0].divergence for name, rows in sensitivity.of("branch").items()}
    precisions = {
        (row.name, row.choice): row.divergence for rows in sensitivity.of("precision").values() for row in rows
    }

    def loss(decision: Decision, option: int | bool | Precision | None) -> float:
        if option is None or option is False or option == FP32:
            return 0.0
        if isinstance(option, Precision):
            known = precisions.get((decision.name, option))
            unknown = UNMEASURED_PRECISION * 4.0 ** (8 - option.weight_bits if option.is_integer else 0)
            return unknown if known is None else known
        if option is True:
            known = branches.get(decision.name)
            return 1.0 if known is None else known
        whole = terms.space.graph.group_by_name[decision.name].channels
        return 0.0 if option == whole else channels.get(decision.name, {}).get(option, 1 - option / whole)

    pairs = zip(terms.space.decisions, terms.options, strict=True)
    return tuple(np.array([max(loss(decision, option), 0.0) for option in options]) for decision, options in pairs)


def layer_terms(terms: Terms, value: Callable[[Sequence[Kernel]], Sequence[float]], batch: int) -> tuple[Factor, ...]:
    """A cost that is a sum over kernels, as factors of the decisions that each kernel depends on.

    Which these are is found by changing one decision at a time, on the model in its widest and in its narrowest
    precision.

    Args:
        value: of many kernels at once, for example their times.
        batch: of the kernels.
    """
    sites = _sites(terms, batch)
    tables: list[tuple[tuple[int, ...], tuple[int, ...], list[int], list[Kernel]]] = []
    for site, depends in sites.items():
        tables.append(_table(terms, site, sorted(depends), batch))
    kernels = [kernel for *_, own in tables for kernel in own]
    values = iter(value(kernels)) if kernels else iter(())
    factors = []
    for decisions, shape, filled, own in tables:
        costs = np.zeros(prod(shape))
        costs[filled] = [next(values) for _ in own]
        factors.append(Factor(decisions, costs.reshape(shape)))
    return tuple(factors)


def shape_terms(terms: Terms, value: Callable[[Layer, int, int, Precision], float]) -> tuple[Factor, ...]:
    """A cost that is a sum over layers of what their weights' shape and precision say: multiply-accumulates, bytes.

    Args:
        value: of a layer, its weight elements, its output channels, and its precision.
    """
    space, graph = terms.space, terms.space.graph
    whole = graph.parameter_shapes(Policy())
    factors = []
    for layer in graph.layers:
        members = {member.parameter for group in graph.groups for member in group.members}
        depends = [
            d
            for d, decision in enumerate(space.decisions)
            if (decision.kind == "precision" and decision.name == layer.name)
            or (
                decision.kind == "channels"
                and layer.weight in members
                and any(m.parameter == layer.weight for m in graph.group_by_name[decision.name].members)
            )
        ]
        outer = next((terms.tied[d] for d in depends if d in terms.tied), None)
        if outer is None:
            depends += [
                d
                for d, decision in enumerate(space.decisions)
                if decision.kind == "branch" and layer.name in graph.branch_by_name[decision.name].layers
            ]
        shape = tuple(len(terms.options[d]) for d in depends)
        costs = np.zeros(shape)
        for choices in product(*map(range, shape)):
            taken = {d: terms.options[d][choice] for d, choice in zip(depends, choices, strict=True)}
            if None in taken.values() or True in [t for d, t in taken.items() if space.decisions[d].kind == "branch"]:
                continue
            kept = {
                space.decisions[d].name: t
                for d, t in taken.items()
                if space.decisions[d].kind == "channels" and isinstance(t, int)
            }
            weight = graph.parameter_shapes(Policy(kept))[layer.weight] if kept else whole[layer.weight]
            precision = next((t for t in taken.values() if isinstance(t, Precision)), FP32)
            costs[choices] = value(layer, elements(weight, precision.rank), weight[0], precision)
        factors.append(Factor(tuple(depends), costs))
    return tuple(factors)


def _layers(graph: LayerGraph, decision: Decision) -> set[str]:
    """Layers that a decision about channels or a precision is about."""
    if decision.kind == "precision":
        return {decision.name}
    return {member.parameter.rpartition(".")[0] for member in graph.group_by_name[decision.name].members}


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


def _table(
    terms: Terms, site: str, depends: Sequence[int], batch: int
) -> tuple[tuple[int, ...], tuple[int, ...], list[int], list[Kernel]]:
    """Decisions, shape, and for the places of the flattened table that hold a kernel which one."""
    space = terms.space
    graph = space.graph
    widths = [d for d in depends if space.decisions[d].kind == "channels"]
    inner = {terms.tied[d] for d in depends if d in terms.tied}
    others = [d for d in depends if space.decisions[d].kind != "channels" and d not in inner]
    others.sort(key=lambda d: space.decisions[d].name != site)
    while prod(len(terms.options[d]) for d in others) > PATTERNS:
        others.pop()
    decisions = (*others, *widths)
    shape = tuple(len(terms.options[d]) for d in decisions)
    places = np.arange(prod(shape)).reshape(shape)
    deltas = [[_narrowing(graph, space, site, d, option) for option in terms.options[d]] for d in widths]
    filled: list[int] = []
    kernels: list[Kernel] = []
    for pattern in product(*(range(len(terms.options[d])) for d in others)):
        own = next((terms.options[d][c] for d, c in zip(others, pattern, strict=True) if _is_own(space, d, site)), None)
        indices = list(space.encode(space.nearest({}, own if isinstance(own, Precision) else space.precisions[-1])))
        for d, choice in zip(others, pattern, strict=True):
            if terms.options[d][choice] is None:
                indices[terms.tied[d]] = 1
            else:
                indices[d] = choice
        kernel = kernels_of(graph, space.decode(indices), batch).get(site)
        if kernel is None:
            continue
        for counts in product(*(range(len(terms.options[d])) for d in widths)):
            lost = [deltas[axis][choice] for axis, choice in enumerate(counts)]
            if any(entry is None for entry in lost):
                continue  # the branch is dropped: what is left then stands where nothing is lost
            read, written = (sum(entry[side] for entry in lost if entry is not None) for side in (0, 1))
            filled.append(int(places[(*pattern, *counts)]))
            kernels.append(_narrower(kernel, read, written))
    return decisions, shape, filled, kernels


def _is_own(space: PolicySpace, decision: int, site: str) -> bool:
    return space.decisions[decision].kind == "precision" and space.decisions[decision].name == site


def _narrowing(
    graph: LayerGraph, space: PolicySpace, site: str, decision: int, option: int | bool | Precision | None
) -> tuple[int, int] | None:
    """Channels that a layer reads and writes less where a group keeps only so many; None where the group is gone."""
    if not isinstance(option, int) or site == ENTRY:
        return None
    layer = graph.layer_by_name[site]
    shape = graph.parameter_shapes(Policy({space.decisions[decision].name: option}))[layer.weight]
    whole = layer.weight_shape
    written = whole[0] - shape[0]
    if layer.groups > 1:  # loses whole groups
        return (layer.groups - layer.groups_of(shape[0])) * whole[1], written
    return whole[1] - shape[1], written


def _narrower(kernel: Kernel, read: int, written: int) -> Kernel:
    out = kernel.channels_out - written
    groups = kernel.groups if kernel.groups == 1 else out // (kernel.channels_out // kernel.groups)
    return replace(kernel, channels_in=kernel.channels_in - read, channels_out=out, groups=groups)
