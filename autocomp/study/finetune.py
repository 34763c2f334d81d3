"""A finished run's best policy trained, quantized again, and proved once more on the engine."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autocomp.compress import Compressed, quantize_learned, quantize_tuned, to_tensor
from autocomp.config import SearchConfig
from autocomp.data import Indexed
from autocomp.engines import initializer_bytes
from autocomp.errors import DataError, RunError
from autocomp.outcome import Contender, Note, Observer, Phase, SearchResult
from autocomp.policy import FP32, Policy
from autocomp.results import Interval
from autocomp.storage import write_atomic
from autocomp.study.artefacts import write_model
from autocomp.study.recheck import ENTRY, admit_here, shipped_files
from autocomp.study.run import Run
from autocomp.study.score import paired_interval, predict
from autocomp.study.verify import Verdict, reference_latency
from autocomp.study.workbench import Workbench
from autocomp.train import Trainer, TrainingRecipe, Tuned, finetune, learnable, learned

__all__ = ["Finetuned", "finetune_run", "recipe_of", "trained", "training_images"]

CHECKPOINT = "finetune.pt"
BEFORE = "untuned"
"""Folder of a run for the files that training replaced."""
REPLACED = ("model.onnx", "weights.safetensors", "policy.json", "result.json")


@dataclass(frozen=True)
class Finetuned:
    """What training did for a run.

    Attributes:
        result: of the run now.
        replaced: the trained model took the place of the one before.
        reason: why it did not.
        selection: accuracy of the engine on the selection split, before and after.
        change: of the engine's accuracy on the test split by training, with its 95 % interval; None where the model was
            not replaced: the test split is not read then.
        losses: mean training loss of each epoch.
        recipe: of the training.
    """

    result: SearchResult
    replaced: bool
    reason: str | None
    selection: tuple[float, float]
    change: Interval | None
    losses: tuple[float, ...]
    recipe: TrainingRecipe

    def to_json(self) -> dict[str, Any]:
        best = self.result.best
        return {
            "replaced": self.replaced,
            "reason": self.reason,
            "verified": self.result.verified,
            "selection_before": self.selection[0],
            "selection_after": self.selection[1],
            "test_change": None if self.change is None else self.change.to_json(),
            "best": None if best is None else best.to_json(),
            "losses": list(self.losses),
            "recipe": self.recipe.to_json(),
            "run": str(self.result.run),
        }


def recipe_of(config: SearchConfig, settings: Mapping[str, Any]) -> TrainingRecipe:
    """The recipe for a run: the settings given, its seed, and no mirrored digits.

    Raises:
        ConfigError: a setting is unknown or out of range.
    """
    flip = 0.0 if config.data == "digits" else 0.5
    return TrainingRecipe.from_json({"seed": config.seed, "flip": flip, **settings})


def training_images(bench: Workbench) -> Indexed:
    """The images that nothing is scored on.

    Raises:
        DataError: the source has none, or gives them in one order only.
    """
    images = bench.splits.train
    if images is None or len(images) == 0 or not bench.splits.labelled:
        raise DataError(
            f"{bench.splits.source} has no training images: the run stays as it is, quantized after training alone; "
            "give --data with a training part to a new search"
        )
    if not isinstance(images, Indexed):
        raise DataError(f"{bench.splits.source}: training images must have take(indices): add it to the split")
    return images


def finetune_run(
    bench: Workbench,
    run: Run,
    result: SearchResult,
    recipe: TrainingRecipe,
    observer: Observer,
    train: Trainer = finetune,
) -> Finetuned:
    """Train the best policy's model, its integer layers as the engine computes them, and let the engine judge.

    The trained model replaces the run's where it is as accurate on the selection split or better, and, if the run's was
    verified, keeps every budget on fresh engines as well. Only then is the test split read. A training that was stopped
    goes on; what was replaced lies in ``untuned``.

    Args:
        train: may choose another learning rate than the recipe's.

    Raises:
        RunError: the run shipped nothing, or its files are not what it shipped.
        DataError: there are no training images.
        CompressError: training diverged; the run is as it was.
        EngineError: an engine failed.
    """
    best = result.best
    if best is None:
        raise RunError(f"{run.folder} shipped no model: there is nothing to fine-tune")
    images = training_images(bench)
    if bench.splits.inputs and (recipe.crop or recipe.flip):
        recipe = replace(recipe, crop=0, flip=0.0)
        observer(Note("rows of several inputs are trained on as they are, without crops and mirroring"))
    old, reference = shipped_files(run.folder)
    checkpoint = run.folder / CHECKPOINT
    compressed, tuned = trained(bench, best.policy, images, recipe, observer, checkpoint, train)
    losses, recipe = tuned.losses, tuned.recipe
    new = bench.emitter.emit(compressed)
    observer(Phase("selection"))
    before, after = (_accuracy(bench, file) for file in (old, new))
    reason, verdict = None, None
    if after < before:
        reason = f"on the selection split it reaches {100 * after:.2f} % instead of {100 * before:.2f} %"
    else:
        verdict = _verdict(bench, run, result, best, new, reference, observer)
        if best.verified and not verdict.admitted:
            reason = verdict.reason
    run.record("finetune", recipe=recipe.to_json(), losses=list(losses), before=before, after=after, reason=reason)
    if reason is not None or verdict is None:
        observer(Note(f"the trained model does not replace the run's: {reason}"))
        return Finetuned(result, False, reason, (before, after), None, losses, recipe)
    observer(Phase("test"))
    row, base, change = _tested(bench, best, result.reference, verdict, after, (old, new, reference))
    note = (
        f"fine-tuned for {recipe.epochs} epoch{'s' * (recipe.epochs > 1)}: {100 * change.value:+.2f} points of test "
        f"accuracy ({100 * change.low:+.2f} to {100 * change.high:+.2f}); the model before lies in {BEFORE}"
    )
    result = replace(
        result,
        verified=row.verified,
        contenders={**result.contenders, "best": row, "reference": base},
        notes=(*result.notes, note),
    )
    _keep(run.folder)
    write_model(bench, compressed, run.folder, recipe.to_json())
    run.write("result.json", json.dumps(result.to_json(), indent=2))
    run.set_status("verified" if result.verified else "unverified")
    for path in run.folder.glob(f"{checkpoint.stem}*{checkpoint.suffix}"):
        path.unlink()
    return Finetuned(result, True, None, (before, after), change, losses, recipe)


def trained(
    bench: Workbench,
    policy: Policy,
    images: Indexed,
    recipe: TrainingRecipe,
    observer: Observer,
    checkpoint: Path,
    train: Trainer = finetune,
) -> tuple[Compressed, Tuned]:
    """A policy's model trained and quantized, and what training gave.

    Args:
        checkpoint: file that a stopped training goes on from.

    Raises:
        DataError, CompressError: as `finetune`.
    """
    observer(Phase("compress"))
    ranks = {name: replace(FP32, rank=found.rank) for name, found in policy.precisions.items()}
    pruned = bench.emitter.finish(Policy(policy.kept, policy.dropped, ranks))
    _, plain = bench.traced.graph.paired(policy)  # of ``pruned.graph``
    teacher, start = bench.traced.module, _calibrated(bench, pruned, {}, plain)
    if recipe.quantization == "calibrated" or not start.weights:
        tuned = train(pruned.module, teacher, images, recipe, observer, checkpoint)
        return replace(_calibrated(bench, pruned, tuned.tensors, plain), policy=policy), tuned
    tuned = train(learnable(start), teacher, images, recipe, observer, checkpoint)
    tensors, weights, params = learned(start, tuned.tensors)
    learnt = quantize_learned(pruned, tensors, plain, weights, params, start.numerics)
    return replace(learnt, policy=policy), tuned


def _calibrated(bench: Workbench, pruned: Compressed, tensors: Mapping[str, Any], policy: Policy) -> Compressed:
    numerics, logits = bench.backend.capabilities().numerics, bench.statistics.logits
    return quantize_tuned(pruned, tensors, policy, bench.finishing, numerics, to_tensor(bench.images), logits)


def _accuracy(bench: Workbench, onnx: bytes) -> float:
    with bench.backend.build(onnx) as engine:
        return predict(engine, bench.splits.selection).accuracy


def _verdict(
    bench: Workbench,
    run: Run,
    result: SearchResult,
    best: Contender,
    onnx: bytes,
    reference: bytes,
    observer: Observer,
) -> Verdict:
    """On fresh engines, at a confidence that rises with every model of this run that was asked about here."""
    device = bench.backend.device.to_json()
    asked = sum(entry["device"] == device for entry in run.entries(ENTRY))
    confidence = 1 - 0.05 / (1 + asked)
    rows = (best, result.reference)
    verdict = admit_here(onnx, reference, bench.spec, bench.backend, result.budgets, rows, confidence, observer)
    run.record(
        ENTRY, admitted=verdict.admitted, reason=verdict.reason, latency=verdict.latency.to_json(),
        size_bytes=verdict.size_bytes, confidence=confidence, device=device,
    )  # fmt: skip
    return verdict


def _tested(
    bench: Workbench,
    best: Contender,
    base: Contender,
    verdict: Verdict,
    selection: float,
    files: tuple[bytes, bytes, bytes],
) -> tuple[Contender, Contender, Interval]:
    """Rows of the trained and of the uncompressed model, and what training changed."""
    predictions = []
    for file in files:
        with bench.backend.build(file) as engine:
            predictions.append(predict(engine, bench.splits.test))
    old, new, reference = predictions
    row = replace(
        best,
        latency=verdict.latency,
        search_accuracy=None,
        selection_accuracy=selection,
        test_accuracy=new.accuracy,
        test_delta=paired_interval(new, reference),
        size_bytes=initializer_bytes(files[1]),
        verified=verdict.admitted and bench.backend.measures,
        note=verdict.reason,
    )
    base = replace(base, latency=reference_latency(verdict.latency), test_accuracy=reference.accuracy)
    return row, base, paired_interval(new, old)


def _keep(folder: Path) -> None:
    """Copies of what the search shipped; those of a first training stay."""
    kept = folder / BEFORE
    if not kept.exists():
        kept.mkdir()
        for name in REPLACED:
            write_atomic(kept / name, (folder / name).read_bytes())
