"""Weights that grow sparse by whole channels while a model trains, so that pruning it later costs less."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from autocomp.errors import ModelError

__all__ = ["counted", "factors_of", "filled", "filters_of", "slimming", "soften", "state_of"]


def factors_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The factors of its batch norms, one a channel, by the parameters' names."""
    norms = {name: part for name, part in module.named_modules() if isinstance(part, _NormBase)}
    return {f"{name}.weight": part.weight for name, part in norms.items() if isinstance(part.weight, nn.Parameter)}


def filters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of its convolutions, one filter a row, by the parameters' names."""
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    parts = {name: part for name, part in module.named_modules() if isinstance(part, convolutions)}
    return {f"{name}.weight": part.weight for name, part in parts.items() if isinstance(part.weight, nn.Parameter)}


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
            least = _norms(weight).argsort()[: int(rate * len(weight))]
            weight[least] = 0.0


def filled(module: nn.Module, tensors: Mapping[str, NDArray[np.float32]]) -> nn.Module:
    """A copy of a module with these parameters."""
    found = copy.deepcopy(module)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if name in tensors:
                parameter.copy_(torch.from_numpy(tensors[name]))
    return found


def state_of(module: nn.Module) -> dict[str, NDArray[Any]]:
    """Parameters and buffers by name, each with memory of its own."""
    return {name: tensor.detach().numpy().copy() for name, tensor in module.state_dict().items()}


def counted(before: Mapping[str, Tensor], after: Mapping[str, Tensor], part: float) -> tuple[int, int, int]:
    """Rows in all, and how many of them are nothing before and after.

    Args:
        before, after: weights by name, rows first.
        part: of the largest norm that a row of the same weight had before, at or below which it is nothing.
    """
    was, now = ({name: _norms(weight) for name, weight in weights.items()} for weights in (before, after))
    limits = {name: part * norms.max() for name, norms in was.items()}
    nothing = [sum(int((sizes[name] <= limits[name]).sum()) for name in limits) for sizes in (was, now)]
    return sum(map(len, was.values())), nothing[0], nothing[1]


def _norms(weight: Tensor) -> Tensor:
    norms: Tensor = weight.detach().reshape(len(weight), -1).norm(dim=1)
    return norms
