"""What a guided search knows of a space before its first trial: what belongs together, and every option's loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autocomp.graph import LayerGraph
from autocomp.policy import FP32, Policy, Precision
from autocomp.space import Decision, PolicySpace
from autocomp.study.sensitivity import Sensitivity
from autocomp.study.starts import losses_of

__all__ = ["Terms", "losses", "terms_of"]

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


def _layers(graph: LayerGraph, decision: Decision) -> set[str]:
    """Layers that a decision about channels or a precision is about."""
    if decision.kind == "precision":
        return {decision.name}
    return {member.parameter.rpartition(".")[0] for member in graph.group_by_name[decision.name].members}
