"""The user's own datasets, loaders and factories."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

from autocomp.data import DataOptions, load_data, splits_from_objects
from autocomp.errors import DataError
from tests.data.checks import SMALL, assert_disjoint, everything, one_line


def tensors(count: int, seed: int, classes: int = 4) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 2, 5, 6, generator=generator), torch.arange(count) % classes)


class Items(Dataset[object]):
    """A dataset of whatever it is given."""

    def __init__(self, items: list[object]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> object:
        return self.items[index]


def test_datasets_become_splits() -> None:
    train, test = tensors(200, 0), tensors(50, 1)
    data = splits_from_objects((train, test), SMALL)
    assert (data.classes, data.input_shape, data.from_training) == (4, (2, 5, 6), True)
    assert_disjoint(data)
    images, labels = everything(data.test)
    assert np.array_equal(images, test.tensors[0].numpy())
    assert np.array_equal(labels, test.tensors[1].numpy())
    assert splits_from_objects(data) is data
    assert splits_from_objects((train, test), SMALL).digest == data.digest
    assert splits_from_objects((train, tensors(50, 2)), SMALL).digest != data.digest


def test_three_parts_search_on_the_validation_part() -> None:
    data = splits_from_objects((tensors(100, 0), tensors(120, 1), tensors(30, 2)), SMALL)
    assert not data.from_training and len(data.search) == 50
    assert_disjoint(data)


def test_loaders_keep_their_choice_of_items_and_leave_the_generator_alone() -> None:
    dataset = tensors(200, 0)
    chosen = list(range(0, 200, 2))
    sampled = DataLoader(dataset, batch_size=8, sampler=SubsetRandomSampler(chosen))
    shuffled = DataLoader(Subset(tensors(300, 1), range(50, 300)), batch_size=8, shuffle=True)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    data = splits_from_objects((shuffled, sampled), SMALL)
    assert torch.rand(1) == expected
    assert np.array_equal(everything(data.test)[0], dataset.tensors[0][chosen].numpy())
    assert_disjoint(data)


def test_classes_are_counted_in_every_kind_of_dataset() -> None:
    pairs = Items([(torch.randn(1, 4, 4), index % 7) for index in range(200)])
    assert splits_from_objects((pairs, pairs), SMALL).classes == 7
    labelled = Items([(torch.randn(1, 4, 4), index % 7) for index in range(200)])
    labelled.targets = [index % 7 for index in range(200)]  # type: ignore[attr-defined]
    assert splits_from_objects((labelled, pairs), SMALL).classes == 7
    assert splits_from_objects((pairs, pairs), SMALL, classes=9).classes == 9


GOOD = (torch.zeros(1, 4, 4), 1)


@pytest.mark.parametrize(
    ("item", "part"),
    [
        ((torch.full((1, 4, 4), float("nan")), 1), "NaN"),
        ((torch.zeros(1, 4, 4, dtype=torch.uint8), 1), "uint8"),
        ((torch.zeros(4, 4), 1), "(4, 4)"),
        ((Image.new("RGB", (4, 4)), 1), "image tensor"),
        ({"image": torch.zeros(1, 4, 4)}, "give all parts labels, or none"),
        (({"image": torch.zeros(1, 4, 4), "x": torch.zeros(3)}, 1), "make them equal"),
        ((torch.zeros(1, 4, 4), 1, 2), "more than an image and a label"),
        (((torch.zeros(1, 4, 4), torch.zeros(3)), 1), "more than an image and a label"),
        ((torch.zeros(1, 4, 4), {"boxes": torch.zeros(2, 4)}), "images alone"),
        (torch.zeros(1, 4, 4), "give all parts labels, or none"),
        ((torch.zeros(1, 4, 4), 0.5), "labels are"),
        ((torch.zeros(1, 4, 4), 4), "outside of the 4 classes"),
        ((torch.zeros(1, 4, 4), -1), "number classes from 0"),
        ("text", "pairs"),
    ],
)
def test_bad_items(item: object, part: str) -> None:
    good = Items([GOOD] * 200)
    with pytest.raises(DataError) as error:
        everything(splits_from_objects((good, Items([item] * 60)), SMALL, classes=4).test)
    assert part in one_line(error)


@pytest.mark.parametrize("wrapped", [True, False])
def test_images_alone_are_labelled_by_their_place_in_the_dataset(wrapped: bool) -> None:
    pixels = torch.randn(200, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = TensorDataset(pixels) if wrapped else Items(list(pixels))  # tuples of one, or tensors
    data = splits_from_objects((whole, Subset(whole, range(100, 150))), SMALL)
    assert (data.labelled, data.classes) == (False, 1000)
    images, places = everything(data.search)
    assert np.array_equal(images, pixels.numpy()[places])
    assert len(set(places)) == len(places) and not np.array_equal(places, np.sort(places))
    assert np.array_equal(everything(data.test)[1], np.arange(50))  # of the dataset that was given


def test_labels_of_some_items_only_are_refused() -> None:
    items: list[object] = [(torch.zeros(1, 4, 4), 1)] * 60
    ragged = DataLoader(
        Items(items),
        collate_fn=lambda batch: (
            torch.stack([x for x, _ in batch])
            if len(batch) > 9
            else [torch.stack([x for x, _ in batch]), torch.ones(len(batch), dtype=torch.long)]
        ),
    )
    with pytest.raises(DataError, match="some items have labels and some have none"):
        everything(splits_from_objects((Items(items * 4), ragged), SMALL, classes=4).test)


def test_images_of_unequal_shape() -> None:
    good = Items([GOOD] * 200)
    with pytest.raises(DataError, match="differ in shape"):
        splits_from_objects((good, Items([(torch.zeros(1, 5, 5), 1)] * 60)), SMALL, classes=4)
    mixed = Items([GOOD, (torch.zeros(1, 5, 5), 1)] * 40)
    with pytest.raises(DataError, match="cannot read items"):
        everything(splits_from_objects((good, mixed), SMALL, classes=4).test)


def test_bad_objects() -> None:
    class Stream(IterableDataset[object]):
        def __iter__(self) -> Iterator[object]:
            return iter(())

    good = tensors(200, 0)
    for data, part in (
        (good, "give (train, test)"),
        ((good,), "give (train, test)"),
        ((good, Stream()), "map-style"),
        ((good, [].__iter__()), "map-style"),
        ((good, Items([])), "empty"),
        ((tensors(60, 0), good), "too few"),
    ):
        with pytest.raises(DataError) as error:
            splits_from_objects(data, DataOptions())
        assert part in one_line(error)
    with pytest.raises(DataError, match="come ready"):
        splits_from_objects((good, good), DataOptions(size=8))


def test_factories_give_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_data.py").write_text(
        "import torch\nfrom torch.utils.data import TensorDataset\n"
        "def make():\n"
        "    def part(n): return TensorDataset(torch.randn(n, 1, 4, 4), torch.arange(n) % 3)\n"
        "    return part(200), part(40)\n"
        "def broken(): return {}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_data("user_data:make", SMALL).classes == 3
    with pytest.raises(DataError, match="is a dict"):
        load_data("user_data:broken", SMALL)
    with pytest.raises(DataError, match="cannot import"):
        load_data("user_absent:make", SMALL)
