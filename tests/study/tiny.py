"""A network and images that a search takes seconds for."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn


def model() -> nn.Module:
    """For 3x8x8 images of four classes."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4)
    )


def normed() -> nn.Module:
    """The same with batch norms."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.BatchNorm2d(16),
        nn.ReLU(), nn.Flatten(), nn.Linear(256, 4),
    )  # fmt: skip


def images(count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Noise, one quadrant of which is a little brighter: its number is the label."""
    draw = np.random.default_rng(seed)
    pixels, labels = draw.integers(0, 200, (count, 8, 8, 3)).astype(np.uint8), np.arange(count) % 4
    for image, label in zip(pixels, labels, strict=True):
        row, column = divmod(label, 2)
        image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 18
    return pixels, labels


def saved(path: Path, training: int, test: int) -> Path:
    """So many images of each part, as ``--data npz:`` takes them."""
    (x_train, y_train), (x_test, y_test) = images(training, 0), images(test, 1)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path
