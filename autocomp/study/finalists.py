"""Finalists: the best trials, timed again and scored on images the search never saw, in a fixed order."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

from autocomp.engines import compare, device_lock, estimate, initializer_bytes
from autocomp.outcome import Observer, Stage
from autocomp.protocols import Engine
from autocomp.results import Score, Timing, TimingProtocol, TrialResult
from autocomp.study.score import Scorer
from autocomp.study.steady import DRIFT, Patience
from autocomp.study.trial import Limits, Trials

__all__ = ["Finalist", "reserve", "select"]

LOOKED_AT = 5
"""Times the number of finalists: how many feasible trials are timed again at most to find them."""
ROOMS = (DRIFT, DRIFT / 2, DRIFT / 4)
"""How much slower one finalist may run, as a fraction, and still meet the budgets: the most that a trial allows."""


@dataclass(frozen=True, slots=True)
class Finalist:
    """A trial chosen on the search split, with its score on the selection split."""

    trial: TrialResult
    selection: Score


def select(
    trials: Trials,
    results: Sequence[TrialResult],
    selection: Scorer,
    count: int,
    patience: Patience,
    observer: Observer,
) -> list[Finalist]:
    """The ``count`` best feasible trials on the search split, ordered by their score on the selection split.

    Each is first timed again, longer, by a file of its structure; one whose upper bound is over a budget, or that loses
    too much accuracy where speed is the goal, gives its place to the next. The best of a search lie at its limit, so
    where some were over it, only those are timed that would hold it as much slower. This saves verifications, and
    verifies nothing.
    """
    feasible = sorted(
        (result for result in results if result.feasible and result.objective is not None),
        key=lambda result: (result.objective, result.latency_ms, result.policy.digest),
    )
    chosen: list[Finalist] = []
    looked = 0
    slower: list[float] = []
    for trial in feasible:
        if len(chosen) == count or looked == LOOKED_AT * count:
            break
        if slower and not _meets(trials.current(), trial, median(slower)):
            continue
        looked += 1
        observer(Stage(trial.number, trial.role, "select"))
        skeleton = trials.emitter.skeleton(trial.policy)
        with trials.backend.build(skeleton) as engine:
            usual = trials.current()
            timing = patience.measure(partial(_compare, trials, engine), usual.latency_ms["p50"])
        ratio = estimate(timing, "p50").ratio
        over = usual.violations(ratio.high, trial.macs or 0, initializer_bytes(skeleton))
        if any(violation > 0 for violation in over):
            slower.append(ratio.high / (trial.ratio or ratio.high))
            continue
        with trials.backend.build(trials.emitter.emit(trials.emitter.finish(trial.policy))) as engine:
            score = selection.score(engine)
        if all(loss <= 0 for loss in usual.loss(score)):
            chosen.append(Finalist(trial, score))
    return _ordered(chosen, trials.limits)


def reserve(
    trials: Trials,
    results: Sequence[TrialResult],
    tried: Sequence[Finalist],
    selection: Scorer,
    patience: Patience,
    observer: Observer,
) -> list[Finalist]:
    """One more finalist, for when none of those tried was admitted; none where no trial is left.

    The best of the trials with most room, as of `ROOMS`, else the next best: the best of a search lie at its limit, and
    a device that slows down a little fails them all.
    """
    known = {finalist.trial.policy for finalist in tried}
    left = [result for result in results if result.policy not in known]
    by_room = ([result for result in left if _meets(trials.current(), result, 1 + room)] for room in (*ROOMS, 0.0))
    return select(trials, next(filter(None, by_room), left), selection, 1, patience, observer)


def _meets(limits: Limits, result: TrialResult, slowdown: float) -> bool:
    """Whether the budgets hold where a candidate runs slower by a factor than it did in its trial."""
    ratio = slowdown * (result.ratio or 1.0)
    return all(over <= 0 for over in limits.violations(ratio, result.macs or 0, result.size_bytes or 0))


def _compare(trials: Trials, engine: Engine) -> Timing:
    """A longer timing than the search's, on the engines at hand."""
    with device_lock(trials.device):
        return compare(engine, trials.reference, TimingProtocol(warmup_ms=100.0, blocks=15, block_ms=40.0))


def _ordered(finalists: Sequence[Finalist], limits: Limits) -> list[Finalist]:
    return sorted(finalists, key=lambda found: limits.objective(found.selection, found.trial.ratio or 1.0))
