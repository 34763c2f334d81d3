"""One policy -> one `TrialResult`: emit, time, and where the budget holds compress, build and score."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from time import perf_counter
from typing import Literal, Protocol, Self

from autocomp.budget import Budget
from autocomp.capabilities import DeviceInfo
from autocomp.compress import Compressed
from autocomp.engines import compare, device_lock, estimate, initializer_bytes, structure_digest
from autocomp.errors import AutocompError
from autocomp.graph import LayerGraph
from autocomp.hardware import LatencyEntry, LatencyKey, LatencyTable
from autocomp.outcome import Observer, Stage
from autocomp.policy import Policy
from autocomp.protocols import Backend, Engine
from autocomp.results import Score, TimingProtocol, TrialResult
from autocomp.study.score import Scorer
from autocomp.study.steady import Patience

__all__ = ["Emitter", "Goal", "Limits", "Trials"]

Goal = Literal["accuracy", "speed"]
ACCURACY_LOSS = 0.01
"""Points of accuracy the fastest policy may lose when the uncompressed engine meets the budget already."""
AGAIN_S = (0.0, 0.5)
"""Pauses before a trial's timing is repeated on a slowed device, which slows int8 more than the float reference."""


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


@dataclass(frozen=True, slots=True)
class Limits:
    """The budgets, and what they are relative to.

    Attributes:
        budgets: every one must hold.
        latency_ms: of the uncompressed engine by statistic (p50, p95, p99).
        macs, size_bytes: of the uncompressed model.
        goal: ``accuracy`` under the budgets; ``speed`` where the uncompressed engine meets them already.
        accuracy: the uncompressed engine's on the search split (agreement 1.0 where there are no labels).
    """

    budgets: tuple[Budget, ...]
    latency_ms: Mapping[str, float]
    macs: int
    size_bytes: int
    goal: Goal = "accuracy"
    accuracy: float = 1.0

    def violations(self, ratio: float, macs: int, size_bytes: int) -> tuple[float, ...]:
        """value / limit - 1 for each budget; latency statistics are scaled by the measured ratio of medians."""
        return tuple(self._violation(budget, ratio, macs, size_bytes) for budget in self.budgets)

    def scaled(self, factor: float) -> Self:
        """The same with the uncompressed engine's latencies multiplied."""
        return replace(self, latency_ms={name: factor * value for name, value in self.latency_ms.items()})

    def _violation(self, budget: Budget, ratio: float, macs: int, size_bytes: int) -> float:
        if budget.metric == "latency":
            reference = self.latency_ms[budget.statistic or "p50"]
            return budget.violation(ratio * reference, reference)
        value, reference = (macs, self.macs) if budget.metric == "macs" else (size_bytes, self.size_bytes)
        return budget.violation(float(value), float(reference))

    def objective(self, score: Score, ratio: float) -> float:
        return ratio if self.goal == "speed" else score.divergence

    def loss(self, score: Score | None) -> tuple[float, ...]:
        """In ``speed``, one more constraint: the accuracy lost, as value / limit - 1 (0 while it is unknown)."""
        if self.goal == "accuracy":
            return ()
        if score is None:
            return (0.0,)
        reached = score.accuracy if score.accuracy is not None else score.agreement
        return ((self.accuracy - (reached or 0.0)) / ACCURACY_LOSS - 1.0,)


@dataclass(slots=True)
class _Stopwatch:
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


