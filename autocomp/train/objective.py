"""What training minimises: errors on labels, and distance from what the uncompressed model says and looks at."""

import copy
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from autocomp.data import Indexed
from autocomp.errors import DataError, ModelError
from autocomp.train.augment import Batch, pixels_of
from autocomp.train.maps import attention_distance, hint_distance, stages, tapped
from autocomp.train.recipe import TrainingRecipe
from autocomp.train.sparse import factors_of, slimming
from autocomp.train.training import Training

__all__ = ["objective"]

CACHE_BYTES = 2**30
"""Logits of all training images above which they are computed batch by batch instead."""

Loss = Callable[[Batch], Tensor]


def objective(student: nn.Module, training: Training) -> Loss:
    """The loss of a batch.

    Args:
        student: what is trained, on the recipe's device.

    Raises:
        ModelError: maps are to be compared, and the models have none in common; or factors are to grow small, and there
            are none.
    """
    recipe = training.recipe
    learnt = _learnt(student, training)
    if recipe.slimming == 0:
        return learnt
    factors = factors_of(student).values()
    return lambda batch: learnt(batch) + recipe.slimming * slimming(factors)


def _learnt(student: nn.Module, training: Training) -> Loss:
    """From labels and teacher."""
    teacher, images, recipe = training.teacher, training.images, training.recipe
    if teacher is None or recipe.distillation == recipe.attention == recipe.hints == 0:
        return lambda batch: _loss(student(batch.images), batch, None, recipe)
    if recipe.device != "cpu":
        teacher = copy.deepcopy(teacher).to(recipe.device)
    if recipe.attention == recipe.hints == 0:
        ask = _answers(teacher, images, recipe)
        return lambda batch: _loss(student(batch.images), batch, ask(batch.images, batch.indices), recipe)
    names = stages(student, teacher, next(pixels_of(images.take(np.arange(1)), 1, recipe.device)))
    own, theirs = tapped(student, names), tapped(teacher, names)
    hinted = [place for place, name in enumerate(names) if name in training.channels or not training.channels]
    if recipe.hints and not hinted:
        raise ModelError("no map has channels that are known from the uncompressed model: leave --hints out")
    left = [training.channels.get(names[place]) for place in hinted]
    channels = [None if rows is None else torch.from_numpy(rows).to(recipe.device) for rows in left]

    def watched(batch: Batch) -> Tensor:
        logits, maps = own(batch.images)
        with torch.no_grad():
            wanted, aims = theirs(_channels_last(batch.images))
        loss = _loss(logits, batch, wanted, recipe)
        if recipe.attention:
            loss = loss + recipe.attention * attention_distance(maps, aims)
        if recipe.hints:
            mine, wished = ([given[place] for place in hinted] for given in (maps, aims))
            loss = loss + recipe.hints * hint_distance(mine, wished, channels)
        return loss

    return watched


def _loss(logits: Tensor, batch: Batch, wanted: Tensor | None, recipe: TrainingRecipe) -> Tensor:
    """Cross-entropy with the labels, and the temperature squared times the divergence from the teacher.

    Args:
        logits: (n, classes).
        wanted: the teacher's logits; None without one.

    Raises:
        DataError: a label is outside of the head.
        ModelError: the teacher's logits are of another shape.
    """
    low, high = int(batch.labels.min()), int(batch.labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise DataError(
            f"labels reach from {low} to {high}, the model has {logits.shape[1]} outputs: choose data or a model that "
            "fit each other"
        )
    hard = F.cross_entropy(logits, batch.labels, label_smoothing=recipe.label_smoothing)
    if batch.share < 1:
        others = F.cross_entropy(logits, batch.others, label_smoothing=recipe.label_smoothing)
        hard = batch.share * hard + (1 - batch.share) * others
    if wanted is None or recipe.distillation == 0:
        return hard
    if wanted.shape != logits.shape:
        raise ModelError(
            f"the teacher gives logits {tuple(wanted.shape)}, the model {tuple(logits.shape)}: distil from a model of "
            "the same classes"
        )
    found, aim = ((values / recipe.temperature).log_softmax(1) for values in (logits, wanted))
    soft = recipe.temperature**2 * F.kl_div(found, aim, reduction="batchmean", log_target=True)
    return (1 - recipe.distillation) * hard + recipe.distillation * soft


def _answers(
    teacher: nn.Module, images: Indexed, recipe: TrainingRecipe
) -> Callable[[Tensor, NDArray[np.int64]], Tensor]:
    """The teacher's logits of images at their places, computed once for all epochs where images do not change.

    A crop of 4 pixels alone has 81 outcomes, of which few come up twice in a training, so nothing is kept then
    (`TrainingRecipe.varies`). One pass in the images' order, so that a training that was stopped gets the same bits.
    """

    @cache
    def table() -> Tensor | None:
        parts: list[Tensor] = []
        for batch in pixels_of(images, recipe.batch, recipe.device):
            parts.append(_logits(teacher, batch))
            if parts[0][0].numel() * parts[0].element_size() * len(images) > CACHE_BYTES:
                return None
        return torch.cat(parts)

    def ask(pixels: Tensor, indices: NDArray[np.int64]) -> Tensor:
        known = None if recipe.varies or recipe.epochs < 2 else table()
        return _logits(teacher, pixels) if known is None else known[torch.from_numpy(indices)]

    return ask


def _logits(teacher: nn.Module, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = teacher(_channels_last(pixels))
    return logits


def _channels_last(pixels: Tensor) -> Tensor:
    """A third faster on a CPU where no gradient follows."""
    return pixels.contiguous(memory_format=torch.channels_last) if pixels.ndim == 4 else pixels
