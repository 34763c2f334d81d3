"""Means and variances of the channels of a batch, in torch."""

import torch
from torch import Tensor

__all__ = ["channel_moments"]


def channel_moments(value: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of each channel, (c,) in double precision, and over how many numbers.

    Args:
        value: (n, c, ...), float32.
    """
    flat = value.reshape(*value.shape[:2], -1)  # torch.var_mean over several axes is many times slower
    count = flat.shape[0] * flat.shape[2]
    mean = flat.sum(2).sum(0, dtype=torch.float64) / count
    square = torch.linalg.vector_norm(flat, dim=2).double().square().sum(0) / count
    return mean, (square - mean.square()).clamp_min(0.0), count
