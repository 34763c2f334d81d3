"""Your own model and data, as the command line takes them.

Train it, a minute on one core, and compress it, from the folder above this one::

    python examples/own_model.py own_model.safetensors
    autocomp search --model examples.own_model:model --weights own_model.safetensors \
        --data examples.own_model:data --budget 0.5x
"""

import sys

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def model() -> nn.Module:
    """What ``--model`` names: a function without arguments; ``--weights`` fills the module."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, 32),
        *block(32, 32),
        nn.MaxPool2d(2),
        *block(32, 64),
        *block(64, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def data() -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """What ``--data`` names: (train, validation, test) of (image, label), images normalised as in training."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)
    images = (F.interpolate(images, size=16, mode="bilinear") - 0.3) / 0.33
    labels = torch.from_numpy(digits.target).long()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    train, validation, test = (TensorDataset(images[part], labels[part]) for part in order.split([900, 400, 497]))
    return train, validation, test


def main(path: str, epochs: int = 12) -> None:
    torch.manual_seed(0)
    network, (train, _, test) = model(), data()
    batches = DataLoader(train, batch_size=64, shuffle=True)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=epochs * len(batches))
    for _ in range(epochs):
        for images, labels in batches:
            loss = F.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()
    images, labels = test.tensors
    with torch.inference_mode():
        accuracy = (network(images).argmax(1) == labels).float().mean().item()
    save_file(network.state_dict(), path)
    print(f"{path}: {100 * accuracy:.2f} % on {len(labels)} test images")


if __name__ == "__main__":
    main(sys.argv[1])
