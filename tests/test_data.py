"""Splits are compared with plain numpy, Pillow and torchvision, and checked for leaks between them."""

import pickle
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

from autocomp.data import DataOptions, Split, Splits, load_data, splits_from_objects
from autocomp.errors import DataError

MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
SMALL = DataOptions(calibration=40, search=50, selection=60)


def everything(split: Split, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    parts = list(split.batches(size))
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])


def keys(split: Split) -> list[bytes]:
    return [image.tobytes() for image in everything(split)[0]]


def assert_disjoint(data: Splits) -> None:
    """No image of one split occurs in another; only the training split may share some with calibration."""
    parts = {name: set(keys(getattr(data, name))) for name in ("calibration", "search", "selection", "test")}
    for first, second in combinations(parts, 2):
        assert not parts[first] & parts[second], (first, second)
    if data.train is not None:
        train = set(keys(data.train))
        assert parts["calibration"] <= train
        assert not train & (parts["search"] | parts["selection"] | parts["test"])


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


# --- digits ----------------------------------------------------------------------------------------


def test_digits_are_the_enlarged_originals() -> None:
    from sklearn.datasets import load_digits

    data = load_data("digits", DataOptions(mean=(0.0,), std=(1.0,)))
    assert (data.classes, data.input_shape, data.labelled, data.from_training) == (10, (3, 32, 32), True, False)
    original = load_digits()
    small = torch.from_numpy(original.images)[:, None]
    large = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)[:, 0].numpy() / 16
    known = {
        np.rint(image * 255).astype(np.uint8).tobytes(): label
        for image, label in zip(large, original.target, strict=True)
    }
    images, labels = everything(data.test)
    assert len(images) >= 500
    for image, label in zip(images, labels, strict=True):
        assert np.array_equal(image[0], image[1]) and np.array_equal(image[0], image[2])
        assert known[np.rint(image[0] * 255).astype(np.uint8).tobytes()] == label


def test_digits_have_fixed_splits() -> None:
    first, second = (load_data("digits", DataOptions(seed=seed)) for seed in (0, 7))
    assert first.digest == second.digest
    assert first.train is not None
    assert len(first.search) >= 200 and len(first.selection) >= 200
    assert len(first.test) + len(first.search) + len(first.selection) + len(first.train) == 1797
    assert_disjoint(first)
    assert len(load_data("digits", DataOptions(search=10)).search) == 10


# --- npz -------------------------------------------------------------------------------------------


def arrays(train: int = 300, test: int = 70, channels: int = 3, classes: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        "x_train": rng.integers(0, 256, (train, 9, 11, channels), np.uint8),
        "y_train": np.arange(train) % classes,
        "x_test": rng.integers(0, 256, (test, 9, 11, channels), np.uint8),
        "y_test": np.arange(test) % classes,
    }


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    np.savez(tmp_path / "d.npz", **arrays())
    return tmp_path / "d.npz"


def test_npz_is_normalised_and_disjoint(npz: Path) -> None:
    data = load_data(f"npz:{npz}", SMALL)
    assert (data.classes, data.input_shape, data.labelled, data.from_training) == (5, (3, 9, 11), True, True)
    assert [len(part) for part in (data.calibration, data.search, data.selection, data.test)] == [40, 50, 60, 70]
    assert data.train is not None and len(data.train) == 300 - 50 - 60
    assert_disjoint(data)
    images, labels = everything(data.test)
    raw = arrays()
    assert images.dtype == np.float32 and labels.dtype == np.int64
    expected = ((raw["x_test"] / 255 - MEAN) / STD).transpose(0, 3, 1, 2)
    assert np.allclose(images, expected, atol=1e-5)
    assert np.array_equal(labels, raw["y_test"])


def test_labels_stay_with_their_images(npz: Path) -> None:
    raw = arrays()
    known = {x.tobytes(): y for x, y in zip(raw["x_train"], raw["y_train"], strict=True)}
    data = load_data(f"npz:{npz}", DataOptions(mean=(0.0,), std=(1.0,), calibration=40, search=50, selection=60))
    for part in (data.calibration, data.search, data.selection):
        for image, label in zip(*everything(part), strict=True):
            assert known[np.rint(image * 255).astype(np.uint8).transpose(1, 2, 0).tobytes()] == label


def test_batches_do_not_depend_on_their_size(npz: Path) -> None:
    split = load_data(f"npz:{npz}", SMALL).search
    assert [len(labels) for _, labels in split.batches(32)] == [32, 18]
    for size in (1, 7, 50, 1000):
        assert np.array_equal(everything(split, size)[0], everything(split, 50)[0])


