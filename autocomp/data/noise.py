"""Noise in the shape of images, for work on latency alone."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from autocomp.data.splits import CLASSES, Batch, DataOptions, Splits, assemble
from autocomp.errors import DataError
from autocomp.policy import digest_of

__all__ = ["NoiseSplit", "load_noise"]

# Noise says nothing about accuracy: no trial should spend time on more of it.
MOST_IMAGES = 128


@dataclass(frozen=True)
class NoiseSplit:
    """Standard normal images, each made anew from its own seed.

    Attributes:
        count: images.
        shape: (c, h, w).
        seed, stream: together they fix the split.
    """

    count: int
    shape: tuple[int, int, int]
    seed: int
    stream: int

    def __len__(self) -> int:
        return self.count

    @property
    def digest(self) -> str:
        return digest_of(["noise", self.count, self.shape, self.seed, self.stream])

    def batches(self, size: int) -> Iterator[Batch]:
        for start in range(0, self.count, size):
            indices = range(start, min(start + size, self.count))
            images = np.stack([self._image(index) for index in indices])
            yield images, np.zeros(len(indices), np.int64)

    def _image(self, index: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        generator = np.random.default_rng([self.seed, self.stream, index])
        return generator.standard_normal(self.shape, dtype=np.float32)


def load_noise(text: str, options: DataOptions) -> Splits:
    """``3x224x224``, or with a number of classes ``3x32x32x10`` (else 1,000); at most 128 images a split.

    Raises:
        DataError: the text is no shape, or pixels are to be normalised or resized.
    """
    source = f"random:{text}"
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)(?:x([1-9]\d*))?", text)
    if match is None:
        raise DataError(f"{source} is no shape: write random:CxHxW or random:CxHxWxCLASSES, as random:3x224x224")
    if options.mean or options.std or options.size:
        raise DataError(f"{source} is noise of unit variance: leave out mean, std and size")
    shape = (int(match[1]), int(match[2]), int(match[3]))
    counts = (*options.wanted, MOST_IMAGES)
    calibration, search, selection, test = (
        NoiseSplit(min(count, MOST_IMAGES), shape, options.seed, stream) for stream, count in enumerate(counts)
    )
    return assemble(
        calibration,
        search,
        selection,
        test,
        None,
        classes=int(match[4] or CLASSES),
        input_shape=shape,
        from_training=False,
        source=source,
        labelled=False,
    )
