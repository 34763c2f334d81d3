"""Weights that grow sparse by whole channels while a model trains, so that pruning it later costs less."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from autocomp.errors import ModelError

__all__ = ["factors_of", "filters_of", "slimming", "soften"]


def factors_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The factors of its batch norms, one a channel, by the parameters' names."""
    norms = {name: part for name, part in module.named_modules() if isinstance(part, _NormBase)}
    return {f"{name}.weight": part.weight for name, part in norms.items() if isinstance(part.weight, nn.Parameter)}


def filters_of(module: nn.Module) -> tuple[str, ...]:
    """Names of its convolutions' weights, one filter a row."""
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return tuple(f"{name}.weight" for name, part in module.named_modules() if isinstance(part, convolutions))


def slimming(factors: Iterable[Tensor]) -> Tensor:
    """Sum of the magnitudes of all factors (Network Slimming, Liu et al., arXiv:1708.06519, section 3).

    Raises:
        ModelError: there are none.
    """
    sums = [factor.abs().sum() for factor in factors]
    if not sums:
        raise ModelError("the model has no batch norms that could grow sparse: leave --slimming out")
    return torch.stack(sums).sum()


def soften(weights: Iterable[Tensor], rate: float) -> None:
    """Set the filters of least L2 norm to zero, in place; they go on being trained.

    Soft filter pruning (He et al., arXiv:1808.06866, algorithm 1), done after each epoch.

    Args:
        weights: of convolutions, (filters, ...).
        rate: fraction of each one's filters, rounded down.
    """
    with torch.no_grad():
        for weight in weights:
            least = weight.flatten(1).norm(dim=1).argsort()[: int(rate * len(weight))]
            weight[least] = 0.0
