"""What a search tells its user: the events while it runs, and the result at the end."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autocomp.budget import Budget
from autocomp.policy import Policy
from autocomp.results import Interval, LatencyEstimate, TrialResult

__all__ = ["Contender", "Event", "Note", "Observer", "Phase", "SearchResult", "Stage", "TrialDone"]


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the run begins: ``trace``, ``statistics``, ``reference``, ``search``, ``uniform``, ``random``,
    ``selection``, ``verify``, ``test``. ``total`` counts its steps where known."""

    name: str
    total: int | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """Trial ``number`` of ``role`` enters a stage: ``time``, ``compress``, ``build``, ``score``, ``verify``."""

    number: int
    role: str
    name: str


@dataclass(frozen=True, slots=True)
class TrialDone:
    """A trial is finished and journaled."""

    result: TrialResult


@dataclass(frozen=True, slots=True)
class Note:
    """One line the user should read: a warning, or a decision taken on their behalf."""

    text: str


Event = Phase | Stage | TrialDone | Note
Observer = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Contender:
    """One row of the closing table.

    Attributes:
        role: ``reference``, ``best``, ``uniform`` or ``random``.
        policy: empty for the reference.
        latency: verified estimate of the budgeted statistic (p50 where no latency is budgeted); None where it
            was not measured.
        search_accuracy, selection_accuracy, test_accuracy: top-1 of the engine, in [0, 1]; None without labels.
        test_delta: paired difference to the reference's test accuracy with its 95% interval; None for the reference.
        macs, size_bytes: of one sample, and of the initializers of the ONNX.
        verified: every budget held in fresh engines at the stated confidence.
        evaluations: policies evaluated to find it.
        note: why there is no row, or why it is not verified.
    """

    role: str
    policy: Policy
    latency: LatencyEstimate | None
    search_accuracy: float | None
    selection_accuracy: float | None
    test_accuracy: float | None
    test_delta: Interval | None
    macs: int
    size_bytes: int
    verified: bool
    evaluations: int
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        latency = self.latency
        data: dict[str, Any] = {
            "latency_ms": None
            if latency is None
            else {
                latency.statistic: latency.latency_ms.value,
                "low": latency.latency_ms.low,
                "high": latency.latency_ms.high,
            },
            "accuracy": {
                "search": self.search_accuracy,
                "selection": self.selection_accuracy,
                "test": self.test_accuracy,
                "test_delta": None if self.test_delta is None else self.test_delta.to_json(),
            },
            "macs": self.macs,
            "size_bytes": self.size_bytes,
        }
        if self.role != "reference":
            data["ratio"] = None if latency is None else latency.ratio.to_json()
            data["policy"] = self.policy.to_json()
            data["verified"] = self.verified
            data["evaluations"] = self.evaluations
            data["note"] = self.note
        return data


@dataclass(frozen=True)
class SearchResult:
    """What `autocomp.search` returns and ``--json`` prints.

    Attributes:
        verified: ``best`` kept every budget when measured again on fresh engines.
        budgets: asked for.
        contenders: role -> row; ``reference`` is always there.
        trials: role -> evaluated policies, failures included.
        front: feasible and infeasible scored trials, for the Pareto picture.
        seconds: wall time of the whole run, all resumed parts added.
        run: the folder.
        notes: lines the user should read.
        device: fingerprint of where it was measured.
        predicted: latencies are estimates (simulated engine), nothing is verified.
    """

    verified: bool
    budgets: tuple[Budget, ...]
    contenders: Mapping[str, Contender]
    trials: Mapping[str, int]
    front: tuple[TrialResult, ...]
    seconds: float
    run: Path
    notes: tuple[str, ...]
    device: Mapping[str, Any]
    predicted: bool = False

    @property
    def best(self) -> Contender | None:
        return self.contenders.get("best")

    @property
    def reference(self) -> Contender:
        return self.contenders["reference"]

    def to_json(self) -> dict[str, Any]:
        rows = {
            role: self.contenders[role].to_json() if role in self.contenders else None
            for role in ("reference", "best", "uniform", "random")
        }
        return {
            "verified": self.verified,
            "predicted": self.predicted,
            "budget": [str(budget) for budget in self.budgets],
            **rows,
            "trials": sum(self.trials.values()),
            "trials_by_role": dict(self.trials),
            "seconds": self.seconds,
            "run": str(self.run),
            "device": dict(self.device),
            "notes": list(self.notes),
        }
