"""One policy -> one `TrialResult`: emit, time, and where the budget holds compress, build and score."""

import json
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Literal, Self

from autocomp.budget import Budget
from autocomp.engines import initializer_bytes, structure_digest
from autocomp.errors import EngineError
from autocomp.graph import LayerGraph
from autocomp.hardware import LatencyEntry, LatencyKey, LatencyTable
from autocomp.outcome import Observer, Stage
from autocomp.policy import Policy
from autocomp.results import Score, TrialResult
from autocomp.storage import storage_errors, write_atomic
from autocomp.study.tasks import Answer, ScoreTask, Task, Timed, TimeTask
from autocomp.study.worker import FAULTS, Stopwatch, Worker, line_of, log_of

__all__ = ["Goal", "Limits", "Steps", "Trials", "follow"]

Goal = Literal["accuracy", "speed"]
LOGS = "failures"
"""Folder of a run for logs of failed trials."""
ACCURACY_LOSS = 0.01
"""Points of accuracy the fastest policy may lose when the uncompressed engine meets the budget already."""


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

    @property
    def idle(self) -> bool:
        """Whether the uncompressed engine meets the budgets already."""
        return all(violation <= 0 for violation in self.violations(1.0, self.macs, self.size_bytes))

    @property
    def ratio(self) -> float | None:
        """The least ratio that a latency budget allows; None where latency is not what is limited."""
        if self.goal == "speed":
            return None
        return min((self.ratio_of(budget) for budget in self.budgets if budget.metric == "latency"), default=None)

    def ratio_of(self, budget: Budget) -> float:
        """The ratio that a latency budget allows."""
        own_ms = self.latency_ms[budget.statistic or "p50"]
        return budget.limit_for(own_ms) / own_ms

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


Steps = Generator[Task, Answer, TrialResult]
"""A trial under way: it asks for tasks to be done, is sent their answers, and returns its result."""


def follow(steps: Steps, do: Callable[[Task], Answer]) -> TrialResult:
    """Do every task of a trial, here and now."""
    try:
        task = next(steps)
        while True:
            task = steps.send(do(task))
    except StopIteration as end:
        result: TrialResult = end.value
        return result


@dataclass(frozen=True)
class Trials(Worker):
    """Trials of one run: what is asked of a worker for each, and what follows from its answers.

    Failures of a policy are results; bad input and bugs are not caught.

    Attributes:
        graph: of the model.
        reference_structure: digest of the uncompressed engine's structure.
        limits: budgets and reference values.
        cache: latencies measured before.
        folder: of the run, where logs of failed trials are kept.
        observer: told of each stage.
        scores: digest of a policy -> its score, where an earlier run found it under equal keys.
    """

    graph: LayerGraph
    reference_structure: str
    limits: Limits
    cache: LatencyTable
    folder: Path
    observer: Observer
    scores: Mapping[str, Score] = field(default_factory=dict)

    def evaluate(self, number: int, role: str, policy: Policy) -> TrialResult:
        """Run one trial in this process; an `AutocompError` on the way becomes a failed result with its stage."""
        announce = self._announce(number, role)
        return follow(self.steps(number, role, policy), lambda task: self.do(task, announce))

    def steps(self, number: int, role: str, policy: Policy) -> Steps:
        """One trial, whoever does its tasks: emit, have it timed, and where the budgets hold scored."""
        watch = Stopwatch(self._announce(number, role))
        try:
            return (yield from self._steps(number, role, policy, watch))
        except FAULTS as error:
            return TrialResult(
                number, role, policy, "failed", stage=watch.stage, error=line_of(error), seconds=watch.seconds,
                log=self._log(number, policy, error),
            )  # fmt: skip

    def ratio(self, policy: Policy) -> float:
        """Measured latency over the reference's, from the cache where this structure was timed before."""
        onnx = self.emitter.skeleton(policy)
        key = self._key(onnx)
        known = self.cache.get(key)
        return known.ratio if known is not None else self._keep(key, self.time(self._timing(onnx, key)))

    def current(self) -> Limits:
        """The limits with the uncompressed engine's latency as the run has seen it so far.

        An absolute budget is compared with a ratio times this latency. The median over all timings forgets a machine
        that was busy when the first one was taken.
        """
        first = self.limits.latency_ms["p50"]
        return self.limits.scaled(median((first, *self.cache.references_ms())) / first)

    def _steps(self, number: int, role: str, policy: Policy, watch: Stopwatch) -> Steps:
        with watch.at("emit"):
            skeleton = self.emitter.skeleton(policy)
            macs, size_bytes = self.graph.macs(policy), initializer_bytes(skeleton)
        with watch.at("time"):
            key = self._key(skeleton)
            known = self.cache.get(key)
        if known is None:
            timed = _done(watch, (yield self._timing(skeleton, key))).timed
            assert timed is not None
            ratio = self._keep(key, timed)
        else:
            ratio = known.ratio
        del skeleton  # a trial may wait long for its score
        limits = self.current()
        violations = limits.violations(ratio, macs, size_bytes)
        reference_ms = limits.latency_ms["p50"]
        latency_ms = ratio * reference_ms
        if any(violation > 0 for violation in violations):
            return TrialResult(
                number, role, policy, "infeasible", violations + self.limits.loss(None),
                latency_ms=latency_ms, reference_ms=reference_ms, macs=macs, size_bytes=size_bytes,
                stage=watch.stage, cached_timing=known is not None, seconds=watch.seconds,
            )  # fmt: skip
        score = self.scores.get(policy.digest)
        if score is None:
            score = _done(watch, (yield ScoreTask(policy))).score
            assert score is not None
        return TrialResult(
            number, role, policy, "ok", violations + self.limits.loss(score),
            objective=self.limits.objective(score, ratio), score=score,
            latency_ms=latency_ms, reference_ms=reference_ms, macs=macs, size_bytes=size_bytes,
            cached_timing=known is not None, seconds=watch.seconds,
        )  # fmt: skip

    def _log(self, number: int, policy: Policy, error: BaseException) -> str:
        """Keep what is known of a failure; the file's name in the run folder."""
        name = f"{LOGS}/{number}-{policy.digest[:8]}.txt"
        with storage_errors(self.folder / name):
            (self.folder / LOGS).mkdir(exist_ok=True)
        write_atomic(self.folder / name, f"{json.dumps(policy.to_json())}\n\n{log_of(error)}")
        return name

    def _announce(self, number: int, role: str) -> Callable[[str], None]:
        return lambda stage: self.observer(Stage(number, role, stage))

    def _key(self, onnx: bytes) -> LatencyKey:
        return LatencyKey.of(structure_digest(onnx), self.reference_structure, self.device, self.backend.batch)

    def _timing(self, onnx: bytes, key: LatencyKey) -> TimeTask:
        usual = self.current()
        return TimeTask(onnx, key.structure, usual.latency_ms["p50"], usual.ratio)

    def _keep(self, key: LatencyKey, timed: Timed) -> float:
        self.cache.put(LatencyEntry(key, timed.ratio, timed.reference_ms))
        return timed.ratio


def _done(watch: Stopwatch, answer: Answer) -> Answer:
    """Take an answer over into the trial. Raises: EngineError if the task failed."""
    watch.add(answer)
    if answer.error is not None:
        error = EngineError(answer.error)
        error.add_note(answer.log)
        raise error
    return answer
