"""What a training is given, and what comes of it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from autocomp.data import Indexed
from autocomp.outcome import Observer
from autocomp.parts import Layer
from autocomp.train.recipe import TrainingRecipe

__all__ = ["Trainer", "Training", "Tuned"]


@dataclass(frozen=True)
class Training:
    """A module to be trained.

    Attributes:
        module: maps (n, c, h, w) to logits (n, classes); without dropout.
        teacher: gives logits of the same classes; None to learn from labels alone.
        images: to train on.
        recipe: how.
        checkpoint: file of the state, which a stopped training goes on from; None to keep none.
        until: epochs of the recipe's after which to stop for now; None for all of them.
        channels: value -> those of the teacher's channels there that the module has; empty where it has all of them
            everywhere.
        norms: layers of the module that a batch norm was folded into.
    """

    module: nn.Module
    teacher: nn.Module | None
    images: Indexed
    recipe: TrainingRecipe
    checkpoint: Path | None = None
    until: int | None = None
    channels: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    norms: Collection[Layer] = ()

    @property
    def epochs(self) -> int:
        """After which it stops."""
        return self.recipe.epochs if self.until is None else min(self.until, self.recipe.epochs)


@dataclass(frozen=True)
class Tuned:
    """A trained model.

    Attributes:
        tensors: parameter -> its average over the last steps.
        losses: mean training loss of each epoch.
        recipe: by which it was trained.
    """

    tensors: Mapping[str, NDArray[np.float32]]
    losses: tuple[float, ...]
    recipe: TrainingRecipe


class Trainer(Protocol):
    """What `autocomp.train.finetune` does, wherever it is done."""

    def __call__(self, training: Training, observer: Observer) -> Tuned: ...
