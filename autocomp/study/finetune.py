"""A finished run's best policy trained, quantized again, and proved once more on the engine."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autocomp.engines import initializer_bytes
from autocomp.errors import CompressError, RunError
from autocomp.outcome import Contender, Note, Observer, Phase, SearchResult, layer_choices
from autocomp.results import Contest, Interval, TrialResult
from autocomp.storage import write_atomic
from autocomp.study.artefacts import write_layers, write_model
from autocomp.study.contest import decide, entrants_of, sparse_layers
from autocomp.study.explain import effects_of, predictor_for
from autocomp.study.recheck import ENTRY, admit_here, shipped_files
from autocomp.study.replacement import BEFORE, FINETUNED, replace_model
from autocomp.study.run import Run
from autocomp.study.score import paired_interval, predict
from autocomp.study.starts import quick_sensitivity
from autocomp.study.training import Course, accuracy_of, checkpoint_of, trained
from autocomp.study.verify import Verdict, reference_latency
from autocomp.study.workbench import Workbench
from autocomp.train import TrainingRecipe

__all__ = ["Finetuned", "finetune_run"]

PERFECT = "its engine is right on every image of the selection split already"
ALREADY = "it is what this training makes already"


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
        contest: by which the policy was chosen; None where only one was trained.
    """

    result: SearchResult
    replaced: bool
    reason: str | None
    selection: tuple[float, float]
    change: Interval | None
    losses: tuple[float, ...]
    recipe: TrainingRecipe
    contest: Contest | None = None

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
            "contest": None if self.contest is None else self.contest.to_json(),
            "run": str(self.result.run),
        }


def finetune_run(course: Course, run: Run, result: SearchResult, finalists: int) -> Finetuned:
    """Train the best policies' models, integer layers as the engine computes them, and let the engine judge.

    Which policy gets all epochs is decided by `decide`. The trained model replaces the run's where it is more accurate
    on the selection split and, if the run's was verified, keeps every budget on fresh engines as well. Only then is the
    test split read. A training that was stopped goes on; what the search shipped lies in ``untuned``.

    Args:
        finalists: policies that are trained, at most; 1 for the run's best alone.

    Raises:
        RunError: the run shipped nothing, or its files are not what it shipped.
        CompressError: training diverged, or would undo what is sparse; the run is as it was.
        EngineError: an engine failed.
    """
    bench, observer, best = course.bench, course.observer, result.best
    if best is None:
        raise RunError(f"{run.folder} shipped no model: there is nothing to fine-tune")
    sparse = sparse_layers(best.policy)
    if sparse:
        raise CompressError(
            f"training would fill up the 2:4 sparse weights of {sparse[0]}: search a space without them"
        )
    recipe = course.recipe
    if bench.splits.inputs and (recipe.crop or recipe.flip):
        course = replace(course, recipe=replace(recipe, crop=0, flip=0.0))
        observer(Note("rows of several inputs are trained on as they are, without crops and mirroring"))
    old, reference = shipped_files(run.folder)
    before = accuracy_of(bench, old)
    if before == 1.0:
        return _stays(run, Finetuned(result, False, PERFECT, (before, before), None, (), course.recipe), observer)
    entrants = entrants_of(course, run, result, reference, finalists)
    decided = decide(course, run, entrants)
    best = _row(bench, best, decided.winner)
    compressed, tuned = trained(course, best.policy)
    new = bench.emitter.emit(compressed)
    observer(Phase("selection"))
    after = before if new == old else accuracy_of(bench, new)
    if decided.contest is not None:
        notes = dict.fromkeys((*result.notes, str(decided.contest)))
        result = replace(result, contest=decided.contest, notes=tuple(notes))
    found = Finetuned(result, True, None, (before, after), None, tuned.losses, tuned.recipe, decided.contest)
    if new == old:  # a stop came after the model and before this entry, or the same training was asked for again
        found = _stays(run, replace(found, replaced=False, reason=ALREADY), observer)
        _forget(run, entrants)
        return found
    if after <= before:
        reason = f"on the selection split it reaches {100 * after:.2f} %, the model before {100 * before:.2f} %"
        return _stays(run, replace(found, replaced=False, reason=reason), observer)
    verdict = _verdict(bench, run, result, best, new, reference, observer)
    if best.verified and not verdict.admitted:
        return _stays(run, replace(found, replaced=False, reason=verdict.reason), observer)
    observer(Phase("test"))
    row, base, change = _tested(bench, best, result.reference, verdict, after, (old, new, reference))
    found = replace(found, result=_shown(course, run, result, row, base, change), change=change)

    def fill(folder: Path) -> None:
        write_model(bench, compressed, folder, found.recipe.to_json())
        write_layers(bench, folder)
        write_atomic(folder / "result.json", json.dumps(found.result.to_json(), indent=2))

    replace_model(run, fill, _entry(found))
    _forget(run, entrants)
    return found


def _forget(run: Run, entrants: Sequence[TrialResult]) -> None:
    """The states of trainings that have ended."""
    for trial in entrants:
        kept = checkpoint_of(run.folder, trial.policy)
        for path in run.folder.glob(f"{kept.stem}*{kept.suffix}"):
            path.unlink()


def _stays(run: Run, found: Finetuned, observer: Observer) -> Finetuned:
    """The run keeps its model; what a contest said of the search is added to its result."""
    observer(Note(f"the run keeps the model that it has: {found.reason}"))
    if found.contest is not None:
        run.write("result.json", json.dumps(found.result.to_json(), indent=2))
    run.record(FINETUNED, **_entry(found))
    return found


def _entry(found: Finetuned) -> dict[str, Any]:
    """What the journal keeps of a training."""
    before, after = found.selection
    return {
        "recipe": found.recipe.to_json(),
        "losses": list(found.losses),
        "before": before,
        "after": after,
        "reason": found.reason,
        "contest": None if found.contest is None else found.contest.to_json(),
    }


def _shown(
    course: Course, run: Run, result: SearchResult, row: Contender, base: Contender, change: Interval
) -> SearchResult:
    """The run's result with the trained model's row."""
    bench, epochs = course.bench, course.recipe.epochs
    note = (
        f"fine-tuned for {epochs} epoch{'s' * (epochs > 1)}: {100 * change.value:+.2f} points of test accuracy "
        f"({100 * change.low:+.2f} to {100 * change.high:+.2f}); the search's model lies in {BEFORE}"
    )
    contenders = {**result.contenders, "best": row, "reference": base}
    notes = tuple(dict.fromkeys((*result.notes, note)))
    result = replace(result, verified=row.verified, contenders=contenders, notes=notes)
    layers = layer_choices(bench.traced.graph, row.policy)
    if layers == result.layers:
        return result
    sensitivity, predictor = quick_sensitivity(bench, run, course.observer), predictor_for(bench, run.folder)
    effects = effects_of(bench.traced.graph, row.policy, bench.spec.batch, sensitivity, predictor)
    return replace(result, layers=layers, effects=effects)


def _row(bench: Workbench, best: Contender, winner: TrialResult) -> Contender:
    """The run's best where it won, else a row for who did, of which nothing is measured yet."""
    if winner.policy == best.policy:
        return best
    return replace(best, policy=winner.policy, macs=bench.traced.graph.macs(winner.policy))


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
        fine_tuned=True,
    )
    base = replace(base, latency=reference_latency(verdict.latency), test_accuracy=reference.accuracy)
    return row, base, paired_interval(new, old)
