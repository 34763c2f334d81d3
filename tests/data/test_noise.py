"""Random images."""

import numpy as np
import pytest

from autocomp.data import DataOptions, load_data
from autocomp.errors import DataError
from tests.data.checks import assert_disjoint, everything


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
