"""Training that makes channels grow small: against the papers' formulas, on a network with batch norms."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from autocomp.errors import ConfigError, ModelError
from autocomp.train import Training, TrainingRecipe, Tuned, finetune
from autocomp.train.sparse import factors_of, filters_of
from tests.train.small import PLAIN, net, split, whole


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(32, 4),
    ).eval()  # fmt: skip


def train(module: nn.Module, recipe: TrainingRecipe) -> Tuned:
    return finetune(Training(module, None, split(), recipe), lambda event: None)


def test_a_step_of_slimming_adds_the_sign_of_each_factor() -> None:
    model = normed()
    assert list(factors_of(model)) == ["1.weight", "4.weight"]
    with torch.no_grad():
        model[1].weight[:4] *= -1  # type: ignore[index]
    recipe = replace(PLAIN, batch=48, slimming=0.3)
    found, plain = train(model, recipe), train(model, replace(recipe, slimming=0.0))
    sizes = sum(float(factor.detach().abs().sum()) for factor in factors_of(model).values())
    assert found.losses[0] - plain.losses[0] == pytest.approx(0.3 * sizes, rel=1e-4)
    for name, factor in factors_of(model).items():
        moved = plain.tensors[name] - found.tensors[name]
        np.testing.assert_allclose(moved, 0.1 * 0.3 * np.sign(factor.detach().numpy()), atol=1e-6)
    np.testing.assert_array_equal(found.tensors["0.weight"], plain.tensors["0.weight"])


def test_slimming_leaves_small_factors_and_a_model_that_still_answers() -> None:
    recipe = replace(PLAIN, epochs=60, lr=0.05, momentum=0.9, slimming=0.04)
    tuned = train(normed(), recipe)
    factors = np.abs(np.concatenate([tuned.tensors["1.weight"], tuned.tensors["4.weight"]]))
    assert (factors < 0.01 * factors.max()).sum() >= 4
    model = normed()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in tuned.tensors.items()}, strict=False)
    pixels, labels = whole(split())
    assert (model(pixels).argmax(1) == labels).float().mean() > 0.9


def test_after_an_epoch_the_filters_of_least_norm_are_zero() -> None:
    model = normed()
    assert list(filters_of(model)) == ["0.weight", "3.weight"]
    recipe = replace(PLAIN, soft_pruning=0.4, batch=48)
    found, plain = train(model, recipe), train(model, replace(recipe, soft_pruning=0.0))
    for name in filters_of(model):
        weights = plain.tensors[name]
        least = np.argsort(np.linalg.norm(weights.reshape(8, -1), axis=1))[:3]  # 0.4 of 8, rounded down
        expected = weights.copy()
        expected[least] = 0
        np.testing.assert_array_equal(found.tensors[name], expected)
    longer = train(model, replace(recipe, epochs=3, ema=0.9))
    assert all((np.abs(longer.tensors[name].reshape(8, -1)).sum(axis=1) == 0).sum() == 3 for name in filters_of(model))


def test_what_cannot_grow_sparse_is_refused() -> None:
    with pytest.raises(ModelError, match="no batch norms that could grow sparse"):
        train(net(), replace(PLAIN, slimming=0.1))
    with pytest.raises(ConfigError, match=r"soft-pruning must lie in \[0, 1\)"):
        TrainingRecipe(soft_pruning=1.0)
    with pytest.raises(ConfigError, match="slimming must not be negative"):
        TrainingRecipe(slimming=-1.0)
