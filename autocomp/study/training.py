"""A policy's model trained as it is shipped, and judged by its engine."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autocomp.compress import Compressed, channels_left, quantize_learned, quantize_tuned, to_tensor
from autocomp.config import SearchConfig
from autocomp.data import Indexed, Splits
from autocomp.errors import DataError
from autocomp.outcome import Observer, Phase
from autocomp.policy import FP32, Policy
from autocomp.study.score import predict
from autocomp.study.workbench import Workbench
from autocomp.train import Trainer, Training, TrainingRecipe, Tuned, device_of, finetune, learnable, learned

__all__ = ["Course", "accuracy_of", "checkpoint_of", "recipe_of", "trained", "training_images"]


@dataclass(frozen=True)
class Course:
    """How the policies of a run are trained.

    Attributes:
        bench: what they are policies of.
        images: to train on.
        recipe: the same for all.
        observer: told of every event.
        folder: for checkpoints, one a policy.
        trainer: may choose another learning rate than the recipe's.
    """

    bench: Workbench
    images: Indexed
    recipe: TrainingRecipe
    observer: Observer
    folder: Path
    trainer: Trainer = finetune


def recipe_of(config: SearchConfig, settings: Mapping[str, Any]) -> TrainingRecipe:
    """The recipe for a run: the settings given, its seed, and no mirrored digits.

    Raises:
        ConfigError: a setting is unknown or out of range, or its device is not here.
    """
    flip = 0.0 if config.data == "digits" else 0.5
    recipe = TrainingRecipe.from_json({"seed": config.seed, "flip": flip, **settings})
    device_of(recipe)
    return recipe


def training_images(splits: Splits) -> Indexed:
    """The images that nothing is scored on.

    Raises:
        DataError: the source has none, or gives them in one order only.
    """
    images = splits.train
    if images is None or len(images) == 0 or not splits.labelled:
        raise DataError(
            f"{splits.source} has no training images: the run stays as it is, quantized after training alone; "
            "give --data with a training part to a new search"
        )
    if not isinstance(images, Indexed):
        raise DataError(f"{splits.source}: training images must have take(indices): add it to the split")
    return images


def checkpoint_of(folder: Path, policy: Policy) -> Path:
    """The file that a stopped training goes on from."""
    return folder / f"finetune-{policy.digest[:12]}.pt"


def trained(course: Course, policy: Policy, until: int | None = None) -> tuple[Compressed, Tuned]:
    """A policy's model trained and quantized, and what training gave.

    Args:
        until: epochs after which to stop for now; called again it goes on from there.

    Raises:
        DataError, CompressError: as `autocomp.train.finetune`.
    """
    bench, recipe = course.bench, course.recipe

    def train(module: Any) -> Tuned:
        kept, channels = checkpoint_of(course.folder, policy), channels_left(bench.traced.graph, pruned.kept)
        present = {node.name for node in module.graph.nodes}  # those of dropped branches are gone
        norms = [layer for layer in pruned.graph.layers if layer.normalised and layer.node in present]
        training = Training(module, bench.traced.module, course.images, recipe, kept, until, channels, norms)
        return course.trainer(training, course.observer)

    course.observer(Phase("compress"))
    ranks = {name: replace(FP32, rank=found.rank) for name, found in policy.precisions.items()}
    pruned = bench.emitter.finish(Policy(policy.kept, policy.dropped, ranks))
    _, plain = bench.traced.graph.paired(policy)  # of ``pruned.graph``
    start = _calibrated(bench, pruned, {}, plain)
    if recipe.quantization == "calibrated" or not start.weights:
        tuned = train(pruned.module)
        return replace(_calibrated(bench, pruned, tuned.tensors, plain), policy=policy), tuned
    tuned = train(learnable(start))
    tensors, weights, params = learned(start, tuned.tensors)
    learnt = quantize_learned(pruned, tensors, plain, weights, params, start.numerics)
    return replace(learnt, policy=policy), tuned


def accuracy_of(bench: Workbench, onnx: bytes) -> float:
    """Top-1 of a file's engine on the selection split, in [0, 1]."""
    with bench.backend.build(onnx) as engine:
        return predict(engine, bench.splits.selection).accuracy


def _calibrated(bench: Workbench, pruned: Compressed, tensors: Mapping[str, Any], policy: Policy) -> Compressed:
    numerics, logits = bench.backend.capabilities().numerics, bench.statistics.logits
    return quantize_tuned(pruned, tensors, policy, bench.finishing, numerics, to_tensor(bench.images), logits)
