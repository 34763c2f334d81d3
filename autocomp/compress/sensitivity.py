"""What removing a branch costs, measured before the search."""

from torch import Tensor

from autocomp.compress.recalibrate import divergence
from autocomp.compress.statistics import Statistics
from autocomp.compress.surgery import rebuild, run, tensors_of
from autocomp.compress.tracing import Traced

__all__ = ["branch_costs"]

IMAGES = 64
"""Calibration images behind each cost: the order of the branches is what counts."""


def branch_costs(traced: Traced, statistics: Statistics, images: Tensor) -> dict[str, float]:
    """KL divergence, in nats, from the uncompressed model's outputs when one branch alone is removed.

    Args:
        images: the calibration images (n, c, h, w) that ``statistics`` come from; the first 64 are used.

    Returns:
        branch name -> divergence, one forward pass each.
    """
    some, reference = images[:IMAGES], statistics.logits[:IMAGES]
    tensors = tensors_of(traced.module)
    return {
        branch.name: divergence(reference, run(rebuild(traced.module, traced.graph, tensors, [branch]), some))
        for branch in traced.graph.branches
    }
