"""Training images as tensors, and their random changes: crops, flips, RandAugment and mixup."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from autocomp.data import Split
from autocomp.data.preprocess import Preprocess

__all__ = ["Batch", "augmented", "mixed", "pixels_of", "randomised"]


@dataclass(frozen=True)
class Batch:
    """What one step learns from.

    Attributes:
        images: (n, c, h, w).
        labels: (n,).
        indices: (n,) places in the training images.
        others: (n,) labels of the images that were mixed in.
        share: of each image itself, beside the one mixed in.
    """

    images: Tensor
    labels: Tensor
    indices: NDArray[np.int64]
    others: Tensor
    share: float = 1.0

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        images, labels, others = (tensor.to(device) for tensor in (self.images, self.labels, self.others))
        return replace(self, images=images, labels=labels, others=others)


def pixels_of(images: Split, size: int, device: torch.device | str) -> Iterator[Tensor]:
    """Batches of images as they are, (size, c, h, w) each but for the rest."""
    return (torch.from_numpy(batch).to(device) for batch, _ in images.batches(size))


def augmented(images: Tensor, crop: int, flip: float, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to ``crop`` pixels, zeros moving in, and mirrored with probability ``flip``.

    He et al. (arXiv:1512.03385, section 4.2) train on CIFAR-10 so, with 4 pixels.

    Args:
        images: (n, c, h, w); rows (n, numbers) of several inputs can neither be shifted nor mirrored.
    """
    count = len(images)
    if crop:
        _, _, height, width = images.shape
        top, left = torch.randint(2 * crop + 1, (2, count, 1), generator=generator)
        padded = F.pad(images, (crop,) * 4)
        rows, columns = top + torch.arange(height), left + torch.arange(width)
        index = torch.arange(count)[:, None, None]
        images = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if flip:
        mirrored = torch.rand(count, generator=generator) < flip
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images.contiguous()


def randomised(images: Tensor, preprocess: Preprocess, magnitude: int, seed: int) -> Tensor:
    """Two random changes of colour or shape to each image (RandAugment, Cubuk et al., arXiv:1909.13719).

    Args:
        images: (n, c, h, w), normalised as ``preprocess`` says, c of 1 or 3.
        magnitude: of each change, from 0 to 30.
        seed: of the draws; torchvision has no generator of its own, so the process's is put back afterwards.
    """
    from torchvision.transforms.v2 import RandAugment  # slow to import

    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocess.mean, preprocess.std))
    pixels = ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    change = RandAugment(num_ops=2, magnitude=magnitude)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        changed = torch.stack([change(image) for image in pixels])
    return (changed.float() / 255 - mean) / std


def mixed(batch: Batch, alpha: float, seed: int) -> Batch:
    """Each image averaged with another one of the batch (mixup, Zhang et al., arXiv:1710.09412, section 2).

    Args:
        alpha: of the Beta distribution that the share is drawn from, one a batch as in the authors' code.
    """
    draw = np.random.default_rng(seed)
    share, partner = float(draw.beta(alpha, alpha)), torch.from_numpy(draw.permutation(len(batch.labels)))
    images = share * batch.images + (1 - share) * batch.images[partner]
    return replace(batch, images=images, others=batch.labels[partner], share=share)
