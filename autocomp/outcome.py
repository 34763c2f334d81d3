"""What a search tells its user: the events while it runs, and the result at the end."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from autocomp.budget import Budget
from autocomp.graph import LayerGraph
from autocomp.policy import FP32, Policy
from autocomp.results import Contest, Interval, LatencyEstimate, TrialResult

__all__ = [
    "NUMERICS",
    "PREDICTED",
    "ChoiceEffect",
    "Contender",
    "EpochDone",
    "Event",
    "Fleet",
    "LayerChoice",
    "Note",
    "Observer",
    "Phase",
    "SearchResult",
    "Stage",
    "Step",
    "TrialDone",
    "Trust",
    "layer_choices",
]

PREDICTED = "latencies are "
"""How the note of a run begins that did not measure."""
NUMERICS = "accuracy is that of the engine's numerics under ONNX Runtime"
"""How the note of a run begins that was measured afterwards, without its images."""
ROLES = ("reference", "best", "uniform", "random")
"""Rows of the closing table, in order."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the run begins: ``trace``, ``statistics``, ``reference``, ``floor``, ``sensitivity``, ``search``,
    ``uniform``, ``random``, ``selection``, ``verify``, ``trust``, ``test``, ``compress``,
    ``finetune``, ``score``, ``bisect``. ``total`` counts its steps where known."""

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
class Step:
    """One step of the phase is done, where its steps are no trials."""


@dataclass(frozen=True, slots=True)
class EpochDone:
    """An epoch of training is done, counted from 1, with this mean loss."""

    number: int
    loss: float


@dataclass(frozen=True, slots=True)
class Note:
    """One line the user should read: a warning, or a decision taken on their behalf."""

    text: str


@dataclass(frozen=True, slots=True)
class Fleet:
    """How a cluster stands.

    Attributes:
        workers: ready to score.
        in_flight: trials that somebody works on.
        lost, retried: workers lost, and trials sent again, so far.
        measuring: share of the time so far that the target devices were timing; None where times are computed.
    """

    workers: int
    in_flight: int
    lost: int
    retried: int
    measuring: float | None = None


Event = Phase | Stage | Step | TrialDone | EpochDone | Note | Fleet
Observer = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Contender:
    """One row of the closing table.

    Attributes:
        role: ``reference``, ``best``, ``uniform`` or ``random``.
        policy: what was compressed; for the reference one precision for all layers.
        latency: verified estimate of the budgeted statistic (p50 where no latency is budgeted); None where it
            was not measured.
        search_accuracy, selection_accuracy, test_accuracy: top-1 of the engine, in [0, 1]; None without labels.
        test_delta: paired difference to the reference's test accuracy with its 95% interval; None for the reference.
        macs, size_bytes: of one sample, and of the initializers of the ONNX.
        verified: every budget held in fresh engines at the stated confidence.
        evaluations: policies evaluated to find it.
        note: why there is no row, or why it is not verified.
        fine_tuned: its weights were trained after the search; those of the rows beside it were not.
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
    fine_tuned: bool = False

    @property
    def precision(self) -> str:
        """Of the layers; several where they differ."""
        return ", ".join(sorted({str(found) for found in self.policy.precisions.values()})) or str(FP32)

    def to_json(self) -> dict[str, Any]:
        latency = self.latency
        data: dict[str, Any] = {
            "policy": self.policy.to_json(),
            "latency_ms": None
            if latency is None
            else {
                "p50": latency.p50_ms,
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
            "timing": None if latency is None else latency.to_json(),
        }
        if self.role != "reference":
            data["ratio"] = None if latency is None else latency.ratio.to_json()
            data["verified"] = self.verified
            data["evaluations"] = self.evaluations
            data["note"] = self.note
            data["fine_tuned"] = self.fine_tuned
        return data

    @classmethod
    def from_json(cls, role: str, data: Mapping[str, Any]) -> Self:
        accuracy = data["accuracy"]
        return cls(
            role=role,
            policy=Policy.from_json(data["policy"]) if "policy" in data else Policy(),
            latency=LatencyEstimate.from_json(data["timing"]) if data["timing"] else None,
            search_accuracy=accuracy["search"],
            selection_accuracy=accuracy["selection"],
            test_accuracy=accuracy["test"],
            test_delta=Interval.from_json(accuracy["test_delta"]) if accuracy["test_delta"] else None,
            macs=data["macs"],
            size_bytes=data["size_bytes"],
            verified=data.get("verified", False),
            evaluations=data.get("evaluations", 0),
            note=data.get("note"),
            fine_tuned=data.get("fine_tuned", False),
        )


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """What a policy does to one layer.

    Attributes:
        name: of the layer.
        channels: output channels of the uncompressed layer.
        kept: of them; 0 where the layer went with its branch.
        precision: as `Precision` writes it.
        macs, macs_left: of one sample, before and after.
    """

    name: str
    channels: int
    kept: int
    precision: str
    macs: int
    macs_left: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(**data)


def layer_choices(graph: LayerGraph, policy: Policy) -> tuple[LayerChoice, ...]:
    """What the policy does to each layer, in the graph's order."""
    shapes, before, after = graph.parameter_shapes(policy), graph.layer_macs(Policy()), graph.layer_macs(policy)
    return tuple(
        LayerChoice(
            name=layer.name,
            channels=layer.weight_shape[0],
            kept=shapes[layer.weight][0] if layer.weight in shapes else 0,
            precision=str(policy.precision(layer.name)),
            macs=before[layer.name],
            macs_left=after.get(layer.name, 0),
        )
        for layer in graph.layers
    )


@dataclass(frozen=True, slots=True)
class ChoiceEffect:
    """What one choice of a policy saves and costs.

    Attributes:
        kind, name: ``channels`` of a group, a removed ``branch``, or the ``precision`` of a layer.
        choice: for readers: ``8 of 16``, ``removed``, ``int8``.
        saved_ms: predicted, with its 95 % interval: without this choice a batch takes so much longer; negative where
            the choice costs time. None without a profile.
        loss: divergence (KL in nats, or the rise of the user's metric) that the choice alone causes in the
            uncompressed model; None where it is not known.
        loss_measured: False where it was read off a line through measured counts.
        macs_saved: of one sample.
    """

    kind: str
    name: str
    choice: str
    saved_ms: Interval | None
    loss: float | None
    loss_measured: bool
    macs_saved: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(**{**data, "saved_ms": Interval.from_json(data["saved_ms"]) if data["saved_ms"] else None})


@dataclass(frozen=True, slots=True)
class Trust:
    """How the score that guided a search ranks policies that were scored again on images it never saw.

    Attributes:
        spearman: rank correlation of the divergence on the search split with that on the selection split.
        low, high: its 95% bootstrap interval.
        policies: behind it.
    """

    spearman: float
    low: float
    high: float
    policies: int

    def __str__(self) -> str:
        return (
            f"the search score ranks {self.policies} policies as held-out images do with Spearman "
            f"{self.spearman:.2f} (95%: {self.low:.2f} to {self.high:.2f})"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


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
        layers: what ``best`` does to each layer; empty where there is no best.
        trust: in the score that guided the search; None where too few policies were scored.
        effects: what each choice of ``best`` saves and costs; empty where there is no best.
        contest: of the policies that were fine-tuned; None where none or one was.
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
    layers: tuple[LayerChoice, ...] = ()
    trust: Trust | None = None
    effects: tuple[ChoiceEffect, ...] = ()
    contest: Contest | None = None

    @property
    def best(self) -> Contender | None:
        return self.contenders.get("best")

    @property
    def reference(self) -> Contender:
        return self.contenders["reference"]

    def to_json(self) -> dict[str, Any]:
        rows = {role: self.contenders[role].to_json() if role in self.contenders else None for role in ROLES}
        return {
            "verified": self.verified,
            "predicted": self.predicted,
            "reference_precision": self.reference.precision,
            "budget": [str(budget) for budget in self.budgets],
            **rows,
            "trials": sum(self.trials.values()),
            "trials_by_role": dict(self.trials),
            "seconds": self.seconds,
            "run": str(self.run),
            "device": dict(self.device),
            "notes": list(self.notes),
            "layers": [choice.to_json() for choice in self.layers],
            "trust": None if self.trust is None else self.trust.to_json(),
            "choices": [effect.to_json() for effect in self.effects],
            "contest": None if self.contest is None else self.contest.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], front: tuple[TrialResult, ...]) -> Self:
        """Read `to_json` back; the trials come from the run's journal."""
        return cls(
            verified=data["verified"],
            budgets=tuple(Budget.parse(text) for text in data["budget"]),
            contenders={role: Contender.from_json(role, data[role]) for role in ROLES if data.get(role)},
            trials=data["trials_by_role"],
            front=front,
            seconds=data["seconds"],
            run=Path(data["run"]),
            notes=tuple(data["notes"]),
            device=data["device"],
            predicted=data["predicted"],
            layers=tuple(LayerChoice.from_json(choice) for choice in data["layers"]),
            trust=Trust(**data["trust"]) if data.get("trust") else None,
            effects=tuple(ChoiceEffect.from_json(effect) for effect in data.get("choices", ())),
            contest=Contest.from_json(data["contest"]) if data.get("contest") else None,
        )
