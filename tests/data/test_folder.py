"""Folders of images against Pillow and torchvision."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autocomp.data import DataOptions, load_data
from autocomp.errors import DataError
from tests.data.checks import MEAN, STD, assert_disjoint, everything, keys, one_line


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
