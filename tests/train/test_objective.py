"""What training does to images and weights, against formulas written anew."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import beta
from torch import nn
from torchvision.transforms.v2 import RandAugment

from autocomp.train import Training, TrainingRecipe, finetune
from autocomp.train.augment import Batch, augmented, mixed, randomised
from autocomp.train.objective import objective
from tests.train.small import PLAIN, net, split, train, whole


def test_rates_follow_their_schedules() -> None:
    steps, cosine = 20, TrainingRecipe(lr=0.2, warmup=0.0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.2)
    expected = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        assert cosine.lr_at(step, steps) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        expected.step()
    warm = replace(cosine, warmup=0.2)
    assert [warm.lr_at(step, steps) for step in range(5)] == pytest.approx([0.04, 0.08, 0.12, 0.16, 0.2])
    cycle = [replace(warm, schedule="one_cycle").lr_at(step, steps) for step in range(steps)]
    assert cycle[4] == max(cycle) == pytest.approx(0.2) and cycle[:5] == sorted(cycle[:5])
    assert 0.2 * 0.04 < cycle[0] < 0.2 * 0.2 and cycle[4:] == sorted(cycle[4:], reverse=True)


def test_crops_and_flips_are_those_of_padded_images() -> None:
    images = torch.arange(6 * 2 * 4 * 5.0).reshape(6, 2, 4, 5) + 1
    found = augmented(images, 2, 0.5, torch.Generator().manual_seed(3))
    seen = set()
    for image, result in zip(images, found, strict=True):
        padded = torch.zeros(2, 8, 9)
        padded[:, 2:6, 2:7] = image
        candidates = {
            (top, left, flip): (crop.flip(2) if flip else crop)
            for top in range(5) for left in range(5) for flip in (False, True)
            for crop in [padded[:, top : top + 4, left : left + 5]]
        }  # fmt: skip
        seen |= {place for place, wanted in candidates.items() if torch.equal(wanted, result)}
    assert len({place[:2] for place in seen}) > 3 and {place[2] for place in seen} == {False, True}
    assert len(seen) >= 6
    assert torch.equal(augmented(images, 0, 1.0, torch.Generator()), images.flip(3))
    assert torch.equal(augmented(images, 0, 0.0, torch.Generator()), images)


def test_one_step_is_clipped_decayed_descent_on_the_smoothed_loss() -> None:
    images = split(16)
    recipe = replace(PLAIN, label_smoothing=0.2, clip=0.05, weight_decay=0.3)
    tuned = train(recipe, images=images)
    model = net().requires_grad_(True)
    pixels, labels = whole(images)
    smooth = torch.full((16, 4), 0.2 / 4)
    smooth[torch.arange(16), labels] += 0.8
    loss = -(smooth * model(pixels).log_softmax(1)).sum(1).mean()
    loss.backward()
    norm = torch.sqrt(sum((p.grad.square().sum() for p in model.parameters()), torch.zeros(())))
    assert norm > recipe.clip and tuned.losses == pytest.approx((loss.item(),), rel=1e-5)
    for name, weight in model.named_parameters():
        gradient = weight.grad * recipe.clip / norm + (0.3 * weight if weight.ndim > 1 else 0)
        expected = (weight - 0.1 * gradient).detach().numpy()
        np.testing.assert_allclose(tuned.tensors[name], expected, rtol=1e-4, atol=1e-6)


def test_the_distillation_loss_is_hintons() -> None:
    images, teacher = split(16), net(seed=7)
    recipe = replace(PLAIN, temperature=3.0, distillation=0.7)
    pixels, labels = whole(images)
    own, theirs = (model(pixels).double().numpy() for model in (net(), teacher))
    p, q = log_softmax(theirs / 3, axis=1), log_softmax(own / 3, axis=1)
    soft = (np.exp(p) * (p - q)).sum(axis=1).mean()
    hard = -log_softmax(own, axis=1)[np.arange(16), labels.numpy()].mean()
    assert train(recipe, images=images, teacher=teacher).losses == pytest.approx((0.3 * hard + 0.7 * 9 * soft,))
    hard_only = train(replace(recipe, distillation=0.0), images=images, teacher=teacher)
    assert hard_only.losses == pytest.approx((hard,))


def test_mixup_is_the_loss_of_two_labels_on_images_averaged_in_pairs() -> None:
    images, teacher = split(16), net(seed=7)
    pixels, labels = whole(images)
    plain = Batch(pixels, labels, np.arange(16), labels)
    batch = mixed(plain, 0.4, seed=3)
    apart = (batch.images - batch.share * pixels)[:, None] - (1 - batch.share) * pixels
    partner = apart.flatten(2).norm(dim=2).argmin(1).tolist()
    assert sorted(partner) == list(range(16)) and torch.equal(batch.others, labels[partner]) and 0 < batch.share < 1
    expected = batch.share * pixels + (1 - batch.share) * pixels[partner]
    torch.testing.assert_close(batch.images, expected)
    shares = [mixed(plain, 0.4, seed).share for seed in range(2000)]
    assert np.quantile(shares, (0.1, 0.5, 0.9)) == pytest.approx(beta(0.4, 0.4).ppf((0.1, 0.5, 0.9)), abs=0.04)
    recipe = replace(PLAIN, distillation=0.5, temperature=1.0)
    q, p = (model(expected).double().log_softmax(1).numpy() for model in (net(), teacher))
    hard = -(batch.share * q[np.arange(16), labels] + (1 - batch.share) * q[np.arange(16), labels[partner]]).mean()
    soft = (np.exp(p) * (p - q)).sum(axis=1).mean()
    found = objective(net(), Training(net(), teacher, images, recipe))(batch)
    assert float(found) == pytest.approx(0.5 * hard + 0.5 * soft, rel=1e-5)


def test_randaugment_is_torchvisions_on_the_pixels() -> None:
    images = split(6)
    pixels, _ = whole(images)
    state = torch.random.get_rng_state()
    found = randomised(pixels, images.preprocess, 9, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(5)
    change = RandAugment(num_ops=2, magnitude=9)
    originals = torch.from_numpy(images.images).permute(0, 3, 1, 2)
    expected = images.preprocess.normalise(np.stack([change(image).permute(1, 2, 0).numpy() for image in originals]))
    torch.random.set_rng_state(state)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    assert not np.allclose(found, pixels)


def test_the_average_follows_the_weights() -> None:
    one = replace(PLAIN, batch=48, epochs=1, ema=0.9)
    start = dict(net().named_parameters())["0.weight"].numpy()
    end = train(replace(one, ema=0.0)).tensors["0.weight"]
    decay = min(0.9, 1 / 10)
    np.testing.assert_allclose(train(one).tensors["0.weight"], decay * start + (1 - decay) * end, rtol=1e-5)


@pytest.mark.parametrize(
    "recipe",
    [
        replace(TrainingRecipe(), epochs=12, batch=16, lr=0.1, flip=0.0, crop=0, ema=0.9),
        replace(TrainingRecipe(), epochs=12, batch=16, lr=0.01, flip=0.0, crop=1, optimizer="adamw", ema=0.5),
        replace(TrainingRecipe(), epochs=12, batch=16, lr=0.03, flip=0.0, crop=1, optimizer="muon", ema=0.5),
    ],
    ids=["sgd", "adamw", "muon"],
)
def test_a_student_learns_what_its_teacher_knows(recipe: TrainingRecipe) -> None:
    images = split(96)
    pixels, labels = whole(images)
    teacher = net(seed=3)
    first = finetune(Training(teacher, None, images, replace(recipe, epochs=20)), lambda event: None)
    teacher.load_state_dict({name: torch.from_numpy(value) for name, value in first.tensors.items()})
    assert (teacher(pixels).argmax(1) == labels).float().mean() > 0.9
    tuned = train(recipe, images=images, teacher=teacher)
    student = net()
    before = (student(pixels).argmax(1) == teacher(pixels).argmax(1)).float().mean()
    student.load_state_dict({name: torch.from_numpy(value) for name, value in tuned.tensors.items()})
    assert (student(pixels).argmax(1) == teacher(pixels).argmax(1)).float().mean() > max(0.8, before)
    assert len(tuned.losses) == 12 and tuned.losses[-1] < tuned.losses[0] / 2
