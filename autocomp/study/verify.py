"""Finalists measured on fresh engines, and admitted or not."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, hypot

from autocomp.budget import Budget
from autocomp.engines import BackendSpec, compare, estimate, initializer_bytes, measure_fresh, merge
from autocomp.engines.label import policy_of
from autocomp.errors import EngineError
from autocomp.outcome import Note, Observer, Phase, Stage
from autocomp.protocols import Backend
from autocomp.results import Interval, LatencyEstimate, Score, Timing, TimingProtocol
from autocomp.study.finalists import Finalist, reserve, select
from autocomp.study.predicted import PredictedBackend
from autocomp.study.run import Run
from autocomp.study.score import Scorer
from autocomp.study.steady import Patience
from autocomp.study.study import Study
from autocomp.study.trial import Limits, Trials
from autocomp.study.workbench import Workbench

__all__ = [
    "Verdict",
    "admit",
    "reference_latency",
    "statistics_of",
    "verification_protocol",
    "verify_role",
    "verify_roles",
]

NORMAL = 1.959964
"""Standard deviations to either side that hold 95 %."""
MIN_SAMPLES = {"p50": 30, "p95": 200, "p99": 1000}
"""Runs of the candidate below which a statistic is not judged."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What fresh engines said of a finalist.

    Attributes:
        admitted: every budget holds at the upper confidence bound.
        latency: of the first budgeted statistic (p50 where no latency is budgeted).
        reason: why it was not admitted.
        size_bytes: of the file that was measured.
    """

    admitted: bool
    latency: LatencyEstimate
    size_bytes: int
    reason: str | None = None


def statistics_of(budgets: Sequence[Budget]) -> tuple[str, ...]:
    """The latency statistics judged, in the budgets' order; p50 where no latency is budgeted."""
    found = tuple(dict.fromkeys(budget.statistic for budget in budgets if budget.statistic is not None))
    return found or ("p50",)


def reference_latency(verified: LatencyEstimate) -> LatencyEstimate:
    """The uncompressed engine's, from a measurement beside it."""
    own = verified.reference_ms
    median = verified.reference_p50_ms
    return LatencyEstimate(
        verified.statistic, own, own, Interval(1.0, 1.0, 1.0), verified.samples, verified.rejected, median, median
    )


def verification_protocol(statistics: Sequence[str], builds: int = 5, blocks: int = 8) -> TimingProtocol:
    """Blocks long enough for the samples that the statistics ask for, with a tenth to spare.

    Builds differ more than blocks of one build do, and a bound from three of them is wide whatever their number of
    blocks (Student's t with two degrees of freedom): so rather more builds of fewer blocks.
    """
    wanted = max(MIN_SAMPLES[name] for name in statistics)
    repeats = max(3, ceil(1.1 * wanted / (builds * blocks)))
    return TimingProtocol(warmup_ms=200.0, blocks=blocks, block_ms=40.0, min_repeats=repeats, builds=builds)


def admit(
    onnx: bytes,
    reference: bytes,
    spec: BackendSpec,
    backend: Backend,
    limits: Limits,
    macs: int,
    confidence: float,
    protocol: TimingProtocol,
    patience: Patience,
) -> Verdict:
    """Measure a finalist on fresh engines in fresh processes and judge every budget at its upper bound.

    A relative latency budget is judged on the paired ratio of interleaved blocks, an absolute one on the raw times.

    Args:
        spec, backend: of the engine, for other processes and for this one.
        limits: with the latency that the uncompressed engine usually has.
        confidence: of the two-sided bounds; 1 - 0.05 / K when at most K finalists are tried.
        patience: waits for the device to run as usual.
    """
    if backend.measures:
        take = partial(measure_fresh, spec, onnx, reference, protocol)
    else:
        take = partial(_computed, backend, onnx, reference, protocol)
    timing = patience.measure(take, limits.latency_ms["p50"])
    size_bytes = initializer_bytes(onnx)
    few = _too_few(timing, statistics_of(limits.budgets), protocol.builds)
    if few is not None:
        return Verdict(False, estimate(timing, "p50", confidence), size_bytes, few)
    reasons = [
        reason
        for budget in limits.budgets
        if (reason := _broken(budget, timing, limits, macs, size_bytes, confidence)) is not None
    ]
    latency = estimate(timing, statistics_of(limits.budgets)[0], confidence)
    if isinstance(backend, PredictedBackend):
        latency = _uncertain(latency, backend, onnx, reference)
    return Verdict(not reasons, latency, size_bytes, "; ".join(reasons) or None)


def _uncertain(latency: LatencyEstimate, backend: PredictedBackend, onnx: bytes, reference: bytes) -> LatencyEstimate:
    """Bounds of 95 % by what the profile does not know; those of the ratio take both errors to be independent."""
    found, whole = (backend.prediction(policy_of(file)) for file in (onnx, reference))
    spread = latency.ratio.value * NORMAL * hypot(found.deviation_ms / found.ms, whole.deviation_ms / whole.ms)
    return replace(
        latency,
        latency_ms=Interval(latency.latency_ms.value, *found.interval_ms),
        reference_ms=Interval(latency.reference_ms.value, *whole.interval_ms),
        ratio=Interval(latency.ratio.value, max(latency.ratio.value - spread, 0.0), latency.ratio.value + spread),
    )


