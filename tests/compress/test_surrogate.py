"""The loss that reconstruction cannot avoid, against least squares on the samples themselves."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from autocomp.compress import Moments, lost_outputs
from autocomp.compress.surrogate import lost_output
from autocomp.graph import Group, Member
from tests.compress.conftest import Case

Samples = NDArray[np.float64]


def samples_of(rows: int, features: int, seed: int = 0) -> Samples:
    """Correlated inputs of unequal variance, and not centred."""
    generator = np.random.default_rng(seed)
    return generator.normal(size=(rows, features)) @ generator.normal(size=(features, features)) + 3.0


def moments_of(samples: Samples, pooled: int = 1) -> Moments:
    gram = np.cov(samples, rowvar=False, bias=True)
    return Moments(torch.from_numpy(samples.mean(0)), torch.from_numpy(gram).double(), pooled)


def left_over(samples: Samples, outputs: Samples, columns: list[int]) -> float:
    """What ordinary least squares on some columns and a constant leaves of the outputs, as a part of their variance."""
    design = np.column_stack([samples[:, columns], np.ones(len(samples))])
    solved = np.linalg.lstsq(design, outputs, rcond=None)[0]
    return float(((outputs - design @ solved) ** 2).sum() / ((outputs - outputs.mean(0)) ** 2).sum())


def reading(parameter: str, positions: list[list[int]]) -> Group:
    return Group("g", len(positions), (Member(parameter, 1, tuple(map(tuple, positions))),))


def weight_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


def test_every_count_at_once_is_what_least_squares_leaves() -> None:
    samples, weight, order = samples_of(400, 5 * 4), weight_of(6, 5, 2, 2), (3, 0, 4, 2, 1)
    outputs = samples @ weight.reshape(6, 20).double().numpy().T
    lost = lost_output(reading("r.weight", [[c] for c in range(5)]), order, {"r.weight": weight},
                       {"r": moments_of(samples)})  # fmt: skip
    assert lost is not None and lost.shape == (6,)
    for kept in range(6):
        columns = [4 * channel + inner for channel in order[5 - kept :] for inner in range(4)]
        assert lost[kept] == pytest.approx(left_over(samples, outputs, columns), abs=1e-5)
    assert lost[0] == pytest.approx(1.0, abs=1e-5) and lost[5] == 0.0
    assert np.all(np.diff(lost) <= 0)


def test_inputs_of_other_groups_help_and_flattened_channels_go_together() -> None:
    samples, weight = samples_of(300, 9), weight_of(4, 9)
    outputs = samples @ weight.double().numpy().T
    group = reading("r.weight", [[3, 4], [5, 6]])  # 0 to 2, 7 and 8 belong to others and stay
    lost = lost_output(group, (1, 0), {"r.weight": weight}, {"r": moments_of(samples)})
    assert lost is not None
    others = [0, 1, 2, 7, 8]
    assert lost[1] == pytest.approx(left_over(samples, outputs, [*others, 3, 4]), abs=1e-5)
    assert lost[0] == pytest.approx(left_over(samples, outputs, others), abs=1e-5)


def test_pooled_moments_take_every_kernel_position_as_a_sample() -> None:
    samples, weight = samples_of(500, 4), weight_of(3, 4, 1, 2)
    lost = lost_output(reading("r.weight", [[c] for c in range(4)]), (2, 0, 1, 3), {"r.weight": weight},
                       {"r": moments_of(samples, pooled=2)})  # fmt: skip
    outputs = samples @ weight.double().numpy().transpose(0, 2, 3, 1).reshape(6, 4).T
    assert lost is not None
    assert lost[2] == pytest.approx(left_over(samples, outputs, [1, 3]), abs=1e-5)


def test_several_readers_add_up_and_none_gives_none() -> None:
    weights = {"a.weight": weight_of(3, 4), "b.weight": weight_of(5, 4, seed=2)}
    moments = {"a": moments_of(samples_of(200, 4)), "b": moments_of(samples_of(200, 4, seed=5))}
    each = tuple((channel,) for channel in range(4))
    members = tuple(Member(name, 1, each) for name in weights)
    both = lost_output(Group("g", 4, members), (0, 1, 2, 3), weights, moments)
    alone = [lost_output(Group("g", 4, (member,)), (0, 1, 2, 3), weights, moments) for member in members]
    assert both is not None and alone[0] is not None and alone[1] is not None
    np.testing.assert_allclose(both, alone[0] + alone[1])
    assert lost_output(Group("g", 4, members), (0, 1, 2, 3), weights, {}) is None


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_dead_doubled_and_constant_inputs(order: tuple[int, ...]) -> None:
    samples = samples_of(200, 3)
    samples[:, 1] = 2 * samples[:, 0]
    samples[:, 2] = 7.0
    group, weight = reading("r.weight", [[0], [1], [2]]), {"r.weight": weight_of(2, 3)}
    lost = lost_output(group, order, weight, {"r": moments_of(samples)})
    assert lost is not None and np.isfinite(lost).all()
    # one of the two that are alike says all; the constant says nothing
    assert lost[2] == pytest.approx(0.0, abs=1e-4)
    dead = lost_output(group, order, weight, {"r": moments_of(np.zeros((10, 3)))})
    assert dead is not None and not dead.any()


def test_real_groups_lose_more_with_every_channel(mixed: Case) -> None:
    lost = lost_outputs(mixed.traced, mixed.statistics)
    assert set(lost) <= set(mixed.traced.graph.group_by_name) and len(lost) > 3
    for name, values in lost.items():
        assert values.shape == (mixed.traced.graph.group_by_name[name].channels + 1,)
        assert np.all(np.diff(values) <= 1e-9) and values[-1] == 0
