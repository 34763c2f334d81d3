"""What training minimises: errors on labels, and distance from what the uncompressed model says."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from autocomp.data import Indexed
from autocomp.errors import DataError, ModelError
from autocomp.train.recipe import TrainingRecipe

__all__ = ["Answers", "answers", "loss_of"]

Indices = NDArray[np.int64]
Answers = Callable[[Tensor, Indices], Tensor]
"""Images (n, c, h, w) and their places in the training images -> the teacher's logits (n, classes)."""
CACHE_BYTES = 2**30
"""Logits of all training images above which they are computed batch by batch instead."""


def answers(teacher: nn.Module, images: Indexed, recipe: TrainingRecipe) -> Answers:
    """The teacher's logits, computed once for all epochs where an image is the same in each of them.

    That is where nothing is drawn at random (`TrainingRecipe.varies`): a crop of 4 pixels alone has 81 outcomes, of
    which few come up twice in a training. One pass in the images' order, so that a training that was stopped gets the
    same bits.
    """
    if recipe.varies or recipe.epochs < 2:
        return lambda pixels, _: _logits(teacher, pixels)
    parts: list[Tensor] = []
    for pixels, _ in images.batches(recipe.batch):
        parts.append(_logits(teacher, torch.from_numpy(pixels)))
        if parts[0].numel() // len(parts[0]) * len(images) * parts[0].element_size() > CACHE_BYTES:
            return lambda pixels, _: _logits(teacher, pixels)
    table = torch.cat(parts)
    return lambda _, indices: table[torch.from_numpy(indices)]


def loss_of(logits: Tensor, labels: Tensor, wanted: Tensor | None, recipe: TrainingRecipe) -> Tensor:
    """Cross-entropy with the labels, and the temperature squared times the divergence from the teacher.

    Args:
        logits: (n, classes).
        labels: (n,).
        wanted: the teacher's logits; None without one.

    Raises:
        DataError: a label is outside of the head.
        ModelError: the teacher's logits are of another shape.
    """
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise DataError(
            f"labels reach from {int(labels.min())} to {int(labels.max())}, the model has {logits.shape[1]} outputs: "
            "choose data or a model that fit each other"
        )
    hard = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
    if wanted is None:
        return hard
    if wanted.shape != logits.shape:
        raise ModelError(
            f"the teacher gives logits {tuple(wanted.shape)}, the model {tuple(logits.shape)}: distil from a model of "
            "the same classes"
        )
    found, aim = ((values / recipe.temperature).log_softmax(1) for values in (logits, wanted))
    soft = recipe.temperature**2 * F.kl_div(found, aim, reduction="batchmean", log_target=True)
    return (1 - recipe.distillation) * hard + recipe.distillation * soft


def _logits(teacher: nn.Module, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = teacher(pixels)
    return logits
