"""From pixels to what a model reads."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from autocomp.data.splits import DataOptions
from autocomp.errors import DataError

__all__ = ["IMAGENET", "Preprocess", "preprocess_for"]


@dataclass(frozen=True, slots=True)
class Preprocess:
    """From uint8 pixels to what the model reads.

    Attributes:
        mean, std: per channel, of pixels in [0, 1].
        size: side of the square images made; None leaves them as they are.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int | None = None

    def fit(self, image: Image.Image) -> Image.Image:
        """Resize the shorter side to 8/7 of ``size`` and cut out the middle, as is usual for ImageNet (256 -> 224).

        An image already of that size is used as it is.
        """
        if self.size is None or image.size == (self.size, self.size):
            return image
        width, height = image.size
        scale = self.size * 8 / 7 / min(width, height)
        width, height = max(self.size, round(width * scale)), max(self.size, round(height * scale))
        resized = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        return resized.crop((left, top, left + self.size, top + self.size))

    def normalise(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(n, h, w, c) pixels -> (n, c, h, w) numbers, ``(pixel / 255 - mean) / std``."""
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        scaled = (images.astype(np.float32) / np.float32(255) - mean) / std
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


# Also what the published CIFAR-10 ResNets are usually trained with.
IMAGENET = Preprocess((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def preprocess_for(options: DataOptions, default: Preprocess, channels: int) -> Preprocess:
    """The source's default under the user's options.

    Raises:
        DataError: mean or std have neither one value nor one per channel.
    """
    chosen = {}
    for name, given, usual in (("mean", options.mean, default.mean), ("std", options.std, default.std)):
        values = usual if given is None else given
        if given is None and len(usual) != channels:
            values = (sum(usual) / len(usual),)
        if len(values) not in (1, channels):
            raise DataError(f"{name} has {len(values)} values for images of {channels} channels: give 1 or {channels}")
        chosen[name] = values if len(values) == channels else values * channels
    return Preprocess(chosen["mean"], chosen["std"], options.size or default.size)
