"""Small networks with every kind of coupling that compression has to follow."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Mixed(nn.Module):
    """Residual blocks with and without a layer in the shortcut, a depthwise block, a concatenation, a flattened map.

    Input (n, 3, 16, 16), output (n, 5).
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.block = Block(8, 10, 12, nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12)), 2)
        self.plain = Block(12, 10, 12, nn.Identity(), 1)
        self.inverted = nn.Sequential(
            nn.Conv2d(12, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(inplace=True),
            nn.Conv2d(16, 16, 3, 2, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6(inplace=True),
            nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8),
        )  # fmt: skip
        self.left, self.right = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 4, 3, padding="same")
        self.joint_bn = nn.BatchNorm2d(10)
        self.last = nn.Conv2d(10, 8, 3, 1, 1)
        self.hidden, self.drop, self.head = nn.Linear(8 * 4 * 4, 20), nn.Dropout(0.5), nn.Linear(20, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_bn(self.stem(x)), inplace=True)
        x = self.inverted(self.plain(self.block(x)))
        x = F.relu(self.joint_bn(torch.cat([self.left(x), self.right(x)], 1)))
        x = torch.flatten(F.relu(self.last(x)), 1)
        return self.head(self.drop(F.relu(self.hidden(x))))


class Block(nn.Module):
    def __init__(self, inputs: int, inner: int, outputs: int, shortcut: nn.Module, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += self.shortcut(x)
        return F.relu(y)


class Chain(nn.Module):
    """Three convolutions with batch norms and a linear head. Input (n, 3, 8, 8), output (n, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, 3, 2, 1), nn.BatchNorm2d(6)
        self.conv3, self.bn3 = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.head(x.mean((2, 3)))


def trained(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, and batch norms with statistics and factors of a kind that training leaves (some negative)."""
    generator, biases = (torch.Generator().manual_seed(seed + offset) for offset in (0, 1000))
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                bound = part.weight[0].numel() ** -0.5
                part.weight.uniform_(-2 * bound, 2 * bound, generator=generator)
                if part.bias is not None:  # what torch draws by itself differs from one process to the next
                    part.bias.uniform_(-bound, bound, generator=biases)
            if isinstance(part, nn.BatchNorm2d):
                part.weight.uniform_(-0.5, 1.5, generator=generator)
                part.bias.normal_(0.0, 0.3, generator=generator)
                part.running_mean.normal_(0.0, 0.2, generator=generator)
                part.running_var.uniform_(0.2, 1.5, generator=generator)
    return module.eval()


def images(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
