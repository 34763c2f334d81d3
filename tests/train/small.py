"""A net, images and recipes with which training takes moments, and how to stop it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autocomp.data.arrays import ArraySplit
from autocomp.data.preprocess import Preprocess
from autocomp.outcome import Event, Step
from autocomp.train import Training, TrainingRecipe, Tuned, finetune

PLAIN = TrainingRecipe(
    epochs=1, batch=16, lr=0.1, momentum=0.0, weight_decay=0.0, warmup=0.0, ema=0.0, clip=1e6, crop=0, flip=0.0
)
"""No part of the recipe but the step itself."""


def net(classes: int = 4, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32, classes)
    ).requires_grad_(False)


def split(count: int = 48, classes: int = 4) -> ArraySplit:
    """Noise, each class brighter in a quarter of its own."""
    draw = np.random.default_rng(0)
    pixels, labels = draw.integers(0, 128, (count, 8, 8, 3)).astype(np.uint8), np.arange(count) % classes
    for image, label in zip(pixels, labels, strict=True):
        row, column = divmod(label % 4, 2)
        image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 60
    return ArraySplit(pixels, labels, np.arange(count), Preprocess((0.3,) * 3, (0.3,) * 3), "content")


@dataclass
class Unnamed:
    """Images that nothing is known of but what they are."""

    inner: ArraySplit

    @property
    def digest(self) -> str:
        return self.inner.digest

    def __len__(self) -> int:
        return len(self.inner)

    def batches(self, size: int) -> Any:
        return self.inner.batches(size)

    def take(self, indices: Any) -> "Unnamed":
        return Unnamed(self.inner.take(indices))


def train(recipe: TrainingRecipe, *, teacher: nn.Module | None = None, images: Any = None, **more: Any) -> Tuned:
    observer = more.pop("observer", lambda event: None)
    return finetune(Training(net(), teacher, images or split(), recipe, **more), observer)


def whole(images: ArraySplit) -> tuple[Tensor, Tensor]:
    ((pixels, labels),) = images.batches(len(images))
    return torch.from_numpy(pixels), torch.from_numpy(labels)


class StopError(Exception):
    pass


def stopping(after: int) -> Callable[[Event], None]:
    steps = 0

    def observer(event: Event) -> None:
        nonlocal steps
        steps += isinstance(event, Step)
        if steps == after:
            raise StopError

    return observer


RECIPE = replace(TrainingRecipe(), epochs=3, batch=10, lr=0.05, crop=1, momentum=0.9)
"""Five steps an epoch, the last of 8 images."""