def _computed(backend: Backend, onnx: bytes, reference: bytes, protocol: TimingProtocol) -> Timing:
    """Of an engine whose times are computed: in another process they would be the same."""
    with backend.build(onnx) as candidate, backend.build(reference) as beside:
        builds = [compare(candidate, beside, protocol, build) for build in range(protocol.builds)]
    return merge(builds, protocol.max_drift)


def _too_few(timing: Timing, statistics: Sequence[str], builds: int) -> str | None:
    """Why a timing cannot be judged: a build whose blocks were all rejected for drift, or not enough samples."""
    kept = len({block.build for block in timing.blocks})
    if kept < builds:
        return f"the device drifted too much: only {kept} fresh builds of {builds} gave usable blocks"
    wanted = max(MIN_SAMPLES[name] for name in statistics)
    if timing.samples < wanted:
        return f"not enough samples: {timing.samples} of {wanted} are left, {timing.rejected} blocks drifted"
    return None


def _broken(
    budget: Budget, timing: Timing, limits: Limits, macs: int, size_bytes: int, confidence: float
) -> str | None:
    if budget.metric == "macs":
        over = budget.violation(macs, limits.macs)
        return f"{macs / 1e6:.2f} MMACs are over {budget}" if over > 0 else None
    if budget.metric == "size":
        over = budget.violation(size_bytes, limits.size_bytes)
        return f"{size_bytes / 1e6:.3f} MB are over {budget}" if over > 0 else None
    found = estimate(timing, budget.statistic or "p50", confidence)
    judged, unit = (found.ratio, "x") if budget.relative else (found.latency_ms, " ms")
    if judged.high <= budget.limit:
        return None
    return f"{found.statistic} {judged.value:.3f}{unit} with upper bound {judged.high:.3f}{unit} is over {budget}"


def verify_roles(
    bench: Workbench, trials: Trials, study: Study, selection: Scorer, run: Run, observer: Observer
) -> dict[str, tuple[Finalist, Verdict]]:
    """Choose and try the finalists of every role; what a stopped run chose before stays chosen.

    Returns:
        role -> its admitted finalist, or the last one tried; the search's own is called ``best``.
    """
    attempts = bench.config.finalists
    patience = Patience(observer)
    chosen: dict[str, list[Finalist]] = {}
    for entry in run.entries("finalists"):  # those chosen before a stop
        by_policy = {result.policy.digest: result for result in study.of(entry["role"])}
        chosen.setdefault(entry["role"], []).extend(
            Finalist(by_policy[kept["policy"]], Score(**kept["selection"])) for kept in entry["finalists"]
        )

    def add(role: str, found: list[Finalist]) -> None:
        chosen.setdefault(role, []).extend(found)
        kept = [{"policy": f.trial.policy.digest, "selection": f.selection.to_json()} for f in found]
        run.record("finalists", role=role, finalists=kept)

    for role in ("search", "uniform", "random"):
        if role not in chosen:  # one place is kept for when none of these is admitted
            add(role, select(trials, study.of(role), selection, max(1, attempts - 1), patience, observer))
    observer(Phase("verify", sum(map(len, chosen.values()))))
    winners = {}
    for role, entries in chosen.items():
        found = verify_role(run, trials, entries, bench.reference, bench.spec, attempts, patience, observer)
        while len(entries) < attempts and not (found is not None and found[1].admitted):
            more = reserve(trials, study.of(role), entries, selection, patience, observer)
            if not more:
                break
            add(role, more)
            found = verify_role(run, trials, more, bench.reference, bench.spec, attempts, patience, observer) or found
        if found is not None:
            winners["best" if role == "search" else role] = found
    return winners


def verify_role(
    run: Run,
    trials: Trials,
    finalists: Sequence[Finalist],
    reference: bytes,
    spec: BackendSpec,
    attempts: int,
    patience: Patience,
    observer: Observer,
) -> tuple[Finalist, Verdict] | None:
    """Try finalists in order, at most ``attempts``; the first admitted wins, else the last tried is returned.

    Every verdict is journaled and none is asked twice, for whatever role: a finalist that failed is not timed again
    until it passes.
    """
    past = {entry["policy"]: entry for entry in run.entries("verdict")}
    last: tuple[Finalist, Verdict] | None = None
    for finalist in finalists[:attempts]:
        trial = finalist.trial
        observer(Stage(trial.number, trial.role, "verify"))
        known = past.get(trial.policy.digest)
        if known is not None:
            latency = LatencyEstimate.from_json(known["latency"])
            verdict = Verdict(known["admitted"], latency, known["size_bytes"], known["reason"])
        else:
            onnx = trials.emitter.emit(trials.emitter.finish(trial.policy))
            try:
                protocol = verification_protocol(statistics_of(trials.limits.budgets))
                verdict = admit(
                    onnx, reference, spec, trials.backend, trials.current(), trial.macs or 0, 1 - 0.05 / attempts,
                    protocol, patience,
                )  # fmt: skip
            except EngineError as error:
                observer(Note(f"{trial.role}: trial {trial.number} could not be verified: {error}"))
                continue
            run.record(
                "verdict", role=trial.role, policy=trial.policy.digest, admitted=verdict.admitted,
                latency=verdict.latency.to_json(), size_bytes=verdict.size_bytes, reason=verdict.reason,
                onnx_sha256=hashlib.sha256(onnx).hexdigest(),
            )  # fmt: skip
        last = (finalist, verdict)
        if verdict.admitted:
            return last
        observer(Note(f"{trial.role}: trial {trial.number} was not admitted: {verdict.reason}"))
    return last
