"""numpy in, numpy out: what rooms without torch use."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocomp.compress.surgery import run

__all__ = ["arrays_of", "as_rows", "logits_of", "to_tensor"]


def to_tensor(images: NDArray[np.float32]) -> Tensor:
    """Images (n, c, h, w) for `trace`, `collect` and `compress`."""
    return torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))


def logits_of(module: nn.Module, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits (n, classes) that torch computes for images (n, c, h, w)."""
    return np.asarray(run(module, to_tensor(images)).numpy(), dtype=np.float32)


def arrays_of(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[np.float32]]:
    """The floating-point ones among named tensors, sharing their memory."""
    return {name: tensor.numpy() for name, tensor in tensors.items() if tensor.is_floating_point()}


def as_rows(images: Tensor | Mapping[str, Tensor]) -> Tensor:
    """What a traced module reads: images (n, ...), or several inputs as rows (n, numbers)."""
    if isinstance(images, Tensor):
        return images
    return torch.cat([value.flatten(1) for value in images.values()], 1)
