"""How layers make up for inputs they lose."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autocomp.compress.damping import damped
from autocomp.compress.moments import Moments
from autocomp.errors import CompressError
from autocomp.graph import Layer

__all__ = ["cross_moments", "features_of", "least_squares", "reconstruct"]

LARGE = 1024  # features from which single precision does
AT_ONCE = 2**20  # numbers of a weight whose outputs are solved together: more would leave the caches
MOST_GAIN = 2.0  # outputs that the remaining inputs hardly determine would otherwise be mostly noise


def cross_moments(weight: Tensor, moments: Moments) -> Tensor:
    """Second moments of a layer's outputs with its inputs: W G, of which every policy's solve takes some columns.

    Args:
        weight: (out, in, *kernel) of the unpruned layer.
        moments: not pooled.

    Returns:
        (out, features); float64, or float32 where there are many features.
    """
    dtype = _dtype(len(moments.mean))
    return weight.flatten(1).to(dtype) @ moments.gram.to(dtype)


def reconstruct(
    layer: Layer,
    weight: Tensor,
    bias: Tensor,
    kept: NDArray[np.int64],
    moments: Moments,
    ridge: float,
    cross: Tensor | None = None,
    rows: NDArray[np.int64] | None = None,
) -> tuple[Tensor, Tensor]:
    """New weight and bias of a layer that loses inputs: `least_squares`, then each output varied as before.

    A prediction varies less than what it predicts, and over many layers the signal fades. So each output is scaled
    around its mean to the variance that the original has on the calibration images, at most doubled. That is what
    recalibrating a batch norm would do, known here from the moments without running the model. Pooled moments do not
    tell the outputs' variance, which is then left as solved.

    Args, raises: see `least_squares`.
    """
    solved = _solve(layer, weight, bias, kept, moments, ridge, cross, rows)
    if solved.wanted is None or solved.given is None:
        return solved.weight, solved.bias
    gain = (solved.wanted / solved.given.clamp_min(torch.finfo(torch.float32).tiny)).sqrt().clamp(1.0, MOST_GAIN)
    stay = features_of(weight.shape[1], kept, moments)
    mean = solved.weight.flatten(1).double() @ moments.mean[stay]
    shift = solved.bias + ((1 - gain) * mean).float()
    return solved.weight * gain.float().reshape(-1, *[1] * (weight.ndim - 1)), shift


def least_squares(
    layer: Layer,
    weight: Tensor,
    bias: Tensor,
    kept: NDArray[np.int64],
    moments: Moments,
    ridge: float,
    cross: Tensor | None = None,
    rows: NDArray[np.int64] | None = None,
) -> tuple[Tensor, Tensor]:
    """New weight and bias of a layer that loses inputs, so that its output changes least.

    Minimises E|W x + b - W' x_K - b'|^2 + a |W' - W_K|^2 over the calibration images in closed form: the removed
    inputs are predicted from the kept ones by ridge regression on centred moments, and the prediction is folded into
    the kept columns and the bias (as in He et al., Channel Pruning, ICCV 2017, section 3.1, step (ii), with a bias).
    The normal equations are W' (G_KK + aI) = (W G)_K + a W_K, so that beside W G, the same for every policy, only
    one factor is needed. Pooled moments predict a removed channel from the kept ones at the same kernel position.

    Args:
        weight: (out, in, *kernel), all input channels (or, of a linear layer, all columns) still there.
        bias: (out,).
        kept: positions on the weight's axis 1 that stay.
        ridge: fraction of the kept inputs' mean variance added to each of them.
        cross: `cross_moments` of the weight; computed where it is not given.
        rows: outputs that stay; all of them where it is not given.

    Returns:
        weight of shape (rows, kept, *kernel), and bias.

    Raises:
        CompressError: the solve gives no finite weights.
    """
    solved = _solve(layer, weight, bias, kept, moments, ridge, cross, rows)
    return solved.weight, solved.bias


class _Solved(NamedTuple):
    """A solution, and what the original outputs and its own vary by, (out,), float64; None where moments are pooled."""

    weight: Tensor
    bias: Tensor
    wanted: Tensor | None = None
    given: Tensor | None = None


def _solve(
    layer: Layer,
    weight: Tensor,
    bias: Tensor,
    kept: NDArray[np.int64],
    moments: Moments,
    ridge: float,
    cross: Tensor | None,
    rows: NDArray[np.int64] | None,
) -> _Solved:
    stay = features_of(weight.shape[1], kept, moments)
    dtype = _dtype(len(stay))
    factor, added = damped(moments.gram[stay][:, stay].to(dtype), ridge)
    size = max(1, AT_ONCE // weight[0].numel())

    def few(tensor: Tensor) -> Iterator[Tensor]:
        if rows is None:
            return iter(torch.split(tensor, size))
        return (tensor[part] for part in torch.split(torch.from_numpy(rows), size))

    parts: list[tuple[Tensor, ...]]
    if moments.pooled > 1:
        gone = torch.from_numpy(np.setdiff1d(np.arange(len(moments.mean)), stay))
        predictor = torch.cholesky_solve(moments.gram[stay][:, gone].to(dtype), factor)
        parts = [_folded(*given, stay, gone, moments, predictor) for given in zip(few(weight), few(bias), strict=True)]
    else:
        cross = cross_moments(weight, moments) if cross is None else cross
        several = zip(few(weight), few(bias), few(cross), strict=True)
        parts = [_rows(*given, stay, moments, factor, added) for given in several]
    solved = _Solved(*(parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))))
    if not bool(torch.isfinite(solved.weight).all() & torch.isfinite(solved.bias).all()):
        raise CompressError(
            f"reconstructing {layer.name} gave NaN: raise the recipe's ridge or check the calibration data"
        )
    return solved


def _rows(
    weight: Tensor, bias: Tensor, cross: Tensor, stay: Tensor, moments: Moments, factor: Tensor, added: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Some outputs' weight and bias, and what they varied and vary by.

    Args:
        factor, added: of the second moments of the features that ``stay``, in the precision of the solve.
    """
    mean, flat = moments.mean.to(factor.dtype), weight.flatten(1)
    before, target = flat[:, stay].to(factor.dtype), cross[:, stay].to(factor.dtype)
    after = torch.cholesky_solve((target + added * before).T, factor).T
    shift = flat.to(factor.dtype) @ mean - after @ mean[stay]
    wanted = (flat * cross).sum(1, dtype=torch.float64)
    given = (after * (target + added * (before - after))).sum(1, dtype=torch.float64)
    solved = after.reshape(len(weight), -1, *weight.shape[2:]).float()
    return solved, (bias.to(factor.dtype) + shift).float(), wanted, given


