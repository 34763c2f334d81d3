"""The closed-form solve, against brute force."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from autocomp.compress import collect, compress, moments, run
from autocomp.compress.moments import Moments, inner_products
from autocomp.compress.reconstruct import least_squares, reconstruct
from autocomp.errors import CompressError
from autocomp.graph import Layer
from autocomp.policy import Policy, Recipe
from tests.compress.conftest import UNSIGNED, Case


def moments_of(rows: np.ndarray, pooled: int = 1) -> Moments:
    centred = rows - rows.mean(0)
    return Moments(torch.tensor(rows.mean(0)), torch.tensor(centred.T @ centred / len(rows)).float(), pooled)


def linear(features: int, out: int) -> Layer:
    return Layer("layer", "linear", "linear", (out, features), 1)


def test_solve_is_the_affine_least_squares_solution() -> None:
    random = np.random.default_rng(0)
    rows = random.normal(size=(400, 12)) @ random.normal(size=(12, 12)) + random.normal(size=12)
    weight, bias = random.normal(size=(5, 12)), random.normal(size=5)
    kept = np.array([0, 2, 3, 7, 8, 11])
    solved, shift = least_squares(
        linear(12, 5), torch.tensor(weight).float(), torch.tensor(bias).float(), kept, moments_of(rows), 1e-9
    )
    design = np.concatenate([rows[:, kept], np.ones((400, 1))], axis=1)
    expected = np.linalg.lstsq(design, rows @ weight.T + bias, rcond=None)[0].T
    np.testing.assert_allclose(solved.numpy(), expected[:, :-1], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(shift.numpy(), expected[:, -1], rtol=1e-3, atol=1e-4)


def test_ridge_pulls_towards_the_original_weights() -> None:
    random = np.random.default_rng(1)
    rows = random.normal(size=(300, 6)) @ random.normal(size=(6, 6))
    weight, kept, gone = random.normal(size=(3, 6)), np.array([0, 1, 4]), np.array([2, 3, 5])
    covariance = np.cov(rows.T, bias=True)
    ridge = 0.5
    added = ridge * np.trace(covariance[np.ix_(kept, kept)]) / 3
    inverse = np.linalg.inv(covariance[np.ix_(kept, kept)] + added * np.eye(3))
    expected = weight[:, kept] + weight[:, gone] @ covariance[np.ix_(gone, kept)] @ inverse
    solved, _ = least_squares(linear(6, 3), torch.tensor(weight).float(), torch.zeros(3), kept, moments_of(rows), ridge)
    np.testing.assert_allclose(solved.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_dependent_channels_are_recovered_exactly() -> None:
    random = np.random.default_rng(2)
    free = random.normal(size=(500, 4))
    rows = np.concatenate([free, free @ random.normal(size=(4, 3)) + 2.0], axis=1)  # the last three follow the others
    weight, bias = random.normal(size=(5, 7)), random.normal(size=5)
    solved, shift = least_squares(
        linear(7, 5), torch.tensor(weight).float(), torch.tensor(bias).float(), np.arange(4), moments_of(rows), 1e-8
    )
    fresh = random.normal(size=(50, 4))
    follow = np.linalg.lstsq(np.c_[free, np.ones(500)], rows[:, 4:], rcond=None)[0]
    every = np.concatenate([fresh, np.c_[fresh, np.ones(50)] @ follow], axis=1)
    np.testing.assert_allclose(fresh @ solved.numpy().T + shift.numpy(), every @ weight.T + bias, rtol=1e-4, atol=1e-4)


def test_pooled_solve_applies_one_prediction_at_each_kernel_position() -> None:
    random = np.random.default_rng(3)
    rows = random.normal(size=(500, 5)) @ random.normal(size=(5, 5)) + 1.0
    weight, bias, kept = random.normal(size=(3, 5, 2, 2)), random.normal(size=3), np.array([0, 1, 3])
    layer = Layer("layer", "conv", "conv2d", (3, 5, 2, 2), 1, (1, 1), (0, 0), (1, 1))
    solved, shift = least_squares(
        layer, torch.tensor(weight).float(), torch.tensor(bias).float(), kept, moments_of(rows, pooled=4), 1e-9
    )
    predictor = np.linalg.lstsq(np.c_[rows[:, kept], np.ones(500)], rows[:, [2, 4]], rcond=None)[0]  # (kept + 1, gone)
    expected = weight[:, kept] + np.einsum("ogyx,kg->okyx", weight[:, [2, 4]], predictor[:-1])
    np.testing.assert_allclose(solved.numpy(), expected, rtol=1e-3, atol=1e-4)
    constant = np.einsum("ogyx,g->o", weight[:, [2, 4]], predictor[-1])
    np.testing.assert_allclose(shift.numpy(), bias + constant, rtol=1e-3, atol=1e-4)


def test_dead_and_duplicated_channels_do_no_harm() -> None:
    random = np.random.default_rng(4)
    rows = random.normal(size=(200, 6))
    rows[:, 1] = rows[:, 0]
    rows[:, 2] = 0.0
    for kept in (np.array([0, 1, 2]), np.array([2])):
        weight, bias = least_squares(linear(6, 3), torch.randn(3, 6), torch.zeros(3), kept, moments_of(rows), 0.0)
        assert weight.isfinite().all() and bias.isfinite().all()


def test_a_solve_without_finite_weights_names_the_layer() -> None:
    found = moments_of(np.random.default_rng(5).normal(size=(50, 4)))
    with pytest.raises(CompressError, match="layer"):
        least_squares(linear(4, 2), torch.full((2, 4), torch.nan), torch.zeros(2), np.array([0, 1]), found, 1e-3)


def test_outputs_vary_and_average_as_before() -> None:
    random = np.random.default_rng(8)
    rows = random.normal(size=(4000, 6)) @ random.normal(size=(6, 6)) + random.normal(size=6)
    weight, bias, kept = random.normal(size=(5, 6)), random.normal(size=5), np.array([0, 2, 3, 5])
    solved, shift = reconstruct(
        linear(6, 5), torch.tensor(weight).float(), torch.tensor(bias).float(), kept, moments_of(rows), 1e-6
    )
    plain, _ = least_squares(
        linear(6, 5), torch.tensor(weight).float(), torch.tensor(bias).float(), kept, moments_of(rows), 1e-6
    )
    before, after = rows @ weight.T + bias, rows[:, kept] @ solved.numpy().T + shift.numpy()
    np.testing.assert_allclose(after.mean(0), before.mean(0), rtol=1e-3, atol=1e-3)
    shrunk = (rows[:, kept] @ plain.numpy().T).std(0) / before.std(0)
    assert shrunk.max() < 1 and shrunk.min() < 0.9
    np.testing.assert_allclose(after.std(0), before.std(0) * np.minimum(1, 2 * shrunk), rtol=1e-3)


def test_moments_are_those_of_the_unfolded_inputs(chain: Case) -> None:
    model = chain.model
    with torch.no_grad():
        first = F.relu(model.bn1(model.conv1(chain.images)))  # type: ignore[operator]
        unfolded = F.unfold(first, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1).double().numpy()
    found = collect(chain.traced, chain.images, Recipe()).moments["conv2"]
    np.testing.assert_allclose(found.mean.numpy(), unfolded.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.gram.numpy(), np.cov(unfolded.T, bias=True), rtol=1e-3, atol=1e-4)


def test_large_moments_are_pooled_over_positions(chain: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "LIMIT_BYTES", 1000)
    found = collect(chain.traced, chain.images, Recipe()).moments["conv2"]
    model = chain.model
    with torch.no_grad():
        first = F.relu(model.bn1(model.conv1(chain.images)))  # type: ignore[operator]
        unfolded = F.unfold(first, 3, padding=1, stride=2).reshape(len(first), 8, 9, -1)
    rows = unfolded.permute(0, 2, 3, 1).reshape(-1, 8).double().numpy()
    assert found.pooled == 9
    np.testing.assert_allclose(found.gram.numpy(), np.cov(rows.T, bias=True), rtol=1e-3, atol=1e-4)


def test_reconstruction_brings_the_output_nearer(mixed: Case) -> None:
    policy = Policy({group.name: group.channels * 3 // 4 for group in mixed.traced.graph.groups})
    reference = run(mixed.traced.module, mixed.images)

    def error(reconstruction: str) -> float:
        recipe = Recipe(reconstruction=reconstruction, recalibration="never")  # type: ignore[arg-type]
        compressed = compress(mixed.traced, mixed.statistics, policy, recipe, UNSIGNED, mixed.images)
        return float((run(compressed.module, mixed.images) - reference).square().mean())

    assert error("closed_form") < 0.7 * error("none")


@pytest.mark.parametrize("shape", [(5, 3), (40, 144), (300, 401), (2, 7, 150)])
def test_inner_products_are_those_of_a_plain_matrix_product(shape: tuple[int, ...]) -> None:
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(inner_products(rows), rows.transpose(-1, -2) @ rows)
