"""The loop: a compressed model trained on the labels and on what the uncompressed one says."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil, isfinite
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from autocomp.data import Indexed
from autocomp.data.splits import hash_arrays, permutation
from autocomp.errors import CompressError, DataError, ModelError
from autocomp.outcome import EpochDone, Observer, Phase, Step
from autocomp.policy import digest_of
from autocomp.train.augment import augmented
from autocomp.train.checkpoint import State, load, save
from autocomp.train.recipe import TrainingRecipe

__all__ = ["Trainer", "Tuned", "finetune"]

KEEP_EVERY = 100
"""Steps between checkpoints, beside those after each epoch."""
STATISTICS = ("running_mean", "running_var")
"""Last names of tensors that no gradient reaches."""
ORDER, AUGMENTATION = 0, 1
"""Streams of random numbers."""


@dataclass(frozen=True)
class Tuned:
    """A trained model.

    Attributes:
        tensors: parameter -> its average over the last steps.
        losses: mean training loss of each epoch.
        recipe: by which it was trained.
    """

    tensors: Mapping[str, NDArray[np.float32]]
    losses: tuple[float, ...]
    recipe: TrainingRecipe


class Trainer(Protocol):
    """What `finetune` does, wherever it is done."""

    def __call__(
        self,
        module: nn.Module,
        teacher: nn.Module | None,
        images: Indexed,
        recipe: TrainingRecipe,
        observer: Observer,
        checkpoint: Path | None = None,
    ) -> Tuned: ...


def finetune(
    module: nn.Module,
    teacher: nn.Module | None,
    images: Indexed,
    recipe: TrainingRecipe,
    observer: Observer,
    checkpoint: Path | None = None,
) -> Tuned:
    """Train every parameter of a module without dropout; module and teacher stay as they are. Batch norms that were not
    folded keep their statistics.

    Called again with the same arguments after any kind of stop it goes on from the checkpoint, and ends with the same
    bits as without a stop.

    Args:
        module: maps (n, c, h, w) to logits (n, classes).
        teacher: gives logits of the same classes; None to learn from labels alone.
        checkpoint: file of the state; None to keep none.

    Raises:
        DataError: there are no images, or a label is outside of the head.
        ModelError: the teacher's logits are of another shape.
        CompressError: the loss or its gradient is not finite; the last good checkpoint stays.
    """
    if len(images) == 0:
        raise DataError("there are no training images: give some, or leave fine-tuning out")
    student = _trainable(module)
    weights = {name: weight for name, weight in student.named_parameters() if weight.requires_grad}
    optimizer = _optimizer(weights, recipe)
    average = {name: weight.detach().clone() for name, weight in weights.items()}
    key = _key(module, teacher, images, recipe)
    per_epoch = ceil(len(images) / recipe.batch)
    steps = recipe.epochs * per_epoch
    state = load(checkpoint, key) if checkpoint is not None else None
    done, losses, sum_, count = 0, list[float](), 0.0, 0
    if state is not None:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(state.weights[name])
        average = {name: tensor.clone() for name, tensor in state.average.items()}
        optimizer.load_state_dict(dict(state.optimizer))
        done, losses, sum_, count = state.step, list(state.losses[0]), *state.losses[1:]
    observer(Phase("finetune", steps - done))
    for step, (batch, labels) in enumerate(_batches(images, recipe, done, steps), done):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(step, steps)
        loss = _loss(student, teacher, batch, labels, recipe)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        norm = float(nn.utils.clip_grad_norm_(weights.values(), recipe.clip))
        if not isfinite(loss.item()) or not isfinite(norm):
            kept = f"; the last good state is in {checkpoint}" if checkpoint and checkpoint.exists() else ""
            raise CompressError(
                f"training diverged: the loss is {loss.item():g} and its gradient {norm:g} at step {step + 1} of "
                f"{steps}: try a lower --lr than {recipe.lr:g}{kept}"
            )
        optimizer.step()
        decay = min(recipe.ema, (1 + step) / (10 + step)) if recipe.ema else 0.0
        with torch.no_grad():
            for name, weight in weights.items():
                average[name].lerp_(weight, 1 - decay)
        sum_, count = sum_ + loss.item(), count + 1
        observer(Step())
        ended = (step + 1) % per_epoch == 0
        if ended:
            losses.append(sum_ / count)
            sum_, count = 0.0, 0
        if checkpoint is not None and (ended or (step + 1) % KEEP_EVERY == 0):
            now = {name: weight.detach() for name, weight in weights.items()}
            save(State(key, step + 1, now, average, optimizer.state_dict(), (tuple(losses), sum_, count)), checkpoint)
        if ended:
            observer(EpochDone(len(losses), losses[-1]))
    return Tuned({name: tensor.numpy() for name, tensor in average.items()}, tuple(losses), recipe)


def _trainable(module: nn.Module) -> nn.Module:
    student = copy.deepcopy(module)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[2] not in STATISTICS)
    return student


def _optimizer(weights: Mapping[str, nn.Parameter], recipe: TrainingRecipe) -> torch.optim.Optimizer:
    """Weights in a group that decays, vectors (biases) in one that does not."""
    groups = [
        {"params": [weight for weight in weights.values() if weight.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [weight for weight in weights.values() if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, recipe.lr)
    return torch.optim.SGD(groups, recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)


def _batches(images: Indexed, recipe: TrainingRecipe, done: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of the steps from ``done`` on, whatever came before them."""
    per_epoch = ceil(len(images) / recipe.batch)
    for epoch in range(done // per_epoch, steps // per_epoch):
        begun = max(done - epoch * per_epoch, 0)
        order = permutation(len(images), _seed(recipe, ORDER, epoch))
        rest = images.take(order[begun * recipe.batch :])
        for number, (pixels, labels) in enumerate(rest.batches(recipe.batch), epoch * per_epoch + begun):
            generator = torch.Generator().manual_seed(_seed(recipe, AUGMENTATION, number))
            yield augmented(torch.from_numpy(pixels), recipe.crop, recipe.flip, generator), torch.from_numpy(labels)


def _seed(recipe: TrainingRecipe, stream: int, number: int) -> int:
    return int(np.random.SeedSequence([recipe.seed, stream, number]).generate_state(1)[0])


def _loss(
    student: nn.Module, teacher: nn.Module | None, images: Tensor, labels: Tensor, recipe: TrainingRecipe
) -> Tensor:
    """Cross-entropy with the labels, and the temperature squared times the divergence from the teacher."""
    logits = student(images)
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise DataError(
            f"labels reach from {int(labels.min())} to {int(labels.max())}, the model has {logits.shape[1]} outputs: "
            "choose data or a model that fit each other"
        )
    hard = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
    if teacher is None or recipe.distillation == 0:
        return hard
    with torch.no_grad():
        wanted = teacher(images)
    if wanted.shape != logits.shape:
        raise ModelError(
            f"the teacher gives logits {tuple(wanted.shape)}, the model {tuple(logits.shape)}: distil from a model of "
            "the same classes"
        )
    found, wanted = ((values / recipe.temperature).log_softmax(1) for values in (logits, wanted))
    soft = recipe.temperature**2 * F.kl_div(found, wanted, reduction="batchmean", log_target=True)
    return (1 - recipe.distillation) * hard + recipe.distillation * soft


def _key(module: nn.Module, teacher: nn.Module | None, images: Indexed, recipe: TrainingRecipe) -> str:
    def content(model: nn.Module | None) -> list[str] | None:
        if model is None:
            return None
        tensors = dict(model.named_parameters())
        return [*tensors, hash_arrays([tensor.detach().numpy() for tensor in tensors.values()])]

    return digest_of([recipe.to_json(), images.digest, content(module), content(teacher)])
