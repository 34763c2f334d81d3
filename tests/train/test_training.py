"""Training: its parts against formulas written anew, stops in the middle, divergence, and bad input."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import beta
from torch import Tensor, nn
from torchvision.transforms.v2 import RandAugment

from autocomp.data import DataOptions, load_data
from autocomp.data.arrays import ArraySplit
from autocomp.data.preprocess import Preprocess
from autocomp.errors import CompressError, ConfigError, DataError, ModelError, RunError
from autocomp.outcome import Event, Step
from autocomp.train import Training, TrainingRecipe, Tuned, finetune
from autocomp.train.augment import Batch, augmented, mixed, randomised
from autocomp.train.objective import objective

PLAIN = TrainingRecipe(
    epochs=1, batch=16, lr=0.1, momentum=0.0, weight_decay=0.0, warmup=0.0, ema=0.0, clip=1e6, crop=0, flip=0.0
)
"""No part of the recipe but the step itself."""


def net(classes: int = 4, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32, classes)
    ).requires_grad_(False)


def split(count: int = 48, classes: int = 4) -> ArraySplit:
    """Noise, each class brighter in a quarter of its own."""
    draw = np.random.default_rng(0)
    pixels, labels = draw.integers(0, 128, (count, 8, 8, 3)).astype(np.uint8), np.arange(count) % classes
    for image, label in zip(pixels, labels, strict=True):
        row, column = divmod(label % 4, 2)
        image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 60
    return ArraySplit(pixels, labels, np.arange(count), Preprocess((0.3,) * 3, (0.3,) * 3), "content")


@dataclass
class Unnamed:
    """Images that nothing is known of but what they are."""

    inner: ArraySplit

    @property
    def digest(self) -> str:
        return self.inner.digest

    def __len__(self) -> int:
        return len(self.inner)

    def batches(self, size: int) -> Any:
        return self.inner.batches(size)

    def take(self, indices: Any) -> "Unnamed":
        return Unnamed(self.inner.take(indices))


def train(recipe: TrainingRecipe, *, teacher: nn.Module | None = None, images: Any = None, **more: Any) -> Tuned:
    observer = more.pop("observer", lambda event: None)
    return finetune(Training(net(), teacher, images or split(), recipe, **more), observer)


def whole(images: ArraySplit) -> tuple[Tensor, Tensor]:
    ((pixels, labels),) = images.batches(len(images))
    return torch.from_numpy(pixels), torch.from_numpy(labels)


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
    found = objective(net(), teacher, images, recipe)(batch)
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


@pytest.mark.parametrize("change", [{"mixup": 0.4}, {"randaugment": 9}], ids=str)
def test_what_changes_images_is_the_same_after_a_stop(change: dict[str, Any], tmp_path: Path) -> None:
    recipe = replace(RECIPE, **change)
    expected = train(recipe, teacher=net(seed=1))
    assert expected.losses != train(RECIPE, teacher=net(seed=1)).losses
    with pytest.raises(StopError):
        train(recipe, teacher=net(seed=1), checkpoint=tmp_path / "state", observer=stopping(7))
    assert train(recipe, teacher=net(seed=1), checkpoint=tmp_path / "state").losses == expected.losses


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
    ],
    ids=["sgd", "adamw"],
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


class StopError(Exception):
    pass


def stopping(after: int) -> Callable[[Event], None]:
    steps = 0

    def observer(event: Event) -> None:
        nonlocal steps
        steps += isinstance(event, Step)
        if steps == after:
            raise StopError

    return observer


RECIPE = replace(TrainingRecipe(), epochs=3, batch=10, lr=0.05, crop=1, momentum=0.9)
"""Five steps an epoch, the last of 8 images."""


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("after", [4, 7, 10])
def test_a_stopped_training_ends_with_the_same_bits(
    after: int, optimizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autocomp.train.loop.KEEP_EVERY", 3)
    recipe, path = replace(RECIPE, optimizer=optimizer), tmp_path / "state"
    expected = train(recipe, teacher=net(seed=1))
    with pytest.raises(StopError):
        train(recipe, teacher=net(seed=1), checkpoint=path, observer=stopping(after))
    events: list[Event] = []
    found = train(recipe, teacher=net(seed=1), checkpoint=path, observer=events.append)
    kept = max(step for step in range(after) if step % 3 == 0 or step % 5 == 0)
    assert sum(isinstance(event, Step) for event in events) == 15 - kept
    assert found.losses == expected.losses
    assert all(np.array_equal(found.tensors[name], value) for name, value in expected.tensors.items())
    again = train(recipe, teacher=net(seed=1), checkpoint=path, observer=stopping(1))  # nothing is left to do
    assert np.array_equal(again.tensors["0.weight"], expected.tensors["0.weight"])


def test_a_training_that_pauses_ends_with_the_same_bits(tmp_path: Path) -> None:
    path, expected = tmp_path / "state", train(RECIPE)
    for epochs in (1, 2, 1):  # the last one asks for less than there is, which is trained anew
        paused = train(RECIPE, checkpoint=path, until=epochs)
        assert paused.losses == expected.losses[:epochs]
    found = train(RECIPE, checkpoint=path)
    assert found.losses == expected.losses
    assert all(np.array_equal(found.tensors[name], value) for name, value in expected.tensors.items())


def test_the_teacher_is_asked_once_where_images_do_not_change(tmp_path: Path) -> None:
    asked = []

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net(seed=1)

        def forward(self, images: Tensor) -> Tensor:
            asked.append(len(images))
            logits: Tensor = self.inner(images)
            return logits

    fixed = replace(RECIPE, crop=0, flip=0.0)
    found = train(fixed, teacher=Counted())
    assert asked == [10, 10, 10, 10, 8]
    for recipe, passes in ((replace(fixed, epochs=1), 1), (replace(fixed, crop=1), 3), (replace(fixed, flip=0.5), 3)):
        asked.clear()
        train(recipe, teacher=Counted())
        assert asked == passes * [10, 10, 10, 10, 8]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autocomp.train.objective.CACHE_BYTES", 0)
        asked.clear()
        anew = train(fixed, teacher=Counted())
    assert len(asked) == 1 + 15  # too large: found out from the first batch
    assert anew.losses == pytest.approx(found.losses, rel=1e-5)
    with pytest.raises(StopError):
        train(fixed, teacher=Counted(), checkpoint=tmp_path / "state", observer=stopping(7))
    went_on = train(fixed, teacher=Counted(), checkpoint=tmp_path / "state")
    assert went_on.losses == found.losses


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    expected = train(RECIPE)
    with pytest.raises(StopError):
        train(RECIPE, checkpoint=path, observer=stopping(8))
    before = path.read_bytes()

    def killed(*_: object) -> None:
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", killed)
        with pytest.raises(StopError):
            train(RECIPE, checkpoint=path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    found = train(RECIPE, checkpoint=path)
    assert all(np.array_equal(found.tensors[name], value) for name, value in expected.tensors.items())


def test_a_checkpoint_of_something_else_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "state"
    train(RECIPE, checkpoint=path)
    other = replace(RECIPE, lr=0.01)
    assert train(other, checkpoint=path).losses == train(other).losses
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunError, match="no checkpoint of training: remove it"):
        train(other, checkpoint=path)


def test_divergence_names_the_step_and_keeps_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    images = split()
    dark = replace(images, preprocess=Preprocess((0.3,) * 3, (1e-38,) * 3))  # pixels beyond what sums can hold
    with pytest.raises(CompressError, match=r"its gradient (nan|inf) at step 1 of 15: try a lower --lr than 0.05$"):
        train(RECIPE, images=dark, checkpoint=path)
    assert not path.exists()
    monkeypatch.setattr("autocomp.train.loop.KEEP_EVERY", 1)
    with pytest.raises(CompressError, match=r"training diverged.* at step 2 of 15: .*last good state is in .*state$"):
        train(replace(RECIPE, lr=1e38), checkpoint=path)
    assert torch.load(path, weights_only=True)["step"] == 1


def test_bad_input_is_refused() -> None:
    labels = split(classes=6)
    with pytest.raises(DataError, match="labels reach from 0 to 5, the model has 4 outputs"):
        train(RECIPE, images=replace(labels, labels=labels.labels))
    with pytest.raises(ModelError, match=r"the teacher gives logits \(10, 7\), the model \(10, 4\)"):
        train(RECIPE, teacher=net(7))
    with pytest.raises(ModelError, match="attention transfer needs traced models"):
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
        ({"optimizer": "lion"}, "unknown optimizer 'lion': use sgd or adamw"),
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
