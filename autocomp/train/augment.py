"""Random crops and flips."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["augmented"]


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
