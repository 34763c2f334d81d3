"""Steps of Muon, against the singular value decomposition and against PyTorch's own."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from autocomp.train.optimizers import Muon, optimizers, orthogonal
from tests.train.small import RECIPE


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (12, 12)])
def test_an_orthogonal_matrix_keeps_directions_and_evens_their_sizes(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    assert sizes.max() / sizes.min() > 1.5
    turned = left.T @ orthogonal(matrix) @ right.T
    evened = turned.diagonal()
    assert evened.min() > 0.6 and evened.max() < 1.3
    assert torch.allclose(turned, torch.diag(evened), atol=1e-6)
    assert torch.allclose(orthogonal(1e-6 * matrix), orthogonal(matrix))
    assert not orthogonal(torch.zeros(shape)).any()


@pytest.mark.parametrize("shape", [(8, 27), (27, 8)])
def test_steps_are_those_of_pytorchs_muon(shape: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=draw)
    own, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    steppers = (
        Muon([own], 0.1, 0.9, 0.5),
        torch.optim.Muon([theirs], 0.1, weight_decay=0.5, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(4):
        gradient = torch.randn(shape, generator=draw)
        for weight, stepper in zip((own, theirs), steppers, strict=True):
            weight.grad = gradient.clone()
            stepper.step()
    moved = theirs - start
    assert (own - theirs).norm() < 0.02 * moved.norm()  # theirs is computed in bfloat16


def test_a_convolution_moves_as_the_matrix_of_its_filters() -> None:
    draw = torch.Generator().manual_seed(2)
    start, gradient = torch.randn(4, 3, 2, 2, generator=draw), torch.randn(4, 3, 2, 2, generator=draw)
    filters, flat = nn.Parameter(start.clone()), nn.Parameter(start.clone().flatten(1))
    filters.grad, flat.grad = gradient, gradient.flatten(1)
    Muon([filters], 0.1).step()
    Muon([flat], 0.1).step()
    assert torch.equal(filters.flatten(1), flat)


def test_muon_takes_matrices_and_adamw_the_rest() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.Flatten(), nn.Linear(6, 2))
    weights = dict(net.named_parameters())
    muon, adamw = optimizers(weights, replace(RECIPE, optimizer="muon", weight_decay=0.1))
    assert isinstance(muon, Muon) and isinstance(adamw, torch.optim.AdamW)
    by_id = {id(weight): name for name, weight in weights.items()}
    taken = [[by_id[id(weight)] for group in each.param_groups for weight in group["params"]] for each in (muon, adamw)]
    assert taken == [["0.weight", "3.weight"], ["1.weight", "0.bias", "1.bias", "3.bias"]]
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize(("optimizer", "expected"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_others_take_every_weight(optimizer: str, expected: type) -> None:
    weights = dict(nn.Linear(3, 2).named_parameters())
    (found,) = optimizers(weights, replace(RECIPE, optimizer=optimizer))  # type: ignore[arg-type]
    assert type(found) is expected and sum(len(group["params"]) for group in found.param_groups) == 2
