"""What several tests of splits read and check."""

from itertools import combinations

import numpy as np
import pytest

from autocomp.data import DataOptions, Split, Splits

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


def arrays(train: int = 300, test: int = 70, channels: int = 3, classes: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        "x_train": rng.integers(0, 256, (train, 9, 11, channels), np.uint8),
        "y_train": np.arange(train) % classes,
        "x_test": rng.integers(0, 256, (test, 9, 11, channels), np.uint8),
        "y_test": np.arange(test) % classes,
    }
