"""Policies worth trying before a sampler knows anything."""

from collections.abc import Sequence
from itertools import chain, islice

from autocomp.policy import Policy
from autocomp.space import PolicySpace

__all__ = ["checked", "warm_start"]

SHORTENED = 4
"""Branches dropped together, at most, in policies that drop the cheapest ones."""


def warm_start(space: PolicySpace, limit: int, cheapest: Sequence[str] = ()) -> tuple[Policy, ...]:
    """Hand-made policies, the most promising first.

    The uncompressed model; the lowest precision unpruned; then, at the lowest precision, one kept ratio for the
    first third of the groups by depth, for the first two thirds, for all, for the second third and for the last.
    Early groups come first because they run at the highest resolution: they save most time for what they cost.
    The ratios are taken from the middle outwards, so that a short list spans the range. Behind the first ratio
    stand the smallest engines, with every second and with all branches dropped: under a tight budget they may be the
    only ones that hold it, and a sampler then knows which way to go. Then come the policies without the branches that
    are cheapest to lose, one more each time, unpruned and at the middle ratio.

    Args:
        space: what may be proposed; what it does not hold is left out.
        limit: how many at most.
        cheapest: removable branches, the one whose loss costs least first; none where that is not known.
    """
    depth = {layer.name: index for index, layer in enumerate(space.graph.layers)}
    pruned = [decision.name for decision in space.decisions if decision.kind == "channels"]
    groups = sorted(pruned, key=lambda name: depth.get(name, len(depth)))  # stable: the others keep their order
    branches = [decision.name for decision in space.decisions if decision.kind == "branch"]
    first, second = len(groups) // 3, 2 * len(groups) // 3
    spans = (groups[:first], groups[:second], groups, groups[first:second], groups[second:])
    lowest = space.precisions[-1]
    ladder = [
        space.nearest(dict.fromkeys(span, ratio), lowest)
        for ratio in _from_the_middle([ratio for ratio in space.ratios if ratio < 1])
        for span in spans
    ]
    smallest = space.nearest(dict.fromkeys(groups, 0.0), lowest)
    without = [
        space.graph.normalise(Policy(smallest.kept, frozenset(dropped), smallest.precisions))
        for dropped in (branches[1::2], branches)
    ]
    unpruned, middle = space.nearest({}, lowest), ladder[2] if ladder else space.nearest({}, lowest)
    shortened = [
        space.graph.normalise(Policy(policy.kept, frozenset(cheapest[:count]), policy.precisions))
        for count in range(1, 1 + min(SHORTENED, len(cheapest)))
        for policy in dict.fromkeys((unpruned, middle))
    ]
    policies = chain(
        (Policy(), unpruned, space.narrowest(unpruned)), ladder[: len(spans)], without, shortened, ladder[len(spans) :]
    )
    return tuple(islice(dict.fromkeys(policy for policy in policies if space.contains(policy)), limit))


def checked(space: PolicySpace, policies: Sequence[Policy]) -> tuple[Policy, ...]:
    """The policies normalised, each once.

    Raises:
        SpaceError: one lies outside the space.
    """
    return tuple(dict.fromkeys(space.decode(space.encode(policy)) for policy in policies))


def _from_the_middle(ratios: Sequence[float]) -> list[float]:
    """Breadth first over halved ranges: of 7 the 4th, then the 2nd and the 6th, then the rest."""
    ordered: list[float] = []
    ranges = [ratios]
    while ranges:
        middles = [(part, len(part) // 2) for part in ranges if part]
        ordered += [part[middle] for part, middle in middles]
        ranges = [half for part, middle in middles for half in (part[:middle], part[middle + 1 :])]
    return ordered
