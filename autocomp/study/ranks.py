"""Ranks for all layers at once, from what each keeps of its outputs."""

from math import log

from autocomp.compress import energies
from autocomp.controllers import allocate
from autocomp.parts import elements, most_rank
from autocomp.policy import Policy, Precision
from autocomp.study.workbench import Workbench

__all__ = ["with_ranks"]

LEAST = 1e-9
"""Share of a variance that counts as nothing."""


def with_ranks(bench: Workbench, policy: Policy, target: float) -> Policy | None:
    """A policy with the ranks that keep most at a fraction of the uncompressed model's MACs.

    Most is the product, over the layers, of the shares of their outputs' variance that are kept (Zhang et al.,
    arXiv:1505.06798, section 3.4, who take them away greedily); a knapsack of the logarithms finds it.

    Args:
        policy: with all layers at full rank.

    Returns:
        None where the lowest ranks still take too many.

    Raises:
        CompressError: the policy cannot be compressed.
    """
    graph, compressed = bench.traced.graph, bench.emitter.compress(policy)
    shapes, macs = graph.parameter_shapes(policy), graph.layer_macs(policy)
    ranks: dict[str, list[Precision]] = {}
    for decision in bench.space.decisions:
        layer = graph.layer_by_name.get(decision.name)
        if decision.kind == "precision" and layer is not None and layer.name in macs:
            full, most = policy.precision(layer.name), most_rank(shapes[layer.weight])
            options = [option for option in decision.options if isinstance(option, Precision)]
            ranks[layer.name] = [o for o in options if o.rank and o.rank <= most and o.full_rank == full]
    ranks = {name: options for name, options in ranks.items() if options}
    shares = energies(bench.traced, bench.statistics, compressed.kept, compressed.tensors, ranks)
    losses, costs = list[list[float]](), list[list[float]]()
    for name, options in ranks.items():
        layer = graph.layer_by_name[name]
        taken = [option.rank for option in options if option.rank]
        losses.append([0.0, *(-log(max(float(shares[name][rank - 1]), LEAST)) for rank in taken)])
        costs.append([float(layer.positions * elements(shapes[layer.weight], rank)) for rank in (None, *taken)])
    others = sum(count for name, count in macs.items() if name not in ranks)
    found = allocate(losses, costs, target * graph.macs(Policy()) - others)
    if found is None:
        return None
    chosen = {name: options[at - 1] for (name, options), at in zip(ranks.items(), found.choices, strict=True) if at}
    return graph.normalise(Policy(policy.kept, policy.dropped, {**policy.precisions, **chosen}))
