"""The two costly parts of a trial, timing a policy's engine and scoring it, as plain data for any process."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from autocomp.policy import Policy
from autocomp.results import Score

__all__ = ["Answer", "ScoreTask", "Task", "TimeTask", "Timed"]


@dataclass(frozen=True, slots=True)
class TimeTask:
    """Time the engine of a file beside the uncompressed one.

    Attributes:
        onnx: the file.
        structure: digest of what its latency depends on.
        usual_ms: that the uncompressed engine takes.
        limit: on the ratio, where it is enough to know that an engine is far from it.
    """

    onnx: bytes
    structure: str
    usual_ms: float
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class ScoreTask:
    """Compress by a policy and score the engine."""

    policy: Policy


Task = TimeTask | ScoreTask


@dataclass(frozen=True, slots=True)
class Timed:
    """A latency over the uncompressed engine's, and that engine's own in ms."""

    ratio: float
    reference_ms: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a task.

    Attributes:
        timed, score: of a `TimeTask` and of a `ScoreTask`; None where it failed.
        seconds: stage -> wall time.
        stage: the last one.
        error: one line; None where all went well.
        log: where and how it came to the error, in lines.
    """

    timed: Timed | None = None
    score: Score | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    stage: str = ""
    error: str | None = None
    log: str = ""