@dataclass(frozen=True)
class Trials:
    """Evaluates policies on one device. Failures of a policy are results; bad input and bugs are not caught.

    Attributes:
        graph: of the model.
        emitter: policies -> files.
        backend, reference: of the target, and the uncompressed engine on it.
        reference_structure: digest of the uncompressed engine's structure.
        scorer: on the search split.
        limits: budgets and reference values.
        protocol: of the quick timing that guides the search.
        cache: latencies measured before.
        scores: digest of a policy -> its score, where an earlier run found it under equal keys.
        observer: told of each stage.
    """

    graph: LayerGraph
    emitter: Emitter
    backend: Backend
    reference: Engine
    reference_structure: str
    scorer: Scorer
    limits: Limits
    protocol: TimingProtocol
    cache: LatencyTable
    observer: Observer
    scores: Mapping[str, Score] = field(default_factory=dict)

    @property
    def device(self) -> DeviceInfo:
        return self.backend.device

    def evaluate(self, number: int, role: str, policy: Policy) -> TrialResult:
        """Run one trial; an `AutocompError` on the way becomes a failed result with its stage."""
        watch = _Stopwatch(lambda stage: self.observer(Stage(number, role, stage)))
        try:
            return self._evaluate(number, role, policy, watch)
        except (AutocompError, ArithmeticError, RuntimeError, MemoryError) as error:
            line = " ".join(str(error).split()) or type(error).__name__
            return TrialResult(
                number, role, policy, "failed", stage=watch.stage, error=line[:500], seconds=watch.seconds
            )

    def ratio(self, policy: Policy) -> float:
        """Measured latency over the reference's, from the cache where this structure was timed before."""
        return self._time(self.emitter.skeleton(policy))[0]

    def current(self) -> Limits:
        """The limits with the uncompressed engine's latency as the run has seen it so far.

        An absolute budget is compared with a ratio times this latency. The median over all timings forgets a machine
        that was busy when the first one was taken.
        """
        first = self.limits.latency_ms["p50"]
        return self.limits.scaled(median([first, *self.cache.references_ms()]) / first)

    def _evaluate(self, number: int, role: str, policy: Policy, watch: _Stopwatch) -> TrialResult:
        with watch.at("emit"):
            skeleton = self.emitter.skeleton(policy)
            macs, size_bytes = self.graph.macs(policy), initializer_bytes(skeleton)
        with watch.at("time"):
            ratio, cached = self._time(skeleton)
        limits = self.current()
        violations = limits.violations(ratio, macs, size_bytes)
        reference_ms = limits.latency_ms["p50"]
        latency_ms = ratio * reference_ms
        if any(violation > 0 for violation in violations):
            return TrialResult(
                number, role, policy, "infeasible", violations + self.limits.loss(None),
                latency_ms=latency_ms, reference_ms=reference_ms, macs=macs, size_bytes=size_bytes,
                stage=watch.stage, cached_timing=cached, seconds=watch.seconds,
            )  # fmt: skip
        score = self.scores.get(policy.digest) or self._score(policy, watch)
        return TrialResult(
            number, role, policy, "ok", violations + self.limits.loss(score),
            objective=self.limits.objective(score, ratio), score=score,
            latency_ms=latency_ms, reference_ms=reference_ms, macs=macs, size_bytes=size_bytes,
            cached_timing=cached, seconds=watch.seconds,
        )  # fmt: skip

    def _score(self, policy: Policy, watch: _Stopwatch) -> Score:
        with watch.at("compress"):
            compressed = self.emitter.compress(policy)
        with watch.at("emit"):
            onnx = self.emitter.emit(compressed)
        with watch.at("build"):
            engine = self.backend.build(onnx)
        with watch.at("score"), engine:
            return self.scorer.score(engine)

    def _time(self, onnx: bytes) -> tuple[float, bool]:
        key = LatencyKey.of(structure_digest(onnx), self.reference_structure, self.device, self.backend.batch)
        known = self.cache.get(key)
        if known is not None:
            return known.ratio, True
        patience = Patience(lambda event: None, AGAIN_S)
        with self.backend.build(onnx) as engine, device_lock(self.device):
            take = partial(compare, engine, self.reference, self.protocol)
            timing = patience.measure(take, self.current().latency_ms["p50"])
        found = estimate(timing, "p50")
        self.cache.put(LatencyEntry(key, found.ratio.value, found.reference_ms.value))
        return found.ratio.value, False
