"""What the parts share: where they write, how long they may take, which engine runs, commands."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import monotonic
from typing import Any

import autocomp
from autocomp.engines import BackendSpec, make_backend
from autocomp.errors import AutocompError
from autocomp.policy import Policy
from autocomp.protocols import Backend
from autocomp.storage import write_atomic
from benchmarks.gpu.networks import network

__all__ = ["CannotRunError", "Job", "command", "first_that_runs"]

ENGINES = ("tensorrt", "tensorrt-rtx", "torch-cuda")
GRACE_S = 30.0
"""For a command that was asked to stop."""


class CannotRunError(Exception):
    """Why a part has no result."""


@dataclass(frozen=True, slots=True)
class Job:
    """A part of the benchmark.

    Attributes:
        file: of its result.
        work: folder for runs, checkpoints and data.
        engine: to measure; None for the first that runs.
        deadline: by `time.monotonic`.
    """

    file: Path
    work: Path
    engine: str | None
    deadline: float

    @property
    def left_s(self) -> float:
        return self.deadline - monotonic()

    def found(self) -> dict[str, Any]:
        """What the file holds."""
        found: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        return found

    def keep(self, **more: Any) -> None:
        """Add to the file, at once; None takes a key away."""
        whole = {key: value for key, value in {**self.found(), **more}.items() if value is not None}
        write_atomic(self.file, json.dumps(whole, indent=2) + "\n")

    def begin(self) -> str:
        """The engine to measure, kept with what those before it answered.

        Raises:
            CannotRunError: none runs here, or the file has results of another one.
        """
        name, answers = first_that_runs(self.engine)
        known = self.found().get("engine", name)
        if known != name:
            raise CannotRunError(
                f"{self.file} holds what {known} did, and {name} is to be measured: give another --out"
            )
        self.keep(engine=name, refused=answers, reference="fp32, TF32 off")
        return name


@cache
def first_that_runs(wanted: str | None) -> tuple[str, Mapping[str, str]]:
    """The engine to measure, and what those before it answered, word by word.

    Raises:
        CannotRunError: none runs here.
    """
    answers: dict[str, str] = {}
    present: dict[str, Backend] = {}
    for name in (wanted,) if wanted else ENGINES:
        try:
            present[name] = make_backend(BackendSpec(name))
        except AutocompError as error:
            answers[name] = str(error)
    for name, backend in present.items():
        try:
            with backend.build(network("resnet18", 64).file(Policy(), backend)) as engine:
                engine.time(1)
            return name, answers
        except AutocompError as error:
            answers[name] = str(error)
    raise CannotRunError("; ".join(f"{name}: {answer}" for name, answer in answers.items()))


def command(folder: Path, *arguments: str, seconds: float) -> dict[str, Any]:
    """What an autocomp command printed as JSON; its last words where it failed. After ``seconds`` it is asked to stop,
    as by Ctrl-C, so that what it keeps in files can be gone on with."""
    root, given = str(Path(autocomp.__file__).parents[1]), os.environ.get("PYTHONPATH")
    process = subprocess.Popen(
        [sys.executable, "-m", "autocomp", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, given] if given else [root])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    stopped = False
    try:
        printed, said = process.communicate(timeout=max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        stopped = True
        process.send_signal(signal.SIGINT)
        try:
            printed, said = process.communicate(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            printed, said = process.communicate()
    found: dict[str, Any] = {"command": ["autocomp", *arguments], "status": process.returncode}
    try:
        return {**found, **json.loads(printed)}
    except ValueError:
        why = f"stopped after {seconds:.0f} s: " if stopped else ""
        return {**found, "error": why + " ".join(said.split()[-60:])}
