"""Ranks for all layers at once, from what each keeps of its outputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

from autocomp.compress import energies
from autocomp.controllers import frontier
from autocomp.graph import LayerGraph
from autocomp.policy import Policy, Precision
from autocomp.study.workbench import Workbench

__all__ = ["reduced"]

LEAST = 1e-9
"""Share of a variance that counts as nothing."""


def reduced(bench: Workbench, policy: Policy, target: float) -> Policy | None:
    """A policy with the ranks that keep most at a fraction of the uncompressed model's MACs.

    Most is the product, over the layers, of the shares of their outputs' variance that are kept (Zhang et al.,
    arXiv:1505.06798, section 3.4, who take them away greedily); a knapsack of the logarithms finds it.

    Args:
        policy: with all layers at full rank.

    Returns:
        None where the lowest ranks still take too many.
    """
    graph, compressed = bench.traced.graph, bench.emitter.compress(policy)
    kept = energies(bench.traced, bench.statistics, compressed.kept, compressed.tensors)
    choices = [
        _choices(graph, policy, decision.name, decision.options, kept[decision.name].tolist())
        for decision in bench.space.decisions
        if decision.kind == "precision" and decision.name in kept
    ]
    limit = target * graph.macs(Policy())
    cheapest_first = frontier([[c.loss for c in row] for row in choices], [[c.macs for c in row] for row in choices])
    fixed = graph.macs(policy) - sum(row[0].macs for row in choices)
    for found in reversed(cheapest_first):
        if fixed + found.cost <= limit:
            chosen = {row[at].layer: row[at].precision for row, at in zip(choices, found.choices, strict=True)}
            return graph.normalise(Policy(policy.kept, policy.dropped, {**policy.precisions, **chosen}))
    return None


@dataclass(frozen=True, slots=True)
class _Choice:
    """A layer at a rank, or at full rank."""

    layer: str
    precision: Precision
    loss: float
    macs: float


def _choices(
    graph: LayerGraph, policy: Policy, layer: str, options: Sequence[object], kept: Sequence[float]
) -> list[_Choice]:
    """What a layer may be, at full rank first, of those that are smaller in a policy."""
    full = policy.precision(layer)
    found = [_Choice(layer, full, 0.0, graph.layer_macs(policy)[layer])]
    for option in options:
        if isinstance(option, Precision) and option.rank and option.full_rank == full:
            tried = graph.normalise(Policy(policy.kept, policy.dropped, {**policy.precisions, layer: option}))
            if tried.precision(layer) == option:
                loss = -log(max(kept[option.rank - 1], LEAST))
                found.append(_Choice(layer, option, loss, graph.layer_macs(tried)[layer]))
    return found
