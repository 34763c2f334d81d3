"""``tests.tiny:model`` and ``tests.tiny:data``, with which a whole search takes seconds."""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.compress.nets import Block, trained

CLASSES = 3


class Tiny(nn.Module):
    """Two residual blocks, one of which can be dropped. Input (n, 3, 12, 12), output (n, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        shortcut = nn.Sequential(nn.Conv2d(16, 24, 1, 2, bias=False), nn.BatchNorm2d(24))
        self.blocks = nn.Sequential(Block(16, 16, 16, nn.Identity(), 1), Block(16, 24, 24, shortcut, 2))
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(torch.relu(self.bn1(self.conv1(x)))).mean((2, 3)))
        return logits


def images(count: int, seed: int) -> Tensor:
    """(count, 3, 12, 12): noise of as many colours as there are images."""
    generator = torch.Generator().manual_seed(seed)
    colour = torch.randn(count, 3, 1, 1, generator=generator)
    return colour + 0.5 * torch.randn(count, 3, 12, 12, generator=generator)


def model() -> nn.Module:
    """Equal on every call, in eval mode; its logits are centred, so that all classes occur."""
    net = trained(Tiny()).eval()
    with torch.no_grad():
        net.head.bias -= net(images(500, 1)).mean(0)  # type: ignore[operator, union-attr]
    return net


def data() -> tuple[TensorDataset, TensorDataset]:
    """Training and test images, with the classes that the model gives them."""
    found = []
    for seed in (2, 3):
        batch = images(800, seed)
        with torch.no_grad():
            found.append(TensorDataset(batch, model()(batch).argmax(1)))
    train, test = found
    return train, test
