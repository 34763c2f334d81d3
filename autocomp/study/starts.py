"""What a search begins with once single choices were measured: their best combinations by an additive model."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest

import numpy as np

from autocomp.controllers import Allocation, frontier, warm_start
from autocomp.errors import CompressError, EngineError
from autocomp.graph import Branch, LayerGraph
from autocomp.outcome import Note, Observer
from autocomp.policy import FP32, Policy
from autocomp.space import PolicySpace
from autocomp.study.ranks import with_ranks
from autocomp.study.run import Run
from autocomp.study.sensitivity import Sensitivity, SensitivityRow
from autocomp.study.sweep import QUICK, obtain
from autocomp.study.trial import Limits
from autocomp.study.workbench import Workbench

__all__ = ["TARGETS", "allocated", "initial_policies", "losses_of", "quick_sensitivity", "starting_points"]

TARGETS = (0.5, 0.7, 0.3, 0.6, 0.8, 0.4, 0.9)
"""Fractions of the MACs, from the middle outwards, so that a short list spans the range."""
SHARES = (0.5, 0.25, 0.75, 0.0)
"""Exponents s: channels go to target**s of the MACs and ranks do the rest; the most promising first."""
UNION_STATES = 256  # trades between the groups of one branch
SMALLEST = 1e-9  # nats, and fractions of variance: what counts as nothing


def quick_sensitivity(bench: Workbench, run: Run, observer: Observer) -> Sensitivity | None:
    """The sensitivity, measured quickly and kept in the run's folder, so that a resumed search begins alike.

    Returns:
        None where it cannot be measured, with a note.
    """
    try:
        return obtain(bench, QUICK, observer, run.folder / "sensitivity.json")
    except (CompressError, EngineError) as error:  # of one choice: in a search it would be a failed trial, not the end
        observer(Note(f"the search begins without the sensitivity of single choices: {error}"))
        return None


def initial_policies(
    bench: Workbench, limits: Limits, sensitivity: Sensitivity | None, observer: Observer, count: int
) -> tuple[Policy, ...]:
    """What a blind controller begins with, ``count`` policies at most; a MACs budget is a target of its own.

    Where the space has ranks, policies that lose channels and ranks are among them: before the others, with all
    `SHARES`, where a MACs budget is asked for, or in turn with the others, one for each of `TARGETS`. Without a
    sensitivity there is only the ladder of `warm_start`.
    """
    if sensitivity is None:
        return warm_start(bench.space, count)
    asked = [b.limit_for(limits.macs) / limits.macs for b in limits.budgets if b.metric == "macs"]
    others = starting_points(bench.space, sensitivity, count, (*asked, *TARGETS))
    ranked = _ranked(bench, sensitivity, observer, asked)
    both = (*ranked, *others) if asked else chain.from_iterable(zip_longest(others, ranked))
    return tuple(dict.fromkeys(policy for policy in both if policy is not None))[:count]


def _ranked(
    bench: Workbench, sensitivity: Sensitivity, observer: Observer, asked: Sequence[float]
) -> tuple[Policy, ...]:
    """Policies with ranks, for what is asked or for `TARGETS`; none where the space has none."""
    found: list[Policy] = []
    for target in (asked or TARGETS) if bench.space.ranks else ():
        tried = (_with_ranks(bench, sensitivity, observer, target, share) for share in SHARES)
        known = (policy for policy in tried if policy is not None)
        found += islice(known, None if asked else 1)
    return tuple(found)


def _with_ranks(
    bench: Workbench, sensitivity: Sensitivity, observer: Observer, target: float, share: float
) -> Policy | None:
    """None where the space does not reach so far, or with a note where the policy cannot be compressed."""
    milder = allocated(bench.space, sensitivity, (target**share,))
    try:
        return with_ranks(bench, milder[0], target) if milder else None
    except CompressError as error:
        observer(Note(f"the search begins without a policy of reduced ranks: {error}"))
        return None


def starting_points(
    space: PolicySpace, sensitivity: Sensitivity, limit: int, targets: Sequence[float] = TARGETS
) -> tuple[Policy, ...]:
    """The policies that `allocated` finds, then those of `warm_start`, each once.

    Args:
        limit: how many at most.
        targets: fractions of the uncompressed model's MACs, the most wanted first.
    """
    dropping = {name: rows[0].divergence for name, rows in sensitivity.of("branch").items()}
    costs = {name: cost for name, cost in dropping.items() if cost is not None}
    ladder = warm_start(space, limit, sorted(costs, key=costs.__getitem__))
    return tuple(dict.fromkeys((*allocated(space, sensitivity, targets), *ladder)))[:limit]


def allocated(space: PolicySpace, sensitivity: Sensitivity, targets: Sequence[float]) -> tuple[Policy, ...]:
    """For each target the policy of least summed divergence among those whose MACs are at most that fraction.

    Divergences are taken to add up over groups and branches, and a knapsack over them gives every trade of
    divergence for MACs at once; the MACs of its policies are counted as they really are. All layers are int8 where
    the space allows it. A target below what the space holds has no policy.
    """
    graph, whole = space.graph, space.graph.macs(Policy())
    integer = next((precision for precision in space.precisions if precision.is_integer), FP32)
    precisions = space.nearest({}, integer).precisions
    decisions = [_union(*parts) for parts in _units(space, sensitivity)]

    def policy(found: Allocation) -> Policy:
        chosen = _merged([d.options[index] for d, index in zip(decisions, found.choices, strict=True)])
        return graph.normalise(Policy(chosen.kept, chosen.dropped, precisions))

    def saved(found: Allocation) -> int:
        return whole - graph.macs(policy(found))

    mildest_first = frontier([d.losses for d in decisions], [d.costs for d in decisions])[::-1]
    places = [bisect_left(mildest_first, (1 - target) * whole, key=saved) for target in targets]
    found = dict.fromkeys(policy(mildest_first[at]) for at in places if at < len(mildest_first))
    return tuple(candidate for candidate in found if space.contains(candidate))


def losses_of(rows: Sequence[SensitivityRow]) -> dict[int, float]:
    """Channels kept -> divergence, for every count of a group; 0 for all of them is left out.

    Counts that were not measured are read off a line through the measured ones, of log divergence over log lost
    output. Before the first and behind the last of these the two are taken to be proportional.

    Returns:
        nothing where the group has no measured count; only the measured ones where no layer reads its channels.
    """
    measured = sorted(
        (row.lost_output, row.divergence) for row in rows if row.divergence is not None and row.lost_output is not None
    )
    found = {row.count: row.divergence for row in rows if row.divergence is not None}
    if measured:
        errors, divergences = np.log(np.maximum(np.array(measured).T, SMALLEST))
        for row in rows:
            if row.divergence is None and row.lost_output is not None:
                at = np.log(max(row.lost_output, SMALLEST))
                outside = at - np.clip(at, errors[0], errors[-1])
                found[row.count] = float(np.exp(np.interp(at, errors, divergences) + outside))
    return found


@dataclass(frozen=True, slots=True)
class _Decision:
    """Policies that exclude each other, with the divergence and the MACs (negative) of each."""

    options: tuple[Policy, ...]
    losses: tuple[float, ...]
    costs: tuple[float, ...]


def _units(space: PolicySpace, sensitivity: Sensitivity) -> list[tuple[list[_Decision], _Decision | None]]:
    """Groups that are chosen for together, with the option that removes all of them where there is one."""
    groups = {name: _pruning(rows) for name, rows in sensitivity.of("channels").items()}
    units: list[tuple[list[_Decision], _Decision | None]] = []
    taken: set[str] = set()
    for name, (row,) in sensitivity.of("branch").items():
        branch = space.graph.branch_by_name[name]
        if row.divergence is None or taken & set(branch.layers):
            continue  # one inside another: the first one, which is the inner one, stands for both
        taken |= set(branch.layers)
        inside = [group for group in groups if _within(space.graph, group, branch)]
        without = _Decision((Policy(dropped=frozenset([name])),), (row.divergence,), (-float(row.macs_saved),))
        units.append(([groups.pop(group) for group in inside], without))
    return [*units, *(([decision], None) for decision in groups.values())]


def _pruning(rows: Sequence[SensitivityRow]) -> _Decision:
    losses = losses_of(rows)
    saved = {row.count: row.macs_saved for row in rows}
    options = (Policy(), *(Policy({rows[0].name: count}) for count in losses))
    return _Decision(options, (0.0, *losses.values()), (0.0, *(-float(saved[count]) for count in losses)))


def _within(graph: LayerGraph, group: str, branch: Branch) -> bool:
    return all(member.parameter.rpartition(".")[0] in branch.layers for member in graph.group_by_name[group].members)


def _union(parts: Sequence[_Decision], without: _Decision | None) -> _Decision:
    """One decision from several: every trade between the parts, and what excludes them all."""
    options, losses, costs = [], [], []
    for found in frontier([part.losses for part in parts], [part.costs for part in parts], UNION_STATES):
        chosen = [part.options[index] for part, index in zip(parts, found.choices, strict=True)]
        options.append(_merged(chosen))
        losses.append(found.loss)
        costs.append(found.cost)
    if without is not None:
        options, losses, costs = [*options, *without.options], [*losses, *without.losses], [*costs, *without.costs]
    return _Decision(tuple(options), tuple(losses), tuple(costs))


def _merged(parts: Sequence[Policy]) -> Policy:
    kept = {name: count for part in parts for name, count in part.kept.items()}
    return Policy(kept, frozenset().union(*(part.dropped for part in parts)))
