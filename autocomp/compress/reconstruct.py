"""How layers make up for inputs they lose."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autocomp.compress.damping import damped_cholesky
from autocomp.compress.moments import Moments
from autocomp.errors import CompressError
from autocomp.graph import Layer

__all__ = ["least_squares", "reconstruct"]

MOST_GAIN = 2.0  # outputs that the remaining inputs hardly determine would otherwise be mostly noise


def reconstruct(
    layer: Layer, weight: Tensor, bias: Tensor, kept: NDArray[np.int64], moments: Moments, ridge: float
) -> tuple[Tensor, Tensor]:
    """New weight and bias of a layer that loses inputs: `least_squares`, then each output varied as before.

    A prediction varies less than what it predicts, and over many layers the signal fades. So each output is scaled
    around its mean to the variance that the original has on the calibration images, at most doubled. That is what
    recalibrating a batch norm would do, known here from the moments without running the model. Pooled moments do not
    tell the outputs' variance, which is then left as solved.

    Args, raises: see `least_squares`.
    """
    solved, shift = least_squares(layer, weight, bias, kept, moments, ridge)
    if moments.pooled > 1:
        return solved, shift
    stay = _features(weight, kept, moments)
    before, after = weight.flatten(1).double(), solved.flatten(1).double()
    gram = moments.gram.double()
    wanted = ((before @ gram) * before).sum(1)
    given = ((after @ gram[stay][:, stay]) * after).sum(1)
    gain = (wanted / given.clamp_min(torch.finfo(torch.float32).tiny)).sqrt().clamp(1.0, MOST_GAIN)
    shift = shift + ((1 - gain) * (after @ moments.mean[stay])).float()
    return solved * gain.float().reshape(-1, *[1] * (weight.ndim - 1)), shift


def least_squares(
    layer: Layer, weight: Tensor, bias: Tensor, kept: NDArray[np.int64], moments: Moments, ridge: float
) -> tuple[Tensor, Tensor]:
    """New weight and bias of a layer that loses inputs, so that its output changes least.

    Minimises E|W x + b - W' x_K - b'|^2 + a |W' - W_K|^2 over the calibration images in closed form: the removed
    inputs are predicted from the kept ones by ridge regression on centred moments, and the prediction is folded into
    the kept columns and the bias (as in He et al., Channel Pruning, ICCV 2017, section 3.1, step (ii), with a bias).
    Pooled moments predict a removed channel from the kept channels at the same kernel position.

    Args:
        weight: (out, in, *kernel), all input channels (or, of a linear layer, all columns) still there.
        bias: (out,).
        kept: positions on the weight's axis 1 that stay.
        ridge: fraction of the kept inputs' mean variance added to each of them.

    Returns:
        weight of shape (out, kept, *kernel), and bias.

    Raises:
        CompressError: the solve gives no finite weights.
    """
    out, pooled = weight.shape[0], moments.pooled
    stay = _features(weight, kept, moments)
    gone = torch.from_numpy(np.setdiff1d(np.arange(len(moments.mean)), stay.numpy()))
    flat = weight.reshape(out, -1, pooled)
    lost = flat[:, gone].transpose(1, 2).flatten(0, 1)  # (out * pooled, gone)
    dtype = torch.float64 if len(stay) <= 2048 else torch.float32
    target = moments.gram[stay][:, gone].to(dtype) @ lost.T.to(dtype)
    change = torch.cholesky_solve(target, damped_cholesky(moments.gram[stay][:, stay].to(dtype), ridge)).T
    mean = moments.mean.to(dtype)
    shift = (lost.to(dtype) @ mean[gone] - change @ mean[stay]).reshape(out, pooled).sum(1)
    solved = flat[:, stay].to(dtype) + change.reshape(out, pooled, -1).transpose(1, 2)
    if not bool(torch.isfinite(solved).all() & torch.isfinite(shift).all()):
        raise CompressError(
            f"reconstructing {layer.name} gave NaN: raise the recipe's ridge or check the calibration data"
        )
    shape = (out, len(kept), *weight.shape[2:])
    return solved.reshape(shape).float(), (bias.to(dtype) + shift).float()


def _features(weight: Tensor, kept: NDArray[np.int64], moments: Moments) -> Tensor:
    """Features of the moments that belong to kept positions on the weight's axis 1, ascending."""
    per_entry = len(moments.mean) * moments.pooled // weight.shape[1]  # weight columns of one position on axis 1
    columns = (kept[:, None] * per_entry + np.arange(per_entry)).ravel()
    return torch.from_numpy(np.unique(columns // moments.pooled))