def test_seed_moves_the_draw_and_every_digest_follows(npz: Path) -> None:
    base = load_data(f"npz:{npz}", SMALL)
    again = load_data(f"npz:{npz}", SMALL)
    assert base.digest == again.digest and keys(base.search) == keys(again.search)
    options = {"calibration": 40, "search": 50, "selection": 60}
    seeded = load_data(f"npz:{npz}", DataOptions(**options, seed=1))
    assert set(keys(seeded.search)) != set(keys(base.search))
    assert keys(seeded.test) == keys(base.test)
    others = [
        seeded,
        load_data(f"npz:{npz}", DataOptions(**options, mean=(0.5,))),
        load_data(f"npz:{npz}", DataOptions(**options, size=8)),
        load_data(f"npz:{npz}", DataOptions(**{**options, "search": 49})),
    ]
    assert len({data.digest for data in [base, *others]}) == 5
    raw = arrays()
    raw["x_test"][3, 0, 0, 0] ^= 1
    np.savez(npz, **raw)
    assert load_data(f"npz:{npz}", SMALL).digest != base.digest


def test_too_few_images_shrink_all_splits_alike(npz: Path) -> None:
    data = load_data(f"npz:{npz}", DataOptions(calibration=1024, search=2048, selection=2048))
    sizes = [len(part) for part in (data.calibration, data.search, data.selection)]
    assert sizes == [300 * 1024 // 5120, 300 * 2048 // 5120, 300 * 2048 // 5120]
    assert_disjoint(data)


def test_far_too_few_images_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", **arrays(train=90))
    with pytest.raises(DataError) as error:
        load_data(f"npz:{tmp_path / 'd.npz'}", DataOptions())
    assert "90 images are too few" in one_line(error)
    assert (
        len(load_data(f"npz:{tmp_path / 'd.npz'}", DataOptions(calibration=10, search=10, selection=10)).search) == 10
    )


def test_one_channel_and_size(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", **arrays(channels=1))
    data = load_data(f"npz:{tmp_path / 'd.npz'}", DataOptions(calibration=40, search=50, selection=60, size=14))
    assert data.input_shape == (1, 14, 14)
    images, _ = everything(data.test)
    assert images.shape[1:] == (1, 14, 14)
    raw = Image.fromarray(arrays(channels=1)["x_test"][0, :, :, 0])
    large = raw.resize((round(11 * 16 / 9), 16), Image.Resampling.BILINEAR)
    left = (large.width - 14) // 2
    expected = np.asarray(large.crop((left, 1, left + 14, 15))) / 255
    assert np.allclose(images[0, 0], (expected - MEAN.mean()) / STD.mean(), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"x_test": None}, "lacks x_test"),
        ({"x_train": np.zeros((300, 9, 11, 3), np.float32)}, "float32"),
        ({"x_train": np.zeros((300, 3, 9, 11), np.uint8)}, "(n, height, width, 1 or 3)"),
        ({"x_train": np.zeros((300, 9, 11), np.uint8)}, "(n, height, width, 1 or 3)"),
        ({"x_train": np.zeros((0, 9, 11, 3), np.uint8), "y_train": np.zeros(0, int)}, "empty"),
        ({"x_test": np.zeros((0, 9, 11, 3), np.uint8), "y_test": np.zeros(0, int)}, "empty"),
        ({"x_test": np.zeros((70, 8, 8, 3), np.uint8)}, "make them equal"),
        ({"y_train": np.zeros(299, int)}, "300 integers"),
        ({"y_train": np.zeros((300, 1), int)}, "300 integers"),
        ({"y_train": np.zeros(300)}, "300 integers"),
        ({"y_test": np.full(70, 5)}, "y_test holds the label 5"),
        ({"y_test": np.full(70, -1)}, "label -1"),
        ({"y_train": np.full(300, 10**9)}, "label 1000000000"),
        ({"y_train": np.zeros(300, int), "y_test": np.zeros(70, int)}, "at least 2"),
        ({"y_train": np.array([None] * 300)}, "no readable .npz"),
    ],
)
def test_bad_npz(change: dict[str, np.ndarray | None], part: str, tmp_path: Path) -> None:
    content = {name: value for name, value in {**arrays(), **change}.items() if value is not None}
    np.savez(tmp_path / "bad.npz", **content)
    with pytest.raises(DataError) as error:
        load_data(f"npz:{tmp_path / 'bad.npz'}", SMALL)
    assert part in one_line(error)


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.save(tmp_path / "single.npy", np.zeros(3))
    np.savez(tmp_path / "whole.npz", **arrays())
    (tmp_path / "torn.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:5000])
    for name in ("text.npz", "empty.npz", "single.npy", "torn.npz"):
        with pytest.raises(DataError, match=r"readable \.npz"):
            load_data(f"npz:{tmp_path / name}", SMALL)
    with pytest.raises(DataError, match="no file"):
        load_data(f"npz:{tmp_path / 'absent.npz'}", SMALL)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"mean": (0.5, 0.5)}, "1 or 3"),
        ({"std": (0.0, 1.0, 1.0)}, "positive"),
        ({"mean": (float("nan"),) * 3}, "finite"),
        ({"search": 0}, "search"),
        ({"size": -1}, "size"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_options(fields: dict[str, object], part: str, npz: Path) -> None:
    with pytest.raises(DataError) as error:
        load_data(f"npz:{npz}", DataOptions(**fields))  # type: ignore[arg-type]
    assert part in one_line(error)


@pytest.mark.parametrize("spec", ["", "cifar", "digits:x", "npz", "npz:", "imagefolder:", "http://x", "x.y"])
def test_unknown_data_is_told_what_exists(spec: str) -> None:
    with pytest.raises(DataError) as error:
        load_data(spec, DataOptions())
    assert "npz:FILE" in one_line(error)


# --- cifar10 ---------------------------------------------------------------------------------------


def write_cifar10(folder: Path, per_file: int) -> np.ndarray:
    """The layout of the published archive; returns the training images (n, 3, 32, 32)."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = []
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        data = rng.integers(0, 256, (per_file, 3072), np.uint8)
        entry = {b"data": data, b"labels": [i % 10 for i in range(per_file)], b"batch_label": b"x"}
        (folder / name).write_bytes(pickle.dumps(entry, protocol=2 if number % 2 else 5))
        images.append(data.reshape(-1, 3, 32, 32))
    return np.concatenate(images[:5])


def test_cifar10_is_read_as_published(tmp_path: Path) -> None:
    written = write_cifar10(tmp_path / "cifar-10-batches-py", 40)
    options = DataOptions(mean=(0.0,), std=(1.0,), calibration=40, search=40, selection=40)
    data = load_data(f"cifar10:{tmp_path}", options)
    assert (data.classes, data.input_shape, len(data.test)) == (10, (3, 32, 32), 40)
    assert_disjoint(data)
    found = np.concatenate([everything(part)[0] for part in (data.train, data.search, data.selection) if part])
    assert sorted(np.rint(x * 255).astype(np.uint8).tobytes() for x in found) == sorted(x.tobytes() for x in written)
    assert load_data(f"cifar10:{tmp_path / 'cifar-10-batches-py'}", options).digest == data.digest


def test_cifar10_runs_no_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, (f"open({str(tmp_path / 'fired')!r}, 'w')",)

    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder, 40)
    (folder / "data_batch_2").write_bytes(pickle.dumps({b"data": Bomb(), b"labels": []}))
    with pytest.raises(DataError, match="data_batch_2"):
        load_data(f"cifar10:{tmp_path}", SMALL)
    assert not (tmp_path / "fired").exists()
    (folder / "data_batch_2").unlink()
    with pytest.raises(DataError, match=r"no .*data_batch_2"):
        load_data(f"cifar10:{tmp_path}", SMALL)


# --- imagefolder -----------------------------------------------------------------------------------


def write_folder(root: Path, count: int, seed: int, size: tuple[int, int] = (20, 30)) -> None:
    rng = np.random.default_rng(seed)
    for index in range(count):
        folder = root / ("cat", "dog", "owl")[index % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{index:03d}.png")


def test_imagefolder_matches_torchvision(tmp_path: Path) -> None:
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    write_folder(tmp_path / "train", 150, 0)
    write_folder(tmp_path / "test", 33, 1)
    data = load_data(f"imagefolder:{tmp_path}", DataOptions(size=14, calibration=40, search=40, selection=40))
    assert (data.classes, data.input_shape, data.from_training) == (3, (3, 14, 14), True)
    assert_disjoint(data)
    steps = [transforms.Resize(16), transforms.CenterCrop(14), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    reference = ImageFolder(str(tmp_path / "test"), transforms.Compose(steps))
    images, labels = everything(data.test)
    assert labels.tolist() == reference.targets
    for image, (expected, _) in zip(images, reference, strict=True):
        assert np.allclose(image, expected.numpy(), atol=1e-5)


def test_imagefolder_default_size_and_images_of_that_size(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", 120, 0, (16, 16))
    write_folder(tmp_path / "val", 3, 1, (16, 16))
    assert load_data(f"imagefolder:{tmp_path}", SMALL_32).input_shape == (3, 224, 224)
    data = load_data(f"imagefolder:{tmp_path}", DataOptions(size=16, calibration=32, search=32, selection=32))
    image, _ = next(data.test.batches(1))
    raw = np.asarray(Image.open(tmp_path / "val" / "cat" / "000.png")) / 255
    assert np.allclose(image[0], ((raw - MEAN) / STD).transpose(2, 0, 1), atol=1e-5)


SMALL_32 = DataOptions(calibration=32, search=32, selection=32)


def test_imagefolder_with_val_and_test_searches_on_val(tmp_path: Path) -> None:
    for number, (name, count) in enumerate({"train": 60, "val": 90, "test": 30}.items()):
        write_folder(tmp_path / name, count, number)
    data = load_data(f"imagefolder:{tmp_path}", DataOptions(size=8, calibration=32, search=32, selection=32))
    assert not data.from_training
    assert data.train is not None and len(data.train) == 60
    assert_disjoint(data)


def test_imagefolder_of_one_level_is_split_by_seed(tmp_path: Path) -> None:
    write_folder(tmp_path, 200, 0)
    first, second = (
        load_data(f"imagefolder:{tmp_path}", DataOptions(size=8, calibration=32, search=32, selection=32, seed=seed))
        for seed in (0, 1)
    )
    assert len(first.test) == 40 and first.from_training
    assert_disjoint(first)
    assert set(keys(first.test)) != set(keys(second.test))


def test_folder_images_are_read_batch_by_batch(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", 120, 0)
    write_folder(tmp_path / "test", 30, 1)
    (tmp_path / "test" / "owl" / "029.png").write_bytes(b"no image")
    data = load_data(f"imagefolder:{tmp_path}", DataOptions(size=8, calibration=32, search=32, selection=32))
    batches = data.test.batches(10)
    next(batches)
    next(batches)
    with pytest.raises(DataError) as error:
        next(batches)
    assert "029.png" in one_line(error)


def test_bad_folders(tmp_path: Path) -> None:
    def message(folder: Path) -> str:
        with pytest.raises(DataError) as error:
            load_data(f"imagefolder:{folder}", SMALL_32)
        return one_line(error)

    assert "no folder" in message(tmp_path / "absent")
    (tmp_path / "a").mkdir()
    assert "0 class folders" in message(tmp_path / "a")
    write_folder(tmp_path / "b" / "train", 120, 0)
    assert "has only train" in message(tmp_path / "b")
    write_folder(tmp_path / "b" / "test", 30, 1)
    (tmp_path / "b" / "test" / "yak").mkdir()
    assert "'yak'" in message(tmp_path / "b")
    for name in ("x", "y"):
        (tmp_path / "c" / name).mkdir(parents=True)
    assert "no images" in message(tmp_path / "c")
    write_folder(tmp_path / "d", 40, 0)
    assert "too few" in message(tmp_path / "d")


# --- random ----------------------------------------------------------------------------------------


def test_noise_is_normal_seeded_and_unlabelled() -> None:
    data = load_data("random:3x16x16x10", DataOptions(seed=3))
    assert (data.classes, data.input_shape, data.labelled, data.train) == (10, (3, 16, 16), False, None)
    assert_disjoint(data)
    images, labels = everything(data.search)
    assert abs(images.mean()) < 0.02 and abs(images.std() - 1) < 0.02
    assert labels.tolist() == [0] * len(images)
    again, other = (
        load_data("random:3x16x16x10", DataOptions(seed=3)),
        load_data("random:3x16x16x10", DataOptions(seed=4)),
    )
    assert np.array_equal(everything(again.search, 7)[0], images)
    assert not np.array_equal(everything(other.search)[0], images)
    assert again.digest == data.digest != other.digest
    assert load_data("random:3x224x224", DataOptions()).classes == 1000


@pytest.mark.parametrize("spec", ["random:", "random:3x32", "random:3x0x32", "random:3x32x32x10x2", "random:axbxc"])
def test_bad_noise(spec: str) -> None:
    with pytest.raises(DataError, match="random:3x224x224"):
        load_data(spec, DataOptions())


def test_noise_takes_no_normalisation() -> None:
    with pytest.raises(DataError, match="leave out"):
        load_data("random:3x8x8", DataOptions(mean=(0.5,)))


# --- live objects ----------------------------------------------------------------------------------


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
        ((torch.zeros(1, 4, 4), 1, 2), "a model of several inputs"),
        (((torch.zeros(1, 4, 4), torch.zeros(3)), 1), "a model of several inputs"),
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
