"""Attention transfer and hints: losses against their formulas, what is compared, and that a pruned model learns."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocomp.compress import trace
from autocomp.errors import ModelError
from autocomp.train import Training, finetune
from autocomp.train.maps import attention_distance, hint_distance, stages, tapped
from tests.train.small import PLAIN, split, whole


class Net(nn.Module):
    """Two stages, of 8x8 and of 4x4, each of two convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 3, 1, 1), nn.Conv2d(width, 6, 3, 1, 1)
        self.third, self.fourth = nn.Conv2d(6, width, 3, 2, 1), nn.Conv2d(width, 8, 3, 1, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.maps(images)[1].mean((2, 3)))
        return logits

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What each stage ends with."""
        early = self.second(self.first(images).relu()).relu()
        return early, self.fourth(self.third(early).relu()).relu()


def traced(width: int, seed: int) -> tuple[Net, torch.fx.GraphModule]:
    torch.manual_seed(seed)
    net = Net(width)
    return net, trace(net, torch.randn(2, 3, 8, 8)).module


def by_the_paper(own: Tensor, theirs: Tensor) -> float:
    """Mean over images of || Q_S / |Q_S| - Q_T / |Q_T| ||^2, Q the sum over channels of squares."""
    total = 0.0
    for a, b in zip(own.double().detach().numpy(), theirs.double().detach().numpy(), strict=True):
        first, second = (sum(channel**2 for channel in maps).ravel() for maps in (a, b))
        total += ((first / np.linalg.norm(first) - second / np.linalg.norm(second)) ** 2).sum()
    return total / len(own)


def test_the_ends_of_the_stages_are_compared_as_in_the_paper() -> None:
    (student, small), (teacher, large) = traced(4, 0), traced(16, 1)
    images = torch.randn(5, 3, 8, 8)
    names = stages(small, large, images[:1])
    for net, module in ((student, small), (teacher, large)):
        logits, maps = tapped(module, names)(images)
        torch.testing.assert_close(logits, net(images))
        for found, wanted in zip(maps, net.maps(images), strict=True):
            torch.testing.assert_close(found, wanted)
    expected = sum(by_the_paper(a, b) for a, b in zip(student.maps(images), teacher.maps(images), strict=True))
    assert attention_distance(student.maps(images), teacher.maps(images)).item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ModelError, match="leave --attention and --hints out"):
        stages(small, traced(16, 1)[1], images[:1, :, :1, :1])


def test_a_student_comes_to_look_where_its_teacher_looks() -> None:
    (_, small), (teacher, large) = traced(4, 0), traced(16, 1)
    images = split(48)
    pixels, labels = whole(images)
    recipe = replace(PLAIN, attention=2.0, distillation=0.0, batch=48, lr=0.05)
    names = stages(small, large, pixels[:1])

    def apart(module: torch.fx.GraphModule) -> float:
        return sum(
            by_the_paper(a, b) for a, b in zip(tapped(module, names)(pixels)[1], teacher.maps(pixels), strict=True)
        )

    before = apart(small)
    hard = float(F.cross_entropy(small(pixels), labels))
    first = finetune(Training(small, large, images, recipe), lambda event: None)
    assert first.losses == pytest.approx((hard + 2 * before,), rel=1e-5)
    longer = replace(recipe, epochs=40, momentum=0.9, lr=0.1)
    tuned = finetune(Training(small, large, images, longer), lambda event: None)
    small.load_state_dict({name: torch.from_numpy(value) for name, value in tuned.tensors.items()}, strict=False)
    assert apart(small) < before / 2


def test_hints_are_relative_distances_of_the_channels_left() -> None:
    draw = torch.Generator().manual_seed(0)
    own = [torch.randn(3, 2, 4, 4, generator=draw), torch.randn(3, 5, 2, 2, generator=draw)]
    theirs = [torch.randn(3, 4, 4, 4, generator=draw), torch.randn(3, 5, 2, 2, generator=draw)]
    expected = 0.0
    for a, b in zip(own, (theirs[0][:, [1, 3]], theirs[1]), strict=True):
        for image, wanted in zip(a.double().numpy(), b.double().numpy(), strict=True):
            expected += ((image - wanted) ** 2).sum() / (wanted**2).sum() / 3
    found = hint_distance(own, theirs, [torch.tensor([1, 3]), None])
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert hint_distance([own[0].half()], [theirs[0].half()], [torch.tensor([1, 3])]).item() == pytest.approx(
        hint_distance(own[:1], theirs[:1], [torch.tensor([1, 3])]).item(), rel=1e-2
    )
    with pytest.raises(ModelError, match=r"a map of shape \(3, 2, 4, 4\) cannot be taught by one of \(3, 4, 4, 4\)"):
        hint_distance(own[:1], theirs[:1], [None])


def test_an_image_in_whose_map_is_nothing_counts_like_others() -> None:
    theirs = torch.ones(4, 2, 3, 3)
    theirs[0] = 0.0
    own = theirs + 0.1
    energy = np.array([0.001 * 0.75 * 18, 18, 18, 18])  # at least a thousandth of the mean
    assert hint_distance([own], [theirs], [None]).item() == pytest.approx((0.01 * 18 / energy).mean(), rel=1e-4)
    assert hint_distance([own - theirs], [theirs * 0], [None]).item() == pytest.approx(0.01 * 18, rel=1e-4)


def test_maps_of_unknown_channels_are_left_out() -> None:
    (_, small), (_, large) = traced(4, 0), traced(16, 1)
    images = split(8)
    recipe = replace(PLAIN, hints=1.0, distillation=0.0, batch=8)
    pixels, labels = whole(images)
    early, late = stages(small, large, pixels[:1])

    def first(channels: dict[str, np.ndarray]) -> float:
        return finetune(Training(small, large, images, recipe, channels=channels), lambda event: None).losses[0]

    own, theirs = tapped(small, [late])(pixels), tapped(large, [late])(pixels)
    expected = F.cross_entropy(own[0], labels) + hint_distance(own[1], theirs[1], [None])
    assert first({late: np.arange(8)}) == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ModelError, match="leave --hints out"):
        first({"another": np.arange(3)})
    with pytest.raises(ModelError, match="cannot be taught"):
        first({early: np.arange(3)})


def test_a_student_comes_to_see_what_its_teacher_sees() -> None:
    (_, small), (teacher, large) = traced(4, 0), traced(16, 1)
    images = split(48)
    pixels, _ = whole(images)
    names = stages(small, large, pixels[:1])
    channels = {names[0]: np.array([5, 1, 2, 3, 4, 0]), names[1]: np.arange(8)}

    def apart(module: torch.fx.GraphModule) -> float:
        maps = tapped(module, names)(pixels)[1]
        return hint_distance(maps, teacher.maps(pixels), [torch.from_numpy(channels[name]) for name in names]).item()

    recipe = replace(PLAIN, hints=1.0, distillation=0.0, batch=48, epochs=60, momentum=0.9, lr=0.02)
    before = apart(small)
    tuned = finetune(Training(small, large, images, recipe, channels=channels), lambda event: None)
    small.load_state_dict({name: torch.from_numpy(value) for name, value in tuned.tensors.items()}, strict=False)
    assert apart(small) < before / 2
