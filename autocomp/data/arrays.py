"""Sources that fit in memory as uint8 pixels: the embedded digits, ``.npz`` files and CIFAR-10's own folder."""

import pickle
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from autocomp.data.preprocess import IMAGENET, Preprocess, preprocess_for
from autocomp.data.splits import Batch, DataOptions, Splits, assemble, draw, hash_arrays, permutation
from autocomp.errors import DataError
from autocomp.policy import digest_of

__all__ = ["ArraySplit", "load_cifar10", "load_digits", "load_npz"]

NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")
# Of the training pixels, rounded.
DIGITS = Preprocess((0.3, 0.3, 0.3), (0.33, 0.33, 0.33))
DIGITS_TEST, DIGITS_SEARCH, DIGITS_SELECTION = 500, 200, 200


@dataclass(frozen=True, eq=False)
class ArraySplit:
    """Some images of an array.

    Attributes:
        images: (N, h, w, c) pixels, shared between splits.
        labels: (N,).
        indices: (n,) of the images in this split.
        preprocess: applied batch by batch.
        content: digest of ``images`` and ``labels``.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    indices: NDArray[np.int64]
    preprocess: Preprocess
    content: str

    def __len__(self) -> int:
        return len(self.indices)

    @cached_property
    def digest(self) -> str:
        how = self.preprocess
        return digest_of([self.content, hash_arrays([self.indices]), how.mean, how.std, how.size])

    def batches(self, size: int) -> Iterator[Batch]:
        for start in range(0, len(self.indices), size):
            chosen = self.indices[start : start + size]
            yield self.preprocess.normalise(self._fit(self.images[chosen])), self.labels[chosen]

    def take(self, indices: NDArray[np.int64]) -> Self:
        return replace(self, indices=self.indices[indices])

    def _fit(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        size = self.preprocess.size
        if size is None or images.shape[1:3] == (size, size):
            return images
        fitted = [np.asarray(self.preprocess.fit(Image.fromarray(image.squeeze()))) for image in images]
        return np.stack(fitted).reshape(len(images), size, size, images.shape[3])


def load_digits(options: DataOptions) -> Splits:
    """Scikit-learn's handwritten digits, 8x8, enlarged bilinearly to 3x32x32.

    The splits are fixed, so that the weights shipped with the package have seen none of the 500 test, 200 search
    and 200 selection images. The other 897 are for training, and calibration takes the first of them.
    """
    from sklearn.datasets import load_digits as read  # slow to import

    found = read()
    enlarge = _bilinear(8, 32)
    large = enlarge @ found.images @ enlarge.T  # weights and values are dyadic: exact in float64
    pixels = np.rint(large * (255 / 16)).astype(np.uint8)
    images = np.repeat(pixels[..., None], 3, axis=3)
    labels = found.target.astype(np.int64)
    test, search, selection, train = np.split(
        permutation(len(labels), 0), np.cumsum([DIGITS_TEST, DIGITS_SEARCH, DIGITS_SELECTION])
    )
    content = hash_arrays([images, labels])
    preprocess = preprocess_for(options, DIGITS, 3)

    def split(indices: NDArray[np.int64]) -> ArraySplit:
        return ArraySplit(images, labels, indices, preprocess, content)

    return assemble(
        split(train[: options.calibration]),
        split(search[: options.search]),
        split(selection[: options.selection]),
        split(test),
        split(train),
        classes=10,
        input_shape=_shape(split(test)),
        from_training=False,
        source="digits",
    )


def _bilinear(inputs: int, outputs: int) -> NDArray[np.float64]:
    """The (outputs, inputs) matrix that resamples an axis, pixel centres at half positions, edges repeated."""
    positions = np.clip((np.arange(outputs) + 0.5) * inputs / outputs - 0.5, 0, inputs - 1)
    distance = np.abs(positions[:, None] - np.arange(inputs))
    return np.maximum(0.0, 1.0 - distance)


def load_npz(path: Path, options: DataOptions) -> Splits:
    """A file with ``x_train``, ``y_train``, ``x_test``, ``y_test``: uint8 images (n, h, w, c) and integer labels (n,).

    Raises:
        DataError: the file is missing or unreadable, or an array is missing, of the wrong type or shape, or empty.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}: check the path behind npz:")
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in NPZ_KEYS if key not in file]
            if missing:
                raise DataError(f"{path} lacks {', '.join(missing)}: it must hold {', '.join(NPZ_KEYS)}")
            x_train, y_train, x_test, y_test = (file[key] for key in NPZ_KEYS)
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no readable .npz file of plain arrays: write it with numpy.savez") from error
    return from_arrays(x_train, y_train, x_test, y_test, options, f"npz:{path}")


