"""Criteria of importance, each against its formula, brute force, finite differences or scikit-learn."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from sklearn.linear_model import lasso_path
from torch import nn
from torch.nn import functional as F

from autocomp.compress import collect, compress, run, trace
from autocomp.compress.elimination import eliminated
from autocomp.compress.importance import CRITERIA, Evidence
from autocomp.compress.moments import Moments
from autocomp.compress.ordering import order_channels, select
from autocomp.compress.readers import readers_of
from autocomp.errors import CompressError
from autocomp.graph import Group, Member
from autocomp.policy import Importance, Policy, Recipe
from tests.compress.conftest import UNSIGNED, Case, evidence_of
from tests.compress.nets import Chain, Mixed, images, trained


class Tiny:
    """A group of five channels, two features each, behind two linear readers; raw samples instead of a model."""

    positions = tuple((2 * channel, 2 * channel + 1) for channel in range(5))

    def __init__(self, evidence: Evidence, seed: int = 6, readers: int = 2) -> None:
        random = np.random.default_rng(seed)
        names = [f"reader{index}" for index in range(readers)]
        self.group = Group("writer", 5, tuple(Member(f"{name}.weight", 1, self.positions) for name in names))
        self.rows = {name: random.normal(size=(300, 10)) @ random.normal(size=(10, 10)) + 0.5 for name in names}
        # the readers' outputs differ a hundredfold in size
        self.weights = {name: random.normal(size=(4, 10)) * 10.0**index for index, name in enumerate(names)}
        tensors = {f"{name}.weight": torch.tensor(weight).float() for name, weight in self.weights.items()}
        moments = {name: self.moments(rows) for name, rows in self.rows.items()}
        self.evidence = replace(evidence, tensors=tensors, moments=moments, ridge=1e-6)

    @staticmethod
    def moments(rows: np.ndarray) -> Moments:
        return Moments(torch.tensor(rows.mean(0)), torch.tensor(np.cov(rows.T, bias=True)).float(), 1)

    def readers(self, *, centred: bool) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
        """Rows, weight, and the variance of the outputs, by reader."""
        for name, rows in self.rows.items():
            weight = self.weights[name]
            variance = float(np.var(rows @ weight.T, axis=0).sum())
            yield (rows - rows.mean(0) if centred else rows), weight, variance

    def columns(self, channels: list[int]) -> list[int]:
        return [column for channel in channels for column in self.positions[channel]]


def greedy(error: Callable[[list[int]], float]) -> list[int]:
    """Every channel tried out at every step; the error is of the channels that stay."""
    alive, order = list(range(5)), []
    while alive:
        order.append(min(alive, key=lambda gone: error([channel for channel in alive if channel != gone])))
        alive.remove(order[-1])
    return order


def order_of(name: Importance, group: Group, evidence: Evidence) -> list[int]:
    return [int(channel) for channel in np.argsort(CRITERIA[name](group, evidence), kind="stable")]


def test_every_name_of_a_recipe_has_a_criterion() -> None:
    assert tuple(CRITERIA) == get_args(Importance)


@pytest.mark.parametrize("seed", range(4))
def test_least_error_is_greedy_elimination_with_a_solve_at_each_step(chained: Evidence, seed: int) -> None:
    tiny = Tiny(chained, seed)

    def error(channels: list[int]) -> float:
        left, total = tiny.columns(channels), 0.0
        for rows, weight, variance in tiny.readers(centred=True):
            solved, *_ = np.linalg.lstsq(rows[:, left], rows @ weight.T, rcond=None)
            total += float(np.square(rows @ weight.T - rows[:, left] @ solved).sum(1).mean()) / variance
        return total

    assert order_of("least_error", tiny.group, tiny.evidence) == greedy(error)


def test_elimination_takes_wide_groups_several_channels_at_a_time(chained: Evidence) -> None:
    random = np.random.default_rng(0)
    rows, weight = random.normal(size=(500, 130)), random.normal(size=(3, 130))
    weight[:, 100:] = 0.0
    member = Member("reader.weight", 1, tuple((channel,) for channel in range(130)))
    tensors = {"reader.weight": torch.tensor(weight).float()}
    order = eliminated(readers_of(Group("writer", 130, (member,)), tensors, {"reader": Tiny.moments(rows)}), 1e-3)
    assert sorted(order) == list(range(130))
    assert set(order[:30]) == set(range(100, 130))


@pytest.mark.parametrize("seed", range(4))
def test_thinet_removes_what_adds_least_to_the_squared_sum_of_the_removed(chained: Evidence, seed: int) -> None:
    tiny = Tiny(chained, seed)

    def error(channels: list[int]) -> float:
        gone = tiny.columns([channel for channel in range(5) if channel not in channels])
        parts = tiny.readers(centred=False)
        return sum(np.square(rows[:, gone] @ w[:, gone].T).sum(1).mean() / variance for rows, w, variance in parts)

    assert order_of("thinet", tiny.group, tiny.evidence) == greedy(error)


@pytest.mark.parametrize("seed", range(4))
def test_lasso_is_the_path_of_scikit_learn_on_the_samples(chained: Evidence, seed: int) -> None:
    tiny = Tiny(chained, seed)
    design = np.concatenate(
        [
            np.stack([(rows[:, p] @ w[:, p].T).ravel() for p in map(list, tiny.positions)], 1) / variance**0.5
            for rows, w, variance in tiny.readers(centred=True)
        ]
    )
    penalties, path, _ = lasso_path(design, design.sum(1), eps=1e-5, n_alphas=2000, tol=1e-9, max_iter=100_000)
    expected = ((path != 0) * penalties).max(1)
    scores = CRITERIA["lasso"](tiny.group, tiny.evidence)
    np.testing.assert_allclose(scores / scores.max(), expected / expected.max(), rtol=0.01, atol=1e-4)


def test_group_norms_sum_what_writes_and_reads_a_channel(mixture: Evidence) -> None:
    group, state = mixture.traced.graph.group_by_name["last"], mixture.traced.module.state_dict()
    for name, power in (("group_l2", 2), ("group_l1", 1)):
        powers = {key: tensor.double().abs() ** power for key, tensor in state.items()}
        expected = powers["last.weight"].sum((1, 2, 3)) + powers["hidden.weight"].reshape(20, 8, 16).sum((0, 2))
        np.testing.assert_allclose(CRITERIA[name](group, mixture), expected.numpy())  # type: ignore[index]


def test_bn_gamma_sums_the_factors_of_all_writers(mixture: Evidence, mixed: Case) -> None:
    streams = [
        group
        for group in mixture.traced.graph.groups
        if {"block.conv2.weight", "block.shortcut.0.weight"} <= {member.parameter for member in group.members}
    ]
    model = mixed.model
    norms = (model.block.bn2, model.block.shortcut[1], model.plain.bn2)  # type: ignore[union-attr, index]
    expected = sum(norm.weight.detach().abs() for norm in norms)  # type: ignore[union-attr, operator]
    assert len(streams) == 1
    np.testing.assert_allclose(CRITERIA["bn_gamma"](streams[0], mixture), expected.numpy(), rtol=1e-6)


def test_bn_gamma_without_a_norm_goes_by_weights(mixture: Evidence) -> None:
    group = mixture.traced.graph.group_by_name["hidden"]
    np.testing.assert_array_equal(CRITERIA["bn_gamma"](group, mixture), CRITERIA["group_l2"](group, mixture))


def test_fpgm_sums_distances_between_the_filters_of_all_writers(mixture: Evidence) -> None:
    for group in mixture.traced.graph.groups:
        total = np.zeros((group.channels, group.channels))
        for member in group.members:
            weight = mixture.tensors[member.parameter].double().numpy()
            if member.axis == 0 and weight.ndim > 1:
                rows = np.stack([weight[list(positions)].ravel() for positions in member.positions])
                total += np.square(rows[:, None] - rows[None]).sum(2)
        np.testing.assert_allclose(CRITERIA["fpgm"](group, mixture), np.sqrt(total).sum(1), rtol=1e-6)


def test_activation_is_the_mean_square_that_the_reader_sees(chained: Evidence, chain: Case) -> None:
    with torch.no_grad():
        first = F.relu(chain.model.bn1(chain.model.conv1(chain.images)))  # type: ignore[operator]
        unfolded = F.unfold(first, 3, padding=1, stride=2).reshape(len(first), 8, -1).double()
    power = unfolded.square().mean((0, 2)).numpy()
    found = CRITERIA["activation"](chained.traced.graph.group_by_name["conv1"], chained)
    np.testing.assert_allclose(found, power / power.sum(), rtol=1e-3)


def permuted(model: nn.Module, order: list[int]) -> nn.Module:
    """The same function with the channels between conv1 and conv2 in another order."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in state:
        if name.startswith(("conv1.", "bn1.")) and state[name].ndim:
            state[name] = state[name][order]
    state["conv2.weight"] = state["conv2.weight"][:, order]
    result = Chain()
    result.load_state_dict(state)
    return result.eval()


