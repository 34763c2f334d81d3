"""What was measured and what came of a trial, as plain data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from autocomp.policy import Policy

__all__ = [
    "Block",
    "Contest",
    "Copies",
    "Entrant",
    "Interval",
    "LatencyEstimate",
    "Score",
    "Status",
    "Timing",
    "TimingProtocol",
    "TrialResult",
]

Status = Literal["ok", "infeasible", "failed"]


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its confidence bounds."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, float]) -> Self:
        return cls(**data)


@dataclass(frozen=True, slots=True)
class TimingProtocol:
    """How long and how often to time.

    Attributes:
        warmup_ms: at least this long before the first block; longer until the times are stable.
        blocks: pairs of blocks (candidate, reference), interleaved.
        block_ms: aim for the length of one block.
        min_repeats: runs in a block, at least.
        builds: fresh engines in fresh processes (1 = this process).
        max_drift: blocks whose reference median is off by more than this fraction are rejected.
    """

    warmup_ms: float = 100.0
    blocks: int = 5
    block_ms: float = 40.0
    min_repeats: int = 3
    builds: int = 1
    max_drift: float = 0.10

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class OperatorTimes:
    """What the operators of a file take inside an engine.

    Attributes:
        by_value: ms, by the first value that an operator writes in the file. Operators that the runtime fused count to
            one of them, conversions that it inserted to the operator whose result they convert; the name of the
            model's input stands for what comes before all operators.
        run_ms: of a whole run under the profiler; a little more than all operators together.
    """

    by_value: Mapping[str, float]
    run_ms: float


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive runs of the candidate beside consecutive runs of the reference, in ms per run."""

    build: int
    candidate_ms: tuple[float, ...]
    reference_ms: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Timing:
    """All samples of one measurement.

    Attributes:
        blocks: kept ones, in the order they were taken.
        rejected: blocks thrown away because the reference drifted.
    """

    blocks: tuple[Block, ...]
    rejected: int = 0

    @property
    def samples(self) -> int:
        """Runs of the candidate."""
        return sum(len(block.candidate_ms) for block in self.blocks)


@dataclass(frozen=True, slots=True)
class Copies:
    """What moving a batch takes beside a run, medians, from memory of the host that is not pinned.

    Attributes:
        to_device_ms: of the images.
        from_device_ms: of the logits.
    """

    to_device_ms: float
    from_device_ms: float