def load_cifar10(folder: Path, options: DataOptions) -> Splits:
    """CIFAR-10 as its authors distribute it for Python: ``cifar-10-batches-py/data_batch_1..5`` and ``test_batch``.

    Raises:
        DataError: a file is missing or is not what it should be.
    """
    inner = folder / "cifar-10-batches-py"
    root = inner if inner.is_dir() else folder
    train = [_read_cifar_batch(root / f"data_batch_{number}") for number in range(1, 6)]
    x_train, y_train = np.concatenate([x for x, _ in train]), np.concatenate([y for _, y in train])
    x_test, y_test = _read_cifar_batch(root / "test_batch")
    return from_arrays(x_train, y_train, x_test, y_test, options, f"cifar10:{folder}")


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays and plain containers; anything else in the file could run code, and is refused."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) == ("_codecs", "encode"):
            return str.encode
        allowed: dict[str, Callable[..., Any]] = {
            "ndarray": np.ndarray,
            "dtype": np.dtype,
            "_reconstruct": np.zeros(0).__reduce__()[0],  # type: ignore[dict-item]
            "_frombuffer": np.zeros(1).__reduce_ex__(5)[0],  # type: ignore[dict-item]
        }
        if module.split(".")[0] == "numpy" and name in allowed:
            return allowed[name]
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a file of images")


def _read_cifar_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    def read(file: BinaryIO) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        entry = _ArrayUnpickler(file, encoding="bytes").load()
        entry = {key.decode() if isinstance(key, bytes) else key: value for key, value in entry.items()}
        images = np.asarray(entry["data"], np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(images), np.asarray(entry["labels"], np.int64)

    if not path.is_file():
        raise DataError(f"there is no {path}: unpack CIFAR-10 for Python there")
    try:
        with path.open("rb") as file:
            return read(file)
    except (pickle.UnpicklingError, EOFError, AttributeError, KeyError, ValueError, TypeError, IndexError) as error:
        raise DataError(f"{path} is no batch of CIFAR-10 for Python: unpack the archive again") from error


def from_arrays(
    x_train: NDArray[Any],
    y_train: NDArray[Any],
    x_test: NDArray[Any],
    y_test: NDArray[Any],
    options: DataOptions,
    source: str,
) -> Splits:
    """Calibration, search and selection drawn from the training images; see `load_npz` for the arrays."""
    for name, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        _check_images(x, f"x_{name}", source)
        _check_labels(y, len(x), f"y_{name}", source)
    if x_train.shape[1:] != x_test.shape[1:]:
        raise DataError(f"{source}: x_train has {x_train.shape[1:]} images, x_test {x_test.shape[1:]}: make them equal")
    classes = int(y_train.max()) + 1
    if classes > len(x_train):
        raise DataError(f"{source}: y_train holds the label {classes - 1} on {len(x_train)} images: number from 0")
    if y_test.max() >= classes:
        raise DataError(f"{source}: y_test holds the label {y_test.max()}, but y_train only 0 to {classes - 1}")
    preprocess = preprocess_for(options, IMAGENET, x_train.shape[3])
    draws = draw(len(x_train), options.wanted, options.seed, source)
    train, test = (x_train, y_train.astype(np.int64)), (x_test, y_test.astype(np.int64))
    content, test_content = hash_arrays(train), hash_arrays(test)

    def split(indices: NDArray[np.int64]) -> ArraySplit:
        return ArraySplit(*train, indices, preprocess, content)

    calibration, search, selection = map(split, draws.parts)
    return assemble(
        calibration,
        search,
        selection,
        ArraySplit(*test, np.arange(len(x_test)), preprocess, test_content),
        split(draws.train),
        classes=classes,
        input_shape=_shape(search),
        from_training=True,
        source=source,
    )


def _shape(split: ArraySplit) -> tuple[int, int, int]:
    _, height, width, channels = split.images.shape
    size = split.preprocess.size
    return channels, size or height, size or width


def _check_images(images: NDArray[Any], name: str, source: str) -> None:
    if images.dtype != np.uint8:
        raise DataError(f"{source}: {name} is {images.dtype}: store pixels as uint8 in 0..255")
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise DataError(f"{source}: {name} has shape {images.shape}: it must be (n, height, width, 1 or 3)")
    if images.size == 0:
        raise DataError(f"{source}: {name} is empty: give it images")


def _check_labels(labels: NDArray[Any], count: int, name: str, source: str) -> None:
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (count,):
        raise DataError(f"{source}: {name} is {labels.dtype} {labels.shape}: it must be {count} integers")
    if labels.min() < 0:
        raise DataError(f"{source}: {name} holds the label {labels.min()}: number classes from 0")
