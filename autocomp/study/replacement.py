"""A run's model put in the place of another as a whole: a kill at any step leaves the old one or the new one.

All new files are made in ``tuned.part``, with what is left to do; renaming that folder to ``tuned.ready`` decides. From
there on every step can be done again, so whoever opens the run next goes on where it stopped.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from autocomp.errors import RunError
from autocomp.storage import storage_errors, write_atomic
from autocomp.study.run import Run

__all__ = ["BEFORE", "FINETUNED", "go_on", "replace_model", "was_stopped"]

FINETUNED = "finetune"
"""Kind of the journal's entries."""
BEFORE = "untuned"
"""Folder of a run for what the search shipped."""
PART, READY = "tuned.part", "tuned.ready"
KEEPING = "untuned.part"
TODO = "replacement.json"
MODEL = ("model.onnx", "weights.safetensors", "policy.json", "result.json")
LAYERS = "layers.json"
"""Of engines that describe theirs; one of the old engine must not outlive it."""


def replace_model(run: Run, fill: Callable[[Path], None], entry: Mapping[str, Any]) -> None:
    """Put new files in the place of a run's, keep what the search shipped in ``untuned``, and journal the training.

    Args:
        fill: writes the files into an empty folder: those of `MODEL`, and ``layers.json`` where there is one.
        entry: for the journal.
    """
    folder = run.folder
    with storage_errors(folder):
        shutil.rmtree(folder / PART, ignore_errors=True)
        (folder / PART).mkdir()
        fill(folder / PART)
        todo = {"entry": dict(entry), "trainings": len(run.entries(FINETUNED))}
        write_atomic(folder / PART / TODO, json.dumps(todo))
        _keep(folder)
        (folder / PART).rename(folder / READY)
    go_on(run)


def was_stopped(folder: Path) -> bool:
    """A replacement was begun in a run's folder, and has not ended."""
    return any((folder / name).exists() for name in (PART, READY, KEEPING))


def go_on(run: Run) -> bool:
    """End a replacement that was decided, undo one that was not; whether the run has another model now.

    Raises:
        RunError: what was to take the old model's place is damaged.
    """
    folder, ready = run.folder, run.folder / READY
    with storage_errors(folder):
        for name in (PART, KEEPING):
            shutil.rmtree(folder / name, ignore_errors=True)
        if not (ready / TODO).exists():  # none, or all is done but for the empty folder
            shutil.rmtree(ready, ignore_errors=True)
            return False
        try:
            todo = json.loads((ready / TODO).read_text())
            entry, trainings = dict(todo["entry"]), int(todo["trainings"])
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{ready / TODO} is damaged ({error}): copy the whole run folder again") from error
        _move(folder)
        verified = json.loads((folder / "result.json").read_text())["verified"]
        run.set_status("verified" if verified else "unverified")
        if len(run.entries(FINETUNED)) == trainings:
            run.record(FINETUNED, **entry)
        (ready / TODO).unlink()
        ready.rmdir()
    return True


def _move(folder: Path) -> None:
    """``layers.json`` of the old engine goes before the first file of the new one comes."""
    ready = folder / READY
    if (ready / MODEL[0]).exists():
        (folder / LAYERS).unlink(missing_ok=True)
    for name in (*MODEL, LAYERS):
        if (ready / name).exists():
            (ready / name).replace(folder / name)


def _keep(folder: Path) -> None:
    """Copies of what the search shipped, whole or not at all; those of a first training stay."""
    kept = folder / BEFORE
    if all((kept / name).exists() for name in MODEL):
        return
    shutil.rmtree(kept, ignore_errors=True)
    shutil.rmtree(folder / KEEPING, ignore_errors=True)
    (folder / KEEPING).mkdir()
    for name in (*MODEL, LAYERS):
        if (folder / name).exists():
            write_atomic(folder / KEEPING / name, (folder / name).read_bytes())
    (folder / KEEPING).rename(kept)
