"""The loop: a compressed model trained on the labels and on what the uncompressed one says."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import ceil, isfinite

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from autocomp.data import Indexed
from autocomp.data.preprocess import Preprocess
from autocomp.data.splits import hash_arrays, permutation
from autocomp.errors import CompressError, ConfigError, DataError, ModelError
from autocomp.outcome import EpochDone, Observer, Phase, Step
from autocomp.policy import digest_of
from autocomp.train.augment import Batch, augmented, mixed, randomised
from autocomp.train.checkpoint import State, load, save
from autocomp.train.norms import folded, normalised, samples
from autocomp.train.objective import objective
from autocomp.train.optimizers import optimizers
from autocomp.train.recipe import TrainingRecipe
from autocomp.train.sparse import filled, filters_of, soften
from autocomp.train.training import Training, Tuned

__all__ = ["device_of", "finetune"]

KEEP_EVERY = 100
"""Steps between checkpoints, beside those after each epoch."""
STATISTICS = ("running_mean", "running_var")
"""Last names of tensors that no gradient reaches."""
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ORDER, AUGMENTATION, RANDAUGMENT, MIXUP = range(4)
"""Streams of random numbers."""


def finetune(training: Training, observer: Observer) -> Tuned:
    """Train every parameter of a module; module and teacher stay as they are. Batch norms that were not folded keep
    their statistics; those that were may be live meanwhile.

    Called again with the same training after any kind of stop it goes on from the checkpoint, and ends with the same
    bits as without a stop.

    Raises:
        DataError: there are no images, or a label is outside of the head.
        ModelError: the teacher's logits are of another shape, or norms are to be live and none were folded.
        CompressError: the loss or its gradient is not finite; the last good checkpoint stays.
        ConfigError: the device is not here.
    """
    images, recipe, checkpoint = training.images, training.recipe, training.checkpoint
    if len(images) == 0:
        raise DataError("there are no training images: give some, or leave fine-tuning out")
    device = device_of(recipe)
    student = _trainable(training, device)
    weights = {name: weight for name, weight in student.named_parameters() if weight.requires_grad}
    steppers = optimizers(weights, recipe)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
    average = {name: weight.detach().clone() for name, weight in weights.items()}
    per_epoch = ceil(len(images) / recipe.batch)
    steps = recipe.epochs * per_epoch
    end = training.epochs * per_epoch
    key = _key(training)
    state = load(checkpoint, key) if checkpoint is not None else None
    done, losses, sum_, count = 0, list[float](), 0.0, 0
    if state is not None and state.step <= end:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(state.weights[name])
        average = {name: tensor.to(device, copy=True) for name, tensor in state.average.items()}
        for stepper, known in zip(steppers, state.optimizers, strict=True):
            stepper.load_state_dict(dict(known))
        scaler.load_state_dict(dict(state.scaler))
        done, losses, sum_, count = state.step, list(state.losses[0]), *state.losses[1:]
    observer(Phase("finetune", end - done))
    filters = [name for name in filters_of(student) if name in weights]
    loss_of = objective(student, training)
    for step, batch in enumerate(_batches(images, recipe, done, end), done):
        for stepper in steppers:
            stepper.zero_grad()
            for group in stepper.param_groups:
                group["lr"] = recipe.lr_at(step, steps)
        with torch.autocast(device.type, HALVES.get(recipe.precision), enabled=recipe.precision in HALVES):
            loss = loss_of(batch.to(device))
        torch.autograd.backward(scaler.scale(loss))
        for stepper in steppers:
            scaler.unscale_(stepper)
        norm = float(nn.utils.clip_grad_norm_(weights.values(), recipe.clip))
        if not isfinite(loss.item()) or not (isfinite(norm) or scaler.is_enabled()):  # which skips a step instead
            kept = f"; the last good state is in {checkpoint}" if checkpoint and checkpoint.exists() else ""
            raise CompressError(
                f"training diverged: the loss is {loss.item():g} and its gradient {norm:g} at step {step + 1} of "
                f"{steps}: try a lower --lr than {recipe.lr:g}{kept}"
            )
        if isfinite(norm):  # all step or none: clipping has spread what is not finite
            for stepper in steppers:
                scaler.step(stepper)
        scaler.update()
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
            for tensors in (weights, average):
                soften([tensors[name] for name in filters], recipe.soft_pruning)
        if checkpoint is not None and (ended or (step + 1) % KEEP_EVERY == 0):
            now = {name: weight.detach() for name, weight in weights.items()}
            so_far, own = (tuple(losses), sum_, count), [stepper.state_dict() for stepper in steppers]
            save(State(key, step + 1, now, average, own, so_far, scaler.state_dict()), checkpoint)
        if ended:
            observer(EpochDone(len(losses), losses[-1]))
    return Tuned(_tensors(student, average, training), tuple(losses), recipe)


def device_of(recipe: TrainingRecipe) -> torch.device:
    """Where a recipe trains. Raises: ConfigError if that is not here."""
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device here: leave --device out to train on the processor")
    return torch.device(recipe.device)


def _trainable(training: Training, device: torch.device) -> nn.Module:
    recipe, student = training.recipe, copy.deepcopy(training.module).to(device)
    if recipe.norms == "batch":
        if not training.norms or not isinstance(student, fx.GraphModule):
            raise ModelError("no batch norms were folded into the model's layers: leave --norms out")
        student = normalised(student, training.norms, samples(training.images, recipe.batch, device))
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(_learns(name))
    return student


def _tensors(student: nn.Module, average: Mapping[str, Tensor], training: Training) -> dict[str, NDArray[np.float32]]:
    """The average, by the names of the module that was given."""
    recipe, tensors = training.recipe, {name: tensor.cpu().numpy() for name, tensor in average.items()}
    if recipe.norms == "folded":
        return tensors
    live = filled(student, tensors)
    assert isinstance(live, fx.GraphModule)  # as `_trainable` makes it
    some = samples(training.images, recipe.batch, device_of(recipe))
    return {name: tensor for name, tensor in folded(live, training.norms, some).items() if _learns(name)}


def _learns(name: str) -> bool:
    return name.rpartition(".")[2] not in STATISTICS


def _batches(images: Indexed, recipe: TrainingRecipe, done: int, end: int) -> Iterator[Batch]:
    """What the steps from ``done`` on learn from, whatever came before them."""
    per_epoch = ceil(len(images) / recipe.batch)
    for epoch in range(done // per_epoch, end // per_epoch):
        begun = max(done - epoch * per_epoch, 0)
        order = permutation(len(images), _seed(recipe, ORDER, epoch))
        rest = images.take(order[begun * recipe.batch :])
        for place, (pixels, labels) in enumerate(rest.batches(recipe.batch), begun):
            known, indices = torch.from_numpy(labels), order[place * recipe.batch :][: recipe.batch]
            batch = Batch(torch.from_numpy(pixels), known, indices, known)
            yield _changed(batch, images, recipe, epoch * per_epoch + place)


def _changed(batch: Batch, images: Indexed, recipe: TrainingRecipe, step: int) -> Batch:
    """A step's images as the recipe changes them at random."""
    generator = torch.Generator().manual_seed(_seed(recipe, AUGMENTATION, step))
    changed = augmented(batch.images, recipe.crop, recipe.flip, generator)
    if recipe.randaugment:
        preprocess = getattr(images, "preprocess", None)
        if not isinstance(preprocess, Preprocess):
            raise DataError("--randaugment needs images whose mean and std are known: a live dataset augments its own")
        changed = randomised(changed, preprocess, recipe.randaugment, _seed(recipe, RANDAUGMENT, step))
    batch = replace(batch, images=changed)
    return mixed(batch, recipe.mixup, _seed(recipe, MIXUP, step)) if recipe.mixup else batch


def _seed(recipe: TrainingRecipe, stream: int, number: int) -> int:
    return int(np.random.SeedSequence([recipe.seed, stream, number]).generate_state(1)[0])


def _key(training: Training) -> str:
    def content(model: nn.Module | None) -> list[str] | None:
        if model is None:
            return None
        tensors = dict(model.named_parameters())
        return [*tensors, hash_arrays([tensor.detach().numpy() for tensor in tensors.values()])]

    models = [content(training.module), content(training.teacher)]
    channels = {name: left.tolist() for name, left in training.channels.items()} if training.recipe.hints else {}
    norms = [layer.name for layer in training.norms] if training.recipe.norms == "batch" else []
    return digest_of([training.recipe.to_json(), training.images.digest, *models, channels, norms])