@dataclass(frozen=True, slots=True)
class LatencyEstimate:
    """A latency statistic with bounds.

    Attributes:
        statistic: p50, p95 or p99.
        latency_ms: of the candidate.
        reference_ms: of the uncompressed engine.
        ratio: candidate / reference, paired block by block.
        samples: runs of the candidate behind it.
        rejected: blocks rejected for drift.
        p50_ms, reference_p50_ms: medians of the candidate and of the uncompressed engine, whatever the statistic.
        copies: of the candidate, which no latency holds; None where it was not asked, or reads the host's memory.
    """

    statistic: str
    latency_ms: Interval
    reference_ms: Interval
    ratio: Interval
    samples: int
    rejected: int = 0
    p50_ms: float | None = None
    reference_p50_ms: float | None = None
    copies: Copies | None = None

    def to_json(self) -> dict[str, Any]:
        """Without `copies` where there are none."""
        return {key: value for key, value in asdict(self).items() if key != "copies" or value is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        intervals = {key: Interval.from_json(data[key]) for key in ("latency_ms", "reference_ms", "ratio")}
        copies = Copies(**data["copies"]) if data.get("copies") else None
        return cls(**{**data, **intervals, "copies": copies})


@dataclass(frozen=True, slots=True)
class Score:
    """How an engine's outputs compare on one split.

    Attributes:
        divergence: mean of the metric against the uncompressed model's outputs (KL by default); smaller is better.
        accuracy: top-1, in [0, 1]; None where the data has no meaningful labels.
        images: scored.
        agreement: share of images whose top-1 is that of the uncompressed model, in [0, 1]; None where outputs are no
            logits of classes.
    """

    divergence: float
    accuracy: float | None
    images: int
    agreement: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TrialResult:
    """One evaluated policy.

    Attributes:
        number: position in the run, from 0.
        role: who asked for it: ``search``, ``uniform`` or ``random``.
        policy: normalised.
        status: ``ok`` (scored), ``infeasible`` (timed, over a budget, not scored) or ``failed``.
        violations: value / limit - 1 for each budget, in the run's order; empty when failed.
        objective: what a controller minimises among feasible policies: the divergence, or the latency ratio when
            the uncompressed engine meets the budget already; None unless ok.
        score: on the search split; None unless ok.
        latency_ms, reference_ms: medians of the search's quick timing; None when failed before it.
        macs, size_bytes: of one sample, and of the ONNX initializers; None when failed before.
        stage: the last stage reached.
        error: what failed, one line.
        log: file of the run folder that says more of it.
        cached_timing: the latency came from the cache.
        seconds: stage -> wall time.
    """

    number: int
    role: str
    policy: Policy
    status: Status
    violations: tuple[float, ...] = ()
    objective: float | None = None
    score: Score | None = None
    latency_ms: float | None = None
    reference_ms: float | None = None
    macs: int | None = None
    size_bytes: int | None = None
    stage: str = "done"
    error: str | None = None
    cached_timing: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)
    log: str | None = None

    @property
    def feasible(self) -> bool:
        """Every budget holds, as far as the quick timing tells."""
        return self.status == "ok" and all(violation <= 0 for violation in self.violations)

    @property
    def ratio(self) -> float | None:
        """Latency over the reference's."""
        if self.latency_ms is None or not self.reference_ms:
            return None
        return self.latency_ms / self.reference_ms

    def to_json(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "role": self.role,
            "policy": self.policy.to_json(),
            "status": self.status,
            "violations": list(self.violations),
            "objective": self.objective,
            "score": self.score.to_json() if self.score else None,
            "latency_ms": self.latency_ms,
            "reference_ms": self.reference_ms,
            "macs": self.macs,
            "size_bytes": self.size_bytes,
            "stage": self.stage,
            "error": self.error,
            "log": self.log,
            "cached_timing": self.cached_timing,
            "seconds": dict(self.seconds),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        fields = dict(data)
        fields["policy"] = Policy.from_json(fields["policy"])
        fields["violations"] = tuple(fields["violations"])
        fields["score"] = Score(**fields["score"]) if fields["score"] else None
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Entrant:
    """A policy that was trained to see whether it deserves all epochs.

    Attributes:
        trial: its number.
        divergence: on the search split: what the search ranked it by.
        accuracies: of its engine on the selection split, top-1 in [0, 1], after each rung that it came to.
    """

    trial: int
    divergence: float
    accuracies: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Contest:
    """Which of several policies got all epochs of a fine-tuning, and how the search had ranked them.

    Attributes:
        epochs: done at each rung, where those left were compared.
        entrants: the winner first.
        kendall, spearman: rank correlations of the search's score with accuracy after the first rung, which all
            entrants came to; positive where the better score came out better. None of fewer than 3 policies, and where
            all are alike.
        p_value: of Kendall's: how often ranks that have nothing to do with each other agree or disagree as much.
    """

    epochs: tuple[int, ...]
    entrants: tuple[Entrant, ...]
    kendall: float | None = None
    spearman: float | None = None
    p_value: float | None = None

    def __str__(self) -> str:
        trained = f"{len(self.entrants)} policies after {self.epochs[0]} epoch{'s' * (self.epochs[0] > 1)} of training"
        if self.kendall is None or self.spearman is None:
            return f"of {trained} the ranks are too few, or too alike, to hold the search score against"
        return (
            f"the search score ranks {trained} as their accuracy does with Kendall {self.kendall:.2f} "
            f"(p = {self.p_value:.2f}), Spearman {self.spearman:.2f}"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        entrants = tuple(Entrant(**{**row, "accuracies": tuple(row["accuracies"])}) for row in data["entrants"])
        return cls(**{**data, "epochs": tuple(data["epochs"]), "entrants": entrants})
