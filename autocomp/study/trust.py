"""Whether the score that guided a search can be trusted: how it ranks policies on images the search never saw."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from autocomp.errors import AutocompError
from autocomp.outcome import Note, Observer, Phase, Step, Trust
from autocomp.results import Score, TrialResult
from autocomp.study.run import Run
from autocomp.study.score import Scorer
from autocomp.study.trial import Trials

__all__ = ["gauge", "spearman", "spread_over_scores", "trust_in"]

POLICIES = 12
"""Policies scored on the selection split for the gauge, at most: it costs as many builds and passes."""
FEWEST = 6
"""Policies below which a rank correlation says nothing."""
RESAMPLES, CONFIDENCE = 2000, 0.95


def gauge(
    trials: Trials, results: Sequence[TrialResult], selection: Scorer, run: Run, seed: int, observer: Observer
) -> Trust | None:
    """Score some of a run's policies on the selection split and compare the ranks with the search split's.

    Policies are compressed as in the search: finalists' own scores, of their better recipe, would not be its ranks.
    Scores are journaled as they come and none is taken twice.

    Args:
        results: of all roles; those without a score are left out.
        seed: of the bootstrap.

    Returns:
        None where fewer than 6 policies were scored.
    """
    known = {entry["policy"]: Score(**entry["selection"]) for entry in run.entries("trust")}
    chosen = spread_over_scores(results, POLICIES)
    if len(chosen) < FEWEST:
        return None
    observer(Phase("trust", len(chosen)))
    for trial in chosen:
        digest = trial.policy.digest
        if digest not in known:
            try:
                onnx = trials.emitter.emit(trials.emitter.compress(trial.policy))
                with trials.backend.build(onnx) as engine:
                    known[digest] = selection.score(engine)
            except AutocompError as error:
                observer(Note(f"trust: trial {trial.number} could not be scored again: {error}"))
            else:
                run.record("trust", policy=digest, selection=known[digest].to_json())
        observer(Step())
    pairs = [
        (trial.score.divergence, known[trial.policy.digest].divergence)
        for trial in chosen
        if trial.score is not None and trial.policy.digest in known
    ]
    return trust_in([search for search, _ in pairs], [held_out for _, held_out in pairs], seed)


def spread_over_scores(results: Sequence[TrialResult], count: int) -> list[TrialResult]:
    """At most ``count`` scored trials of distinct policies, evenly from the best divergence to the worst one."""
    by_policy: dict[str, TrialResult] = {}
    for result in sorted(results, key=lambda result: result.number):
        if result.status == "ok" and result.score is not None:
            by_policy.setdefault(result.policy.digest, result)
    ranked = sorted(by_policy.values(), key=lambda trial: (trial.score.divergence if trial.score else 0, trial.number))
    if len(ranked) <= count:
        return ranked
    return [ranked[round(index * (len(ranked) - 1) / (count - 1))] for index in range(count)]


def trust_in(search: Sequence[float], held_out: Sequence[float], seed: int) -> Trust | None:
    """Spearman's correlation of two scores of the same policies, with its percentile bootstrap interval.

    Policies are resampled with replacement (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section
    13.3); resamples in which a score is constant have no correlation and are left out.

    Returns:
        None for fewer than 6 policies, or where a score is the same for all.
    """
    value = spearman(search, held_out) if len(search) >= FEWEST else None
    if value is None:
        return None
    drawn = np.random.default_rng(seed).integers(len(search), size=(RESAMPLES, len(search)))
    found = _correlations(np.asarray(search)[drawn], np.asarray(held_out)[drawn])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(found[np.isfinite(found)], (tail, 1 - tail))
    return Trust(value, float(low), float(high), len(search))


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties sharing their mean rank; None where one side is constant."""
    found = float(_correlations(np.asarray([first]), np.asarray([second]))[0])
    return found if np.isfinite(found) else None


def _correlations(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each row (samples,) of the two; NaN where one is constant."""
    ranks = [rankdata(values, axis=1) for values in (first, second)]
    x, y = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    scale = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    found = np.full(len(x), np.nan)
    np.divide((x * y).sum(axis=1), scale, out=found, where=scale > 0)
    return found
