"""Folders of images: one subfolder per class, read from disk batch by batch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from autocomp.data.preprocess import IMAGENET, Preprocess, preprocess_for
from autocomp.data.splits import Batch, DataOptions, Splits, assemble, draw, permutation
from autocomp.errors import DataError
from autocomp.policy import digest_of

__all__ = ["FileSplit", "load_folder"]

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
SIDE = 224
# Share of a folder without a test part of its own that is kept for the test.
TEST_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path
    label: int
    size_bytes: int


@dataclass(frozen=True, eq=False)
class FileSplit:
    """Image files with labels.

    Attributes:
        root: the folder given by the user.
        entries: in the order they are read.
        preprocess: applied to each image.
    """

    root: Path
    entries: tuple[_Entry, ...]
    preprocess: Preprocess

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def digest(self) -> str:
        """Over names, labels and sizes of the files and the preprocessing; the pixels are not read for it."""
        files = [
            [entry.path.relative_to(self.root).as_posix(), entry.label, entry.size_bytes] for entry in self.entries
        ]
        return digest_of([files, self.preprocess.mean, self.preprocess.std, self.preprocess.size])

    def batches(self, size: int) -> Iterator[Batch]:
        for start in range(0, len(self.entries), size):
            chosen = self.entries[start : start + size]
            images = np.stack([self._read(entry.path) for entry in chosen])
            yield self.preprocess.normalise(images), np.asarray([entry.label for entry in chosen], np.int64)

    def take(self, indices: NDArray[np.int64]) -> Self:
        return replace(self, entries=tuple(self.entries[index] for index in indices))

    def _read(self, path: Path) -> NDArray[np.uint8]:
        try:
            with Image.open(path) as image:
                return np.asarray(self.preprocess.fit(image.convert("RGB")))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{path} is no readable image: mend or remove it") from error


def load_folder(folder: Path, options: DataOptions) -> Splits:
    """``DIR/{train,val,test}/CLASS/*``, where one of ``val`` and ``test`` may be missing, or just ``DIR/CLASS/*``.

    With all three, search and selection come from ``val``; else from ``train``. Without parts, a fifth of the images
    is drawn by seed for the test. Classes are numbered in the order of their names.

    Raises:
        DataError: the folder is missing, has no classes or images, or too few.
    """
    source = f"imagefolder:{folder}"
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}: check the path behind imagefolder:")
    preprocess = preprocess_for(options, replace(IMAGENET, size=SIDE), 3)
    parts = {name: folder / name for name in ("train", "val", "test") if (folder / name).is_dir()}
    if not parts:
        classes = _classes(folder)
        entries = _entries(folder, classes)
        order = permutation(len(entries), options.seed)
        cut = int(len(entries) * TEST_SHARE)
        test, train = [entries[i] for i in sorted(order[:cut])], [entries[i] for i in sorted(order[cut:])]
        if not test:
            raise DataError(f"{source}: {len(entries)} images leave none for the test: give at least 5 and better 500")
        held_out = None
    else:
        if "train" not in parts or len(parts) == 1:
            raise DataError(f"{folder} has only {', '.join(parts)}: it needs train and one of test and val")
        classes = _classes(parts["train"])
        train = _entries(parts["train"], classes)
        test = _entries(parts.get("test", parts.get("val", folder)), classes)
        held_out = _entries(parts["val"], classes) if len(parts) == 3 else None
    return _split(folder, source, preprocess, options, classes, train, held_out, test)


def _split(
    folder: Path,
    source: str,
    preprocess: Preprocess,
    options: DataOptions,
    classes: tuple[str, ...],
    train: list[_Entry],
    held_out: list[_Entry] | None,
    test: list[_Entry],
) -> Splits:
    def split(entries: list[_Entry]) -> FileSplit:
        return FileSplit(folder, tuple(entries), preprocess)

    def pick(entries: list[_Entry], indices: NDArray[np.int64]) -> FileSplit:
        return split([entries[i] for i in indices])

    if held_out is None:
        draws = draw(len(train), options.wanted, options.seed, source)
        calibration, search, selection = (pick(train, indices) for indices in draws.parts)
        rest = pick(train, draws.train)
    else:
        (chosen,) = draw(len(train), (options.calibration,), options.seed, source).parts
        draws = draw(len(held_out), (options.search, options.selection), options.seed, f"{source} (val)")
        calibration, rest = pick(train, chosen), split(train)
        search, selection = (pick(held_out, indices) for indices in draws.parts)
    side = preprocess.size or SIDE
    return assemble(
        calibration,
        search,
        selection,
        split(test),
        rest,
        classes=len(classes),
        input_shape=(3, side, side),
        from_training=held_out is None,
        source=source,
    )


def _classes(folder: Path) -> tuple[str, ...]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(names) < 2:
        raise DataError(f"{folder} holds {len(names)} class folders: give one subfolder per class, at least 2")
    return tuple(names)


def _entries(folder: Path, classes: tuple[str, ...]) -> list[_Entry]:
    extra = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in classes)
    extra = [name for name in extra if not name.startswith(".")]
    if extra:
        raise DataError(f"{folder} has the class {extra[0]!r}, which the training images lack: remove or rename it")
    entries = [
        _Entry(path, label, path.stat().st_size)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file()
    ]
    if not entries:
        raise DataError(f"{folder} holds no images: use one of {', '.join(sorted(SUFFIXES))}")
    return entries
