"""A user's own model trained to grow sparse, before any search."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import save as save_tensors

from autocomp.compress import logits_of
from autocomp.config import SearchConfig
from autocomp.data import Split
from autocomp.errors import ConfigError
from autocomp.outcome import Observer
from autocomp.storage import storage_errors, write_atomic
from autocomp.study.loading import load
from autocomp.study.training import recipe_of, training_images
from autocomp.train import Training, TrainingRecipe, finetune
from autocomp.train.sparse import counted, factors_of, filled, filters_of, state_of

__all__ = ["Sparsified", "sparsify"]

SMALL = 0.01
"""A factor below this part of what its layer's largest was is as good as none."""


@dataclass(frozen=True)
class Sparsified:
    """What sparse training did to a model.

    Attributes:
        weights: file of the trained weights, for ``--weights``.
        accuracy: of the model in torch on the selection split, before and after.
        factors: of batch norms: all, small ones before, and small ones after.
        filters: of convolutions: all, those of zeros before, and those of zeros after.
        losses: mean training loss of each epoch.
        recipe: of the training.
    """

    weights: Path
    accuracy: tuple[float, float]
    factors: tuple[int, int, int]
    filters: tuple[int, int, int]
    losses: tuple[float, ...]
    recipe: TrainingRecipe

    def to_json(self) -> dict[str, Any]:
        counts = ("all", "before", "after")
        return {
            "weights": str(self.weights),
            "selection_before": self.accuracy[0],
            "selection_after": self.accuracy[1],
            "small_factors": dict(zip(counts, self.factors, strict=True)),
            "zero_filters": dict(zip(counts, self.filters, strict=True)),
            "losses": list(self.losses),
            "recipe": self.recipe.to_json(),
        }


def sparsify(config: SearchConfig, settings: Mapping[str, Any], out: Path, observer: Observer) -> Sparsified:
    """Train the uncompressed model so that channels grow small, and write its weights.

    Statistics of batch norms stay, and the model before is the teacher. Stopped, the same call goes on.

    Args:
        settings: fields of `TrainingRecipe`, ``slimming`` or ``soft_pruning`` among them.

    Raises:
        InputError: model and data as for a search; there are no training images; nothing would grow sparse; or ``out``
            is there already.
        CompressError: training diverged.
    """
    recipe = recipe_of(config, settings)
    if recipe.slimming == recipe.soft_pruning == 0:
        raise ConfigError("nothing would grow sparse: give --slimming, as 0.0001, or --soft-pruning, as 0.3")
    if out.exists():
        raise ConfigError(f"{out} exists already: choose another --out")
    model, splits, _ = load(config, observer)
    before = model.module
    checkpoint = out.with_name(f"{out.name}.pt")
    training = Training(before, before, training_images(splits), recipe, checkpoint)
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        tuned = finetune(training, observer)
        after = filled(before, tuned.tensors)
        write_atomic(out, save_tensors(state_of(after)))
        checkpoint.unlink()
    return Sparsified(
        out,
        (_accuracy(before, splits.selection), _accuracy(after, splits.selection)),
        counted(factors_of(before), factors_of(after), SMALL),
        counted(filters_of(before), filters_of(after), 0.0),
        tuned.losses,
        recipe,
    )


def _accuracy(module: Any, images: Split) -> float:
    right = sum(int((logits_of(module, pixels).argmax(1) == labels).sum()) for pixels, labels in images.batches(500))
    return right / len(images)
