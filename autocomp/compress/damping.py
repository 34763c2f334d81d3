"""Cholesky factors of second moments that may be singular."""

import torch
from torch import Tensor

__all__ = ["damped", "damped_cholesky"]

GROWTH = (0.0, 1e-6, 1e-4, 1e-2)  # beside the ridge: the first that rounding leaves with a factor


def damped_cholesky(gram: Tensor, ridge: float) -> Tensor:
    """Lower factors of G + aI, see `damped`."""
    return damped(gram, ridge)[0]


def damped(gram: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Lower factors of G + aI, with a raised above the ridge where rounding leaves the sum without one.

    Args:
        gram: second moments G, (..., features, features).
        ridge: a as a fraction of the mean of G's diagonal; of 1 where all features are constant.

    Returns:
        factors of the shape of ``gram``, NaN where G is not finite, or far from a second moment; and a, (..., 1).
    """
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    for growth in GROWTH:
        added = (ridge + growth) * scale
        total = gram.clone()
        total.diagonal(dim1=-2, dim2=-1).add_(added)
        factor, failed = torch.linalg.cholesky_ex(total)
        if not bool(failed.any()):
            return factor, added
    return torch.full_like(gram, torch.nan), torch.full_like(scale, torch.nan)