def _folded(
    weight: Tensor, bias: Tensor, stay: Tensor, gone: Tensor, moments: Moments, predictor: Tensor
) -> tuple[Tensor, Tensor]:
    """Some outputs' weight and bias where one prediction serves every kernel position: it has far fewer numbers than
    the weight, so that it is solved for first and folded in by a product.

    Args:
        predictor: (stay, gone), of the removed features from those that ``stay``.
    """
    mean, flat = moments.mean.to(predictor.dtype), weight.reshape(len(weight), -1, moments.pooled)
    lost = flat[:, gone].transpose(1, 2)
    solved = flat[:, stay] + (lost @ predictor.T.to(weight.dtype)).transpose(1, 2)
    shift = lost.sum(1, dtype=predictor.dtype) @ (mean[gone] - predictor.T @ mean[stay])
    shape = len(weight), -1, *weight.shape[2:]
    return solved.reshape(shape), (bias.to(predictor.dtype) + shift).float()


def _dtype(features: int) -> torch.dtype:
    """What so many unknowns are solved in: double precision takes twice the time, which large layers feel."""
    return torch.float64 if features <= LARGE else torch.float32


def features_of(positions: int, kept: NDArray[np.int64], moments: Moments) -> Tensor:
    """Features of the moments that belong to kept positions of those on a weight's axis 1, ascending."""
    per_entry = len(moments.mean) * moments.pooled // positions  # weight columns of one position on axis 1
    columns = (kept[:, None] * per_entry + np.arange(per_entry)).ravel()
    return torch.from_numpy(np.unique(columns // moments.pooled))
