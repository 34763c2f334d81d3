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
    graph = bench.traced.graph
    whole = bench.emitter.compress(Policy(policy.kept, policy.dropped))  # float weights are all that is read
    shapes, macs = graph.parameter_shapes(policy), graph.layer_macs(policy)
    ranks: dict[str, dict[int, Precision]] = {}
    for decision in bench.space.decisions:
        if decision.kind == "precision" and (name := decision.name) in macs:
            full, most = policy.precision(name), most_rank(shapes[graph.layer_by_name[name].weight])
            options = [option for option in decision.options if isinstance(option, Precision)]
            found = {o.rank: o for o in options if o.rank and o.rank <= most and o.full_rank == full}
            if found:
                ranks[name] = found
    shares = energies(bench.traced, bench.statistics, whole.kept, whole.tensors, ranks)
    losses = [
        [0.0, *(-log(max(float(shares[name][rank - 1]), LEAST)) for rank in found)] for name, found in ranks.items()
    ]
    costs = [
        [float(layer.positions * elements(shapes[layer.weight], rank)) for rank in (None, *ranks[layer.name])]
        for layer in map(graph.layer_by_name.__getitem__, ranks)
    ]
    others = sum(count for name, count in macs.items() if name not in ranks)
    best = allocate(losses, costs, target * graph.macs(Policy()) - others)
    if best is None:
        return None
    choices = zip(ranks.items(), best.choices, strict=True)
    chosen = {name: [*found.values()][at - 1] for (name, found), at in choices if at}
    return graph.normalise(Policy(policy.kept, policy.dropped, {**policy.precisions, **chosen}))
