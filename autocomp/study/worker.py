"""Who does the two costly parts of a trial: timing a policy's engine, and scoring it."""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from traceback import format_exception
from typing import Protocol

from autocomp.capabilities import DeviceInfo
from autocomp.compress import Compressed
from autocomp.engines import clear_of, compare, device_lock, estimate
from autocomp.errors import AutocompError
from autocomp.policy import Policy
from autocomp.protocols import Backend, Engine
from autocomp.results import Score, TimingProtocol
from autocomp.study.score import Scorer
from autocomp.study.steady import Patience
from autocomp.study.tasks import Answer, ScoreTask, Task, Timed, TimeTask

__all__ = ["FAULTS", "Emitter", "Stopwatch", "Worker", "line_of", "log_of"]

AGAIN_S = (0.0, 0.5)
"""Pauses before a trial's timing is repeated on a slowed device, which slows int8 more than the float reference."""
FAULTS = (AutocompError, ArithmeticError, RuntimeError, MemoryError)
"""What a policy may cause on its way; bad input and bugs are not caught."""


class Emitter(Protocol):
    """Turns policies into ONNX files."""

    def skeleton(self, policy: Policy) -> bytes:
        """A file with the policy's structure, good for timing; its weights mean nothing."""
        ...

    def compress(self, policy: Policy) -> Compressed:
        """As a trial does."""
        ...

    def finish(self, policy: Policy) -> Compressed:
        """As a finalist is scored, measured and shipped: the best compression there is, in seconds."""
        ...

    def emit(self, compressed: Compressed) -> bytes:
        """The file to score and to ship."""
        ...


@dataclass(slots=True)
class Stopwatch:
    """Names the stage at hand, tells the observer, and adds up its time."""

    announce: Callable[[str], None]
    stage: str = "start"
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def at(self, stage: str) -> Iterator[None]:
        self.stage = stage
        self.announce(stage)
        begun = perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + perf_counter() - begun

    def add(self, answer: Answer) -> None:
        """Take over the time and the stage of what was done for this trial."""
        self.stage = answer.stage
        for stage, seconds in answer.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


@dataclass(frozen=True)
class Worker:
    """What a process needs to do tasks.

    Attributes:
        emitter: policies -> files.
        backend, reference: of the target, and the uncompressed engine on it.
        scorer: on the search split.
        protocol: of the quick timing that guides the search.
    """

    emitter: Emitter
    backend: Backend
    reference: Engine
    scorer: Scorer
    protocol: TimingProtocol

    @property
    def device(self) -> DeviceInfo:
        return self.backend.device

    def do(self, task: Task, announce: Callable[[str], None]) -> Answer:
        """Do a task; what its policy causes becomes an answer with stage and error."""
        watch = Stopwatch(announce)
        timed, score = None, None
        try:
            match task:
                case TimeTask():
                    with watch.at("time"):
                        timed = self.time(task)
                case ScoreTask():
                    score = self._score(task.policy, watch)
        except FAULTS as error:
            return Answer(None, None, watch.seconds, watch.stage, line_of(error), log_of(error))
        return Answer(timed, score, watch.seconds, watch.stage)

    def time(self, task: TimeTask) -> Timed:
        """Both engines interleaved, while nobody else uses the device."""
        patience = Patience(lambda event: None, AGAIN_S)
        settled = None if task.limit is None else clear_of(task.limit)
        with self.backend.build(task.onnx) as engine, device_lock(self.device):
            take = partial(compare, engine, self.reference, self.protocol, settled=settled)
            timing = patience.measure(take, task.usual_ms)
        found = estimate(timing, "p50")
        return Timed(found.ratio.value, found.reference_ms.value)

    def _score(self, policy: Policy, watch: Stopwatch) -> Score:
        with watch.at("compress"):
            compressed = self.emitter.compress(policy)
        with watch.at("emit"):
            onnx = self.emitter.emit(compressed)
        with watch.at("build"):
            engine = self.backend.build(onnx)
        with watch.at("score"), engine:
            return self.scorer.score(engine)


def line_of(error: BaseException) -> str:
    """An error as one line of at most 500 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:500]


def log_of(error: BaseException) -> str:
    """The machine and process, and how it came to an error, as lines."""
    return f"on {platform.node()}, process {os.getpid()}\n{''.join(format_exception(error))}"