@pytest.mark.parametrize("name", [name for name in CRITERIA if name != "random"])
def test_renaming_channels_renames_their_scores(name: Importance, chain: Case, chained: Evidence) -> None:
    order = [3, 7, 0, 6, 1, 5, 2, 4]
    other = evidence_of(trace(permuted(chain.model, order), chain.images[:2]), chain.images)
    group = chained.traced.graph.group_by_name["conv1"]
    expected = CRITERIA[name](group, chained)[order]
    found = CRITERIA[name](other.traced.graph.group_by_name["conv1"], other)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", CRITERIA)
def test_orders_hold_every_channel_and_repeat(name: Importance, mixed: Case) -> None:
    first, second = (collect(mixed.traced, mixed.images, Recipe(importance=name)).orders for _ in range(2))
    assert first == second
    for group in mixed.traced.graph.groups:
        assert sorted(first[group.name]) == list(range(group.channels))


def test_random_follows_the_seed(mixture: Evidence) -> None:
    first, second = (order_channels(replace(mixture, seed=seed), "random") for seed in (0, 1))
    assert first != second
    assert first["hidden"][:8] != first["last"]


def test_the_largest_channels_stay_and_the_earlier_of_equals(chained: Evidence) -> None:
    ones = {"conv1.weight": torch.ones(8, 3, 3, 3), "conv2.weight": torch.ones(6, 8, 3, 3)}
    ones["conv1.weight"][5] = 2.0
    orders = order_channels(replace(chained, tensors={**chained.tensors, **ones}), "group_l2")
    assert orders["conv1"] == (7, 6, 4, 3, 2, 1, 0, 5)
    assert select(orders, Policy({"conv1": 3})) == {"conv1": (0, 1, 5)}


