"""In which order the channels of a group go."""

from collections.abc import Mapping

import numpy as np

from autocomp.compress.importance import CRITERIA, Evidence
from autocomp.errors import CompressError
from autocomp.policy import Importance, Policy

__all__ = ["order_channels", "select"]


def order_channels(evidence: Evidence, importance: Importance) -> dict[str, tuple[int, ...]]:
    """Group -> its channels, the most dispensable first; of equals the earlier stays. A policy keeps the last ones.

    Raises:
        CompressError: a criterion gives no finite number for some channel.
    """
    orders = {}
    for group in evidence.traced.graph.groups:
        scores = CRITERIA[importance](group, evidence)
        if not np.isfinite(scores).all():
            raise CompressError(f"the {importance} scores of {group.name} are not finite: choose another importance")
        orders[group.name] = tuple(int(channel) for channel in np.lexsort((-np.arange(len(scores)), scores)))
    return orders


def select(orders: Mapping[str, tuple[int, ...]], policy: Policy) -> dict[str, tuple[int, ...]]:
    """Group -> channels that stay, ascending, for the groups that lose some."""
    return {name: tuple(sorted(orders[name][-count:])) for name, count in policy.kept.items()}
