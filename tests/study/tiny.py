"""A network and images that a search takes seconds for."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn


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


class Residual(nn.Module):
    """Two residual branches with batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16)
        self.first, self.second = (
            nn.Sequential(
                nn.Conv2d(16, 16, 3, 1, 1),
                nn.BatchNorm2d(16),
                nn.ReLU(),
                nn.Conv2d(16, 16, 3, 1, 1),
                nn.BatchNorm2d(16),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.first(x)).relu()
        x = (x + self.second(x)).relu()
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def images(count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Noise, one quadrant of which is a little brighter: its number is the label."""
    draw = np.random.default_rng(seed)
    pixels, labels = draw.integers(0, 200, (count, 8, 8, 3)).astype(np.uint8), np.arange(count) % 4
    for image, label in zip(pixels, labels, strict=True):
        row, column = divmod(label, 2)
        image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 18
    return pixels, labels
