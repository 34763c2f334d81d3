"""Splits of arrays (digits, npz, CIFAR-10) are compared with plain numpy and checked for leaks between them."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from autocomp.data import DataOptions, load_data
from autocomp.errors import DataError
from tests.data.checks import MEAN, SMALL, STD, arrays, assert_disjoint, everything, keys, one_line


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
