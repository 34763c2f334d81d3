"""A run's model replaced: killed at every step that touches a file, the run has the old model or the new one, whole."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autocomp.study.replacement import FINETUNED, go_on, replace_model, was_stopped
from autocomp.study.run import Manifest, Run, read_manifest

NAMES = ("model.onnx", "weights.safetensors", "policy.json")
STEPS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "open")


def files(which: str, *, verified: bool, layers: bool) -> dict[str, str]:
    found = {name: f"{which} {name}" for name in NAMES} | {"result.json": json.dumps({"verified": verified})}
    return found | ({"layers.json": f"{which} layers"} if layers else {})


OLD = files("old", verified=True, layers=True)


def fill(new: dict[str, str]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name, text in new.items():
            (folder / name).write_text(text)

    return write


@pytest.fixture
def searched(tmp_path: Path) -> Path:
    """A finished run, of made-up files."""
    folder = tmp_path / "searched"
    with Run.create(folder, Manifest("0.1.0", {}, [], {}, {}, {}, "verified")):
        fill(OLD)(folder)
    return folder


def killed(work: Callable[[], object], at: int) -> bool:
    """Whether a process that does the work is killed at its ``at``-th step on files, before that is done."""
    child = os.fork()
    if child == 0:
        left = [at]

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            if event not in STEPS or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                return
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(watch)
            work()
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def replace(folder: Path, new: dict[str, str]) -> None:
    with Run.open(folder) as run:
        replace_model(run, fill(new), {"reason": None, "after": 0.82})


def ended(folder: Path) -> None:
    with Run.open(folder) as run:
        go_on(run)


def shown(folder: Path) -> dict[str, str]:
    """Of a folder's model; what is cut off by a kill begins with a dot."""
    others = ("manifest.json", "journal.jsonl")
    own = [path for path in folder.iterdir() if not path.name.startswith(".") and path.name not in others]
    return {path.name: path.read_text() if path.is_file() else "a folder" for path in own}


@pytest.mark.parametrize("layers", [True, False])
def test_a_kill_at_any_step_leaves_one_model_whole(searched: Path, tmp_path: Path, layers: bool) -> None:
    new = files("new", verified=False, layers=layers)
    outcomes, at = set(), 0
    while True:
        folder = Path(shutil.copytree(searched, tmp_path / f"run-{at}"))
        if not killed(lambda folder=folder: replace(folder, new), at):  # type: ignore[misc]
            break
        if killed(lambda folder=folder: ended(folder), at % 13):  # type: ignore[misc]
            ended(folder)
        assert not was_stopped(folder)
        found = shown(folder)
        kept = found.pop("untuned", None)
        assert found in (OLD, new), (at, found)
        trainings = [entry for entry in Run.entries_of(folder) if entry["kind"] == FINETUNED]
        assert len(trainings) == (found == new), at
        assert read_manifest(folder).status == ("unverified" if found == new else "verified")
        assert kept is not None or found == OLD
        assert kept is None or shown(folder / "untuned") == OLD
        outcomes.add((found == new, kept is not None))
        if found == OLD:
            replace(folder, new)
            assert shown(folder) == {**new, "untuned": "a folder"} and shown(folder / "untuned") == OLD
        at += 1
    assert at > 20 and outcomes == {(False, False), (False, True), (True, True)}
    assert shown(folder) == {**new, "untuned": "a folder"}


def test_what_is_not_whole_is_not_taken_for_the_searchs_model(searched: Path) -> None:
    (searched / "untuned").mkdir()
    (searched / "untuned" / "model.onnx").write_text("torn")
    replace(searched, files("new", verified=True, layers=False))
    assert shown(searched / "untuned") == OLD
    replace(searched, files("newer", verified=True, layers=False))
    assert shown(searched / "untuned") == OLD and (searched / "model.onnx").read_text() == "newer model.onnx"
    assert len([entry for entry in Run.entries_of(searched) if entry["kind"] == FINETUNED]) == 2
