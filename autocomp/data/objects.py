"""The user's own torch datasets and loaders as splits."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset, default_collate

from autocomp.data.splits import CLASSES, Batch, DataOptions, Splits, assemble, draw, hash_arrays
from autocomp.errors import DataError
from autocomp.policy import digest_of
from autocomp.rows import Inputs

__all__ = ["DatasetSplit", "splits_from_objects"]

# Images that stand for a whole dataset in its digest.
DIGEST_IMAGES = 32


@dataclass(frozen=True, eq=False)
class DatasetSplit:
    """Some items of a map-style dataset, each an (image, label) pair, or an image alone.

    In place of an image may stand a mapping of several inputs by name, which is read as a row.

    What varies from one reading to the next, such as random augmentation, makes runs differ.

    Attributes:
        dataset: has ``__len__`` and ``__getitem__``.
        indices: (n,) of the items in this split.
        collate: turns a list of items into (images, labels), or images.
        classes: labels must lie below.
        source: for messages.
        labelled: items have labels; where they have none, an image's label is its index in the dataset, by which the
            user's metric can look up what belongs to it.
        inputs: as of `Splits`.
    """

    dataset: Any
    indices: NDArray[np.int64]
    collate: Callable[[list[Any]], Any]
    classes: int
    source: str
    labelled: bool = True
    inputs: Inputs = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.indices)

    @cached_property
    def digest(self) -> str:
        """Over the positions, and 32 images spread evenly with their labels."""
        step = max(1, len(self.indices) // DIGEST_IMAGES)
        images, labels = self._read(self.indices[::step][:DIGEST_IMAGES])
        return digest_of([type(self.dataset).__qualname__, hash_arrays([self.indices, images, labels])])

    def batches(self, size: int) -> Iterator[Batch]:
        for start in range(0, len(self.indices), size):
            yield self._read(self.indices[start : start + size])

    def take(self, indices: NDArray[np.int64]) -> Self:
        return replace(self, indices=self.indices[indices])

    def collated(self, indices: NDArray[np.int64]) -> Any:
        """Some items as the dataset's own loader would batch them."""
        try:
            return self.collate([self.dataset[int(index)] for index in indices])
        except Exception as error:  # the user's code may fail in any way
            where = f"items {indices[0]} to {indices[-1]}"
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"{self.source}: cannot read {where} ({reason}): yield (image tensor, label)") from error

    def opened(self) -> Self:
        """With what its first item tells: whether there are labels, and which inputs."""
        images, labels = _parted(self.collated(self.indices[:1]), self.source)
        inputs = {} if isinstance(images, torch.Tensor) else {name: tuple(x.shape[1:]) for name, x in images.items()}
        return replace(self, labelled=labels is not None, inputs=inputs)

    def _read(self, indices: NDArray[np.int64]) -> Batch:
        found, labels = _parted(self.collated(indices), self.source)
        images = found if isinstance(found, torch.Tensor) else self._rows(found)
        if (labels is not None) != self.labelled:
            raise DataError(f"{self.source}: some items have labels and some have none: give all of them one, or none")
        if labels is None:
            labels = torch.from_numpy(indices)
        if images.ndim != (2 if self.inputs else 4) or not images.is_floating_point():
            raise DataError(
                f"{self.source}: images are {images.dtype} {tuple(images.shape[1:])}: yield float tensors (c, h, w), "
                "normalised as in training"
            )
        if not bool(torch.isfinite(images).all()):
            raise DataError(f"{self.source}: items {indices[0]} to {indices[-1]} hold NaN or infinite pixels")
        if labels.shape != images.shape[:1] or labels.is_floating_point():
            raise DataError(f"{self.source}: labels are {labels.dtype} {tuple(labels.shape)}: yield one integer each")
        if self.labelled and (int(labels.min()) < 0 or int(labels.max()) >= self.classes):
            raise DataError(
                f"{self.source}: labels reach from {int(labels.min())} to {int(labels.max())}, outside of the "
                f"{self.classes} classes: number classes from 0"
            )
        return images.detach().float().cpu().numpy(), labels.to(torch.int64).cpu().numpy()

    def _rows(self, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Several inputs side by side, (n, numbers)."""
        shapes = {name: tuple(value.shape[1:]) for name, value in given.items()}
        if shapes != self.inputs or list(shapes) != list(self.inputs):
            raise DataError(
                f"{self.source}: inputs are {shapes}, those of the first item {dict(self.inputs)}: make "
                "names, order and shapes equal"
            )
        for name, value in given.items():
            if value.ndim < 2 or not value.is_floating_point():
                raise DataError(
                    f"{self.source}: input {name} is {value.dtype} {shapes[name]}: yield float tensors with an axis"
                )
        return torch.cat([value.reshape(len(value), -1) for value in given.values()], 1)


def splits_from_objects(
    data: object, options: DataOptions | None = None, *, classes: int | None = None, source: str = "objects"
) -> Splits:
    """Make splits of live objects.

    Args:
        data: a `Splits`, which is returned as it is; or (train, test), or (train, validation, test), of map-style torch
            datasets or loaders of them, whose items are (normalised image tensor (c, h, w), label), or images alone. A
            model of several inputs wants {name of forward's argument: float tensor} in place of the image.
            Search and selection are drawn from the validation part, else from ``train``.
        options: sizes and seed, the defaults where None; images come ready, so mean, std and size must not be given.
        classes: how many there are; None reads all labels to find out, and means 1,000 where there are none.
        source: how messages name the data.

    Raises:
        DataError: the objects are of another kind, items do not fit, or there are too few.
    """
    if isinstance(data, Splits):
        return data
    options = options or DataOptions()
    if not isinstance(data, tuple | list) or len(data) not in (2, 3):
        raise DataError(f"{source} is a {type(data).__name__}: give (train, test) datasets, or autocomp.data.Splits")
    if options.mean or options.std or options.size:
        raise DataError(f"{source}: images of a dataset come ready: leave out mean, std and size, and normalise there")
    names = ("train", "test") if len(data) == 2 else ("train", "validation", "test")
    parts = {name: _open(part, f"{source} ({name})") for name, part in zip(names, data, strict=True)}
    if len({part.labelled for part in parts.values()}) > 1:
        raise DataError(f"{source}: only some parts have labels: give all parts labels, or none")
    labelled = parts["train"].labelled
    if classes is None:
        classes = 1 + max(_largest_label(part) for part in parts.values()) if labelled else CLASSES
    parts = {name: replace(part, classes=classes) for name, part in parts.items()}
    train, test = parts["train"], parts["test"]
    first = {name: next(part.batches(1))[0].shape[1:] for name, part in parts.items()}
    if len({(shape, tuple(parts[name].inputs.items())) for name, shape in first.items()}) > 1:
        raise DataError(f"{source}: images differ in shape between the parts, {first}: make them equal")

    def pick(part: DatasetSplit, chosen: NDArray[np.int64]) -> DatasetSplit:
        return replace(part, indices=part.indices[chosen])

    if "validation" in parts:
        held_out = parts["validation"]
        (chosen,) = draw(len(train), (options.calibration,), options.seed, train.source).parts
        draws = draw(len(held_out), (options.search, options.selection), options.seed, held_out.source)
        calibration, rest = pick(train, chosen), train
        search, selection = (pick(held_out, indices) for indices in draws.parts)
    else:
        draws = draw(len(train), options.wanted, options.seed, train.source)
        calibration, search, selection = (pick(train, indices) for indices in draws.parts)
        rest = pick(train, draws.train)
    return assemble(
        calibration,
        search,
        selection,
        test,
        rest,
        classes=classes,
        input_shape=first["train"],
        from_training="validation" not in parts,
        source=source,
        labelled=labelled,
        inputs=train.inputs,
    )


def _open(part: object, source: str) -> DatasetSplit:
    """All items of a dataset, or those a loader draws, in the dataset's order."""
    dataset, collate = part, default_collate
    sampler: Any = None
    if isinstance(part, DataLoader):
        dataset, collate, sampler = part.dataset, part.collate_fn, part.sampler
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise DataError(f"{source} is a {type(part).__name__}: give a map-style dataset, with a length and indexing")
    if sampler is None:
        indices = np.arange(len(dataset), dtype=np.int64)
    else:
        with torch.random.fork_rng(devices=[]):  # samplers draw from the global generator
            indices = np.unique(np.fromiter(sampler, np.int64))
    if len(indices) == 0:
        raise DataError(f"{source} is empty: give it images")
    return DatasetSplit(dataset, indices, collate, np.iinfo(np.int64).max, source).opened()


def _parted(batch: Any, source: str) -> tuple[torch.Tensor | Mapping[str, torch.Tensor], torch.Tensor | None]:
    """Images, or several inputs by name, and labels of a collated batch; None for labels where there are none."""
    entries = batch if isinstance(batch, list | tuple) else [batch]
    if len(entries) > 2 or any(isinstance(entry, list | tuple) for entry in entries[:1]):
        raise DataError(
            f"{source}: items are more than an image and a label: yield (image, label), or for a model of several "
            "inputs ({name of forward's argument: tensor, ...}, label)"
        )
    images: Any = entries[0] if entries else None
    several = list(images.values()) if isinstance(images, Mapping) else []
    if not entries or not all(isinstance(entry, torch.Tensor) for entry in (*(several or [images]), *entries[1:])):
        raise DataError(f"{source}: items are not pairs (image tensor, label): make them so, or yield images alone")
    if len(several) == 1:
        images = several[0]
    return images, entries[1] if len(entries) == 2 else None


def _largest_label(part: DatasetSplit) -> int:
    known = _labels(part.dataset)
    if known is not None:
        return int(known[part.indices].max())
    return max(int(labels.max()) for _, labels in part.batches(256))


def _labels(dataset: Any) -> NDArray[np.int64] | None:
    """Labels of a kind of dataset that keeps them apart from its images; None for any other."""
    if isinstance(dataset, Subset):
        inner = _labels(dataset.dataset)
        return None if inner is None else inner[np.asarray(dataset.indices)]
    if isinstance(dataset, TensorDataset):
        found: Any = dataset.tensors[-1]
    elif getattr(dataset, "target_transform", None) is None:
        found = getattr(dataset, "targets", None)
    else:
        found = None
    if found is None:
        return None
    labels = np.asarray(found)
    return labels.astype(np.int64) if labels.shape == (len(dataset),) and labels.dtype.kind in "iu" else None
