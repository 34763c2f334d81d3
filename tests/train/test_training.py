"""Bad input, recipes, data and devices of a training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autocomp.data import DataOptions, load_data
from autocomp.data.arrays import ArraySplit
from autocomp.errors import ConfigError, DataError, ModelError
from autocomp.train import Training, TrainingRecipe, finetune
from tests.train.small import RECIPE, StopError, Unnamed, net, split, stopping, train


def test_bad_input_is_refused() -> None:
    labels = split(classes=6)
    with pytest.raises(DataError, match="labels reach from 0 to 5, the model has 4 outputs"):
        train(RECIPE, images=replace(labels, labels=labels.labels))
    with pytest.raises(ModelError, match=r"the teacher gives logits \(10, 7\), the model \(10, 4\)"):
        train(RECIPE, teacher=net(7))
    with pytest.raises(ModelError, match="attention and hints need traced models"):
        train(replace(RECIPE, attention=1.0), teacher=net(seed=1))
    with pytest.raises(DataError, match="mean and std are known"):
        train(replace(RECIPE, randaugment=9), images=Unnamed(split()))
    with pytest.raises(DataError, match="no training images"):
        finetune(Training(net(), None, split().take(np.arange(0)), RECIPE), lambda event: None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"lr": float("nan")}, "lr must be a positive number"),
        ({"lr": -1.0}, "lr must be a positive number"),
        ({"distillation": 1.5}, r"distillation must lie in \[0, 1\]"),
        ({"ema": 1.0}, r"ema must lie in \[0, 1\)"),
        ({"crop": -1}, "crop must not be negative"),
        ({"mixup": -0.1}, "mixup must not be negative"),
        ({"randaugment": 31}, "randaugment must be at most 30"),
        ({"precision": "bf16"}, "precision bf16 is for GPUs: give --device cuda"),
        ({"device": "tpu"}, "unknown device 'tpu': use cpu or cuda"),
        ({"optimizer": "lion"}, "unknown optimizer 'lion': use sgd or adamw or muon"),
        ({"schedule": "steps"}, "unknown schedule 'steps': use cosine or one_cycle"),
        ({"quantization": "none"}, "unknown quantization 'none': use learned or calibrated"),
    ],
)
def test_a_bad_recipe_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainingRecipe(**change)


def test_a_recipe_is_read_back() -> None:
    assert TrainingRecipe.from_json(RECIPE.to_json()) == RECIPE
    with pytest.raises(ConfigError, match="no recipe of training"):
        TrainingRecipe.from_json({"colour": 1})


def test_no_source_trains_on_what_it_scores_with(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    path = tmp_path / "images.npz"
    pixels = draw.integers(0, 256, (300, 4, 4, 3), np.uint8)
    np.savez(path, x_train=pixels, y_train=np.arange(300) % 3, x_test=pixels[:50], y_test=np.arange(50) % 3)
    for spec in ("digits", f"npz:{path}"):
        splits = load_data(spec, DataOptions(calibration=40, search=60, selection=60))
        train_images = splits.train
        assert isinstance(train_images, ArraySplit) and len(train_images) > 0
        for held_out in (splits.search, splits.selection):
            assert isinstance(held_out, ArraySplit)
            assert not set(train_images.indices) & set(held_out.indices)
    assert load_data("random:3x8x8", DataOptions()).train is None


def test_an_order_is_a_split_of_its_own() -> None:
    images = split()
    order = np.random.default_rng(0).permutation(len(images))
    ((pixels, labels),) = images.take(order).batches(len(images))
    ((usual, known),) = images.batches(len(images))
    assert np.array_equal(pixels, usual[order]) and np.array_equal(labels, known[order])
    assert images.take(order).digest != images.digest


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_here_is_refused() -> None:
    with pytest.raises(ConfigError, match="no CUDA device here: leave --device out"):
        train(replace(RECIPE, device="cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-3), ("bf16", 0.05), ("fp16", 0.02)])
def test_a_gpu_learns_what_a_processor_does(precision: Any, error: float, tmp_path: Path) -> None:
    expected = train(RECIPE, teacher=net(seed=1))
    recipe = replace(RECIPE, device="cuda", precision=precision)
    with pytest.raises(StopError):
        train(recipe, teacher=net(seed=1), checkpoint=tmp_path / "state", observer=stopping(7))
    found = train(recipe, teacher=net(seed=1), checkpoint=tmp_path / "state")
    assert found.losses == pytest.approx(expected.losses, rel=error)
    assert found.tensors["0.weight"].shape == (6, 3, 3, 3)