@pytest.mark.parametrize("name", [name for name in CRITERIA if name not in ("random", "bn_gamma", "fpgm")])
def test_a_dead_channel_goes_first(name: Importance, chain: Case) -> None:
    model = trained(Chain())
    with torch.no_grad():
        model.bn1.weight[4] = model.bn1.bias[4] = 0.0  # type: ignore[union-attr, operator, index]
        model.conv2.weight[:, 4] = 0.0  # type: ignore[union-attr, index]
    evidence = evidence_of(trace(model, chain.images[:2]), chain.images)
    assert order_channels(evidence, name)["conv1"][0] == 4


@pytest.mark.parametrize("name", CRITERIA)
def test_constant_images_and_copied_channels_give_an_order(name: Importance) -> None:
    model = trained(Mixed())
    with torch.no_grad():
        for part in (model.last.weight, model.last.bias):  # type: ignore[union-attr]
            part[1:4] = part[:1]  # type: ignore[index]
    data = torch.zeros(8, 3, 16, 16)
    traced = trace(model, images(2, 16))
    orders = order_channels(evidence_of(traced, data), name)
    assert all(sorted(orders[group.name]) == list(range(group.channels)) for group in traced.graph.groups)


@pytest.mark.parametrize("name", ["least_error", "thinet", "lasso", "activation", "taylor", "discrimination"])
def test_groups_whose_readers_never_ran_go_by_weights(name: Importance, chained: Evidence) -> None:
    group = chained.traced.graph.group_by_name["conv1"]
    writers = replace(group, members=tuple(member for member in group.members if member.axis == 0))
    for part, evidence in ((group, replace(chained, moments={})), (writers, chained)):
        if name in ("taylor", "discrimination") and part is group:
            continue  # these look at gradients instead of moments
        np.testing.assert_array_equal(CRITERIA[name](part, evidence), CRITERIA["group_l2"](part, evidence))


def test_scores_that_are_not_finite_are_refused_by_name(chained: Evidence) -> None:
    broken = {**chained.tensors, "conv1.weight": torch.full((8, 3, 3, 3), torch.nan)}
    with pytest.raises(CompressError, match="group_l1 scores of conv1"):
        order_channels(replace(chained, tensors=broken), "group_l1")


def test_least_error_prunes_better_than_magnitude_and_chance() -> None:
    """Mean logarithm of the output's error with half of all channels, streams included, over several networks."""
    errors: dict[str, list[float]] = {"least_error": [], "group_l2": [], "random": []}
    for seed in range(4):
        data = images(64, 16, seed + 1)
        traced = trace(trained(Mixed(), seed), data[:2])
        evidence = evidence_of(traced, data)
        policy = Policy({group.name: group.channels // 2 for group in traced.graph.groups})
        statistics, reference = collect(traced, data, Recipe(importance="random")), run(traced.module, data)
        for name in errors:
            found = replace(statistics, orders=order_channels(evidence, name))  # type: ignore[arg-type]
            module = compress(traced, found, policy, Recipe(recalibration="never"), UNSIGNED, data).module
            errors[name].append(float(torch.log((run(module, data) - reference).square().mean())))
    least, magnitude, chance = (float(np.mean(found)) for found in errors.values())
    assert least < magnitude - 0.3
    assert least < chance - 0.3
