"""Models whose forward() does what tracers stumble over, as users bring them: images (n, 3, 16, 16), 4 classes."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["causal", "tower", "twice", "unshuffled"]


class Twice(nn.Module):
    """A convolution and its batch norm used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm, self.wide, self.last = nn.BatchNorm2d(8), nn.Conv2d(8, 32, 1), nn.Conv2d(32, 16, 1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for _ in range(2):
            x = F.relu(self.norm(self.conv(x)))
        return self.head(F.relu(self.last(F.relu(self.wide(x)))).mean((2, 3)))


class Tower(nn.Module):
    """One convolution with its batch norm over two levels of features, as detectors' heads have it."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.stem = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 16, 3, 2, padding=1)
        self.tower = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.head = nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        fine = F.relu(self.stem(F.relu(self.wide(x))))
        levels = (fine, F.relu(self.down(fine)))
        return self.head(torch.cat([self.tower(level).mean((2, 3)) for level in levels], 1))


class Unshuffled(nn.Module):
    """Blocks of positions turned into channels behind channels that can be pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.fold, self.third, self.head = nn.PixelUnshuffle(2), nn.Conv2d(128, 32, 3, padding=1), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fold(F.relu(self.second(F.relu(self.first(x)))))
        return self.head(F.relu(self.third(x)).mean((2, 3)))


class Causal(nn.Module):
    """Attention behind a mask of minus infinity."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 48), nn.Linear(16, 16)
        self.grow, self.shrink, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)
        self.register_buffer("mask", torch.triu(torch.ones(16, 16, dtype=torch.bool), 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        query, key, value = self.qkv(x).chunk(3, -1)
        scores = (query @ key.transpose(1, 2) / 4).masked_fill(self.mask, float("-inf"))
        x = x + self.out(scores.softmax(-1) @ value)
        return self.head((x + self.shrink(F.gelu(self.grow(x)))).mean(1))


def _seeded(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = kind()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return model.eval()


def twice() -> nn.Module:
    return _seeded(Twice)


def tower() -> nn.Module:
    return _seeded(Tower)


def unshuffled() -> nn.Module:
    return _seeded(Unshuffled)


def causal() -> nn.Module:
    return _seeded(Causal)
