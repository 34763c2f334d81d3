"""A finished run's best policy trained, quantized again, and proved once more on the engine."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autocomp.engines import initializer_bytes
from autocomp.errors import CompressError, RunError
from autocomp.outcome import Contender, Note, Observer, Phase, SearchResult, layer_choices
from autocomp.results import Contest, Interval, TrialResult
from autocomp.storage import write_atomic
from autocomp.study.artefacts import write_model
from autocomp.study.contest import decide, entrants_of, sparse_layers
from autocomp.study.explain import explained
from autocomp.study.recheck import ENTRY, admit_here, shipped_files
from autocomp.study.run import Run
from autocomp.study.score import paired_interval, predict
from autocomp.study.starts import quick_sensitivity
from autocomp.study.training import Course, accuracy_of, checkpoint_of, trained
from autocomp.study.verify import Verdict, reference_latency
from autocomp.study.workbench import Workbench
from autocomp.train import TrainingRecipe

__all__ = ["FINETUNED", "Finetuned", "finetune_run"]

FINETUNED = "finetune"
"""Kind of the journal's entries."""
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

    Which policy gets all epochs is decided by `decide`. The trained model replaces the run's where it is as accurate on
    the selection split or better, and, if the run's was verified, keeps every budget on fresh engines as well. Only
    then is the test split read. A training that was stopped goes on; what was replaced lies in ``untuned``.

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
    entrants = entrants_of(course, run, result, reference, finalists)
    decided = decide(course, run, entrants)
    best = _row(bench, best, decided.winner)
    compressed, tuned = trained(course, best.policy)
    new = bench.emitter.emit(compressed)
    observer(Phase("selection"))
    before, after = (accuracy_of(bench, file) for file in (old, new))
    reason, verdict = None, None
    if after < before:
        reason = f"on the selection split it reaches {100 * after:.2f} % instead of {100 * before:.2f} %"
    else:
        verdict = _verdict(bench, run, result, best, new, reference, observer)
        if best.verified and not verdict.admitted:
            reason = verdict.reason
    losses, recipe, contest = tuned.losses, tuned.recipe, decided.contest
    run.record(
        FINETUNED, policy=best.policy.digest, recipe=recipe.to_json(), losses=list(losses), before=before, after=after,
        reason=reason, contest=None if contest is None else contest.to_json(),
    )  # fmt: skip
    if reason is not None or verdict is None:
        observer(Note(f"the trained model does not replace the run's: {reason}"))
        return Finetuned(result, False, reason, (before, after), None, losses, recipe, contest)
    observer(Phase("test"))
    row, base, change = _tested(bench, best, result.reference, verdict, after, (old, new, reference))
    notes = [
        f"fine-tuned for {recipe.epochs} epoch{'s' * (recipe.epochs > 1)}: {100 * change.value:+.2f} points of test "
        f"accuracy ({100 * change.low:+.2f} to {100 * change.high:+.2f}); the model before lies in {BEFORE}"
    ]
    if contest is not None:
        notes.append(str(contest))
    result = replace(
        result,
        verified=row.verified,
        contenders={**result.contenders, "best": row, "reference": base},
        notes=tuple(dict.fromkeys((*result.notes, *notes))),
        contest=contest,
    )
    if result.layers != (layers := layer_choices(bench.traced.graph, row.policy)):
        observer(Note(f"trial {decided.winner.number} takes the place of the best found"))
        effects = explained(bench, row.policy, quick_sensitivity(bench, run, observer), run.folder)
        result = replace(result, layers=layers, effects=effects)
    _keep(run.folder)
    write_model(bench, compressed, run.folder, recipe.to_json())
    run.write("result.json", json.dumps(result.to_json(), indent=2))
    run.set_status("verified" if result.verified else "unverified")
    for trial in entrants:
        kept = checkpoint_of(run.folder, trial.policy)
        for path in run.folder.glob(f"{kept.stem}*{kept.suffix}"):
            path.unlink()
    return Finetuned(result, True, None, (before, after), change, losses, recipe, contest)


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
