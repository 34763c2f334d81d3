"""A model trained to grow sparse before a search: its file, what is counted, stops, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from autocomp.api import sparsify
from autocomp.config import SearchConfig
from autocomp.data import load_data
from autocomp.errors import ConfigError, DataError
from autocomp.models import load_model
from autocomp.outcome import Event, Step
from autocomp.study.loading import data_options
from tests.study import tiny

SETTINGS: dict[str, Any] = {
    "epochs": 12, "lr": 0.05, "ema": 0.5, "slimming": 0.3, "soft_pruning": 0.25, "crop": 0, "flip": 0.0,
    "distillation": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> SearchConfig:
    path = tiny.saved(tmp_path_factory.mktemp("sparse") / "images.npz", 700, 200)
    return SearchConfig(
        model="tests.study.tiny:normed", data=f"npz:{path}", calibration_images=50, search_images=50,
        selection_images=100,
    )  # fmt: skip


def ignore(event: Event) -> None:
    del event


def test_the_weights_are_sparse_whatever_stops_the_training(config: SearchConfig, tmp_path: Path) -> None:
    found = sparsify(config, SETTINGS, tmp_path / "once.safetensors", ignore)
    tensors = load_file(tmp_path / "once.safetensors")
    model = load_model(config.model, tmp_path / "once.safetensors", 4, embedded=False)
    assert set(model.module.state_dict()) == set(tensors)
    filters = [tensors[name].reshape(16, -1) for name in ("0.weight", "3.weight")]
    zeros = sum(int((np.abs(rows).sum(axis=1) == 0).sum()) for rows in filters)
    assert found.filters == (32, 0, zeros) and zeros == 2 * 4
    small = sum(int((np.abs(tensors[name]) < 0.01).sum()) for name in ("1.weight", "4.weight"))  # they were all 1
    assert found.factors == (32, 0, small) and small > 16
    ((images, labels),) = load_data(config.data, data_options(config)).selection.batches(100)
    answers = model.module(torch.from_numpy(images)).argmax(1).numpy()
    assert found.accuracy[1] == (answers == labels).mean() and len(found.losses) == 12
    np.testing.assert_array_equal(tensors["1.running_var"], np.ones(16))  # statistics stay
    steps = iter(range(9))

    def stopped(event: Event) -> None:
        if isinstance(event, Step) and next(steps, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sparsify(config, SETTINGS, tmp_path / "again.safetensors", stopped)
    assert not (tmp_path / "again.safetensors").exists()
    sparsify(config, SETTINGS, tmp_path / "again.safetensors", ignore)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "once.safetensors").read_bytes()
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}


def test_bad_input_leaves_nothing(config: SearchConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing would grow sparse: give --slimming"):
        sparsify(config, {"epochs": 1}, tmp_path / "a.safetensors", ignore)
    noise = SearchConfig(model="tests.study.tiny:normed", data="random:3x8x8x4")
    with pytest.raises(DataError, match="no training images"):
        sparsify(noise, SETTINGS, tmp_path / "a.safetensors", ignore)
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.safetensors").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        sparsify(config, SETTINGS, tmp_path / "a.safetensors", ignore)
    assert (tmp_path / "a.safetensors").read_text() == "mine"
