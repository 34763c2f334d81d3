"""What every data source becomes: disjoint splits that yield normalised batches."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from autocomp.errors import DataError
from autocomp.policy import digest_of
from autocomp.rows import Inputs, row_shape

__all__ = [
    "CLASSES",
    "Batch",
    "DataOptions",
    "Draws",
    "Indexed",
    "Split",
    "Splits",
    "assemble",
    "draw",
    "hash_arrays",
    "permutation",
]

Batch = tuple[NDArray[np.float32], NDArray[np.int64]]

CLASSES = 1000
"""Of data without labels: as many as ImageNet's, which models that are built for the data then have."""
# Fewer images tell nothing about a model.
SMALLEST_PART = 32


@runtime_checkable
class Split(Protocol):
    """Images with labels, read as often as needed and each time alike."""

    def __len__(self) -> int: ...

    @property
    def digest(self) -> str:
        """SHA-256 of what the split holds and of how it is preprocessed."""
        ...

    def batches(self, size: int) -> Iterator[Batch]:
        """Yield images (n, c, h, w), float32 and normalised, with labels (n,), int64; n is ``size`` but for the rest.

        Images are read and converted batch by batch. Where a model has several inputs, an image is a row of them.

        Raises:
            DataError: an image cannot be read, or holds NaN.
        """
        ...


@runtime_checkable
class Indexed(Split, Protocol):
    """A split whose images can be read in any order, as training does."""

    def take(self, indices: NDArray[np.int64]) -> Split:
        """The images at ``indices`` (n,), in their order."""
        ...


@dataclass(frozen=True)
class Splits:
    """Disjoint splits of one source; only ``train`` may share images with ``calibration``.

    Attributes:
        calibration: for statistics and ranges. Drawn from training images.
        search: scores trials.
        selection: scores finalists.
        test: read once, at the end.
        train: for fine-tuning; None where the source has none.
        classes: labels lie in [0, classes).
        input_shape: (c, h, w) of one image, (numbers,) of a row of several inputs.
        labelled: False where labels mean nothing (noise).
        from_training: ``search`` and ``selection`` come from images the model may have been trained on, so
            accuracy on them does not compare with accuracy on ``test``.
        source: what the user asked for.
        digest: SHA-256 over the splits' digests.
        inputs: name -> shape of each of several inputs that a row holds; empty for images alone.
    """

    calibration: Split
    search: Split
    selection: Split
    test: Split
    train: Split | None
    classes: int
    input_shape: tuple[int, ...]
    labelled: bool
    from_training: bool
    source: str
    digest: str
    inputs: Inputs = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("calibration", "search", "selection", "test"):
            if len(getattr(self, name)) == 0:
                raise DataError(f"{self.source}: the {name} split is empty: give it at least one image")
        if self.classes < 2:
            raise DataError(f"{self.source}: {self.classes} class leaves nothing to tell apart: give at least 2")
        if self.inputs and self.input_shape != row_shape(self.inputs):
            raise DataError(f"{self.source}: rows of shape {self.input_shape} do not hold inputs {dict(self.inputs)}")
        if not self.inputs and (len(self.input_shape) != 3 or min(self.input_shape) < 1):
            raise DataError(f"{self.source}: images of shape {self.input_shape} are not (channels, height, width)")


@dataclass(frozen=True, slots=True)
class DataOptions:
    """How to read a source.

    Attributes:
        mean, std: per channel, of pixels in [0, 1]; None for the source's default.
        size: height and width of the images in pixels; None for the source's default.
        calibration, search, selection: images wanted in each split.
        seed: of the draws.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: int | None = None
    calibration: int = 1024
    search: int = 2048
    selection: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("calibration", "search", "selection", "size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"{name} must be at least 1, not {value}")
        if self.mean is not None and not all(isfinite(value) for value in self.mean):
            raise DataError(f"mean must be finite numbers, not {self.mean}")
        if self.std is not None and not all(isfinite(value) and value > 0 for value in self.std):
            raise DataError(f"std must be positive numbers, not {self.std}")
        if not 0 <= self.seed < 2**32:
            raise DataError(f"seed must lie in [0, 2^32), not {self.seed}")

    @property
    def wanted(self) -> tuple[int, int, int]:
        return self.calibration, self.search, self.selection


def assemble(
    calibration: Split,
    search: Split,
    selection: Split,
    test: Split,
    train: Split | None,
    *,
    classes: int,
    input_shape: tuple[int, ...],
    from_training: bool,
    source: str,
    labelled: bool = True,
    inputs: Inputs | None = None,
) -> Splits:
    """`Splits` with the digest of its parts."""
    parts = [calibration, search, selection, test, *([] if train is None else [train])]
    digest = digest_of([part.digest for part in parts])
    shapes = (classes, input_shape, labelled, from_training)
    return Splits(calibration, search, selection, test, train, *shapes, source, digest, inputs or {})


def permutation(count: int, seed: int) -> NDArray[np.int64]:
    """A shuffle of ``range(count)``; numpy froze this generator's stream, so it is the same in every version."""
    return np.random.RandomState(seed).permutation(count).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Draws:
    """Indices of disjoint random draws.

    Attributes:
        parts: in the order they were asked for.
        rest: what was not drawn.
    """

    parts: tuple[NDArray[np.int64], ...]
    rest: NDArray[np.int64]

    @property
    def train(self) -> NDArray[np.int64]:
        """The first part, for calibration, and the rest: what is not held out from training, in order."""
        return np.sort(np.concatenate([self.parts[0], self.rest]))


def draw(available: int, wanted: tuple[int, ...], seed: int, source: str) -> Draws:
    """Draw disjoint parts of ``range(available)`` with ``wanted`` images each, by seed.

    Where there are too few images, all parts shrink by the same factor.

    Raises:
        DataError: a part would fall below 32 images though more were asked for.
    """
    shrink = min(1.0, available / sum(wanted))
    sizes = [int(count * shrink) for count in wanted]
    if any(size < min(count, SMALLEST_PART) for size, count in zip(sizes, wanted, strict=True)):
        asked = ", ".join(map(str, wanted))
        raise DataError(f"{source}: {available} images are too few to draw {asked}: give more, or ask for less")
    *parts, rest = np.split(permutation(available, seed), np.cumsum(sizes))
    return Draws(tuple(parts), rest)


def hash_arrays(arrays: Sequence[NDArray[np.generic]]) -> str:
    """SHA-256 over shapes, types and bytes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()
