"""Which of a run's policies deserve the epochs: successive halving over the best of the search."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil, isfinite

from scipy.stats import kendalltau

from autocomp.errors import CompressError
from autocomp.outcome import Note, SearchResult
from autocomp.policy import Policy
from autocomp.results import Contest, Entrant, TrialResult
from autocomp.study.recheck import admit_here
from autocomp.study.run import Run
from autocomp.study.training import Course, accuracy_of, trained
from autocomp.study.trust import spearman

__all__ = ["Decided", "decide", "entrants_of", "halved", "rungs", "sparse_layers"]

KEPT = 3
"""Of so many policies at a rung one goes on."""
LOOKED_AT = 3
"""Times the number of entrants: how many policies are measured at most to find them."""
RUNG, ENTRANT = "rung", "entrant"
"""Kinds of the journal's entries."""
FEWEST = 3
"""Policies below which there is no rank correlation."""


@dataclass(frozen=True)
class Decided:
    """Who gets all epochs, and how that came about; nobody else was asked where ``contest`` is None."""

    winner: TrialResult
    contest: Contest | None


def rungs(epochs: int, count: int) -> tuple[int, ...]:
    """Epochs after which ``count`` policies are compared until one is left, each time `KEPT` times as many.

    Examples:
        >>> rungs(9, 9), rungs(10, 3), rungs(1, 2), rungs(5, 1)
        ((1, 3), (3,), (1,), ())
    """
    rounds = 0
    while count > 1:
        count, rounds = ceil(count / KEPT), rounds + 1
    return tuple(max(1, round(epochs / KEPT ** (rounds - number))) for number in range(rounds))


def entrants_of(course: Course, run: Run, result: SearchResult, reference: bytes, count: int) -> list[TrialResult]:
    """The run's best, and after it the best other trials of its search whose engines keep every budget.

    What a policy's engine takes does not depend on its weights, so that no epoch is spent on one that could not be
    shipped: each is measured on fresh engines, once, before it is trained.
    """
    best = result.best
    searched = [trial for trial in result.front if trial.role == "search" and trial.score is not None]
    first = next(trial for trial in searched if best is not None and trial.policy == best.policy)
    found = [first]
    if first.score is None or first.objective != first.score.divergence:  # the fastest was looked for
        return found
    ranked = sorted((trial for trial in searched if trial.feasible), key=lambda trial: (trial.objective, trial.number))
    others = {
        trial.policy: trial for trial in ranked if trial.policy != first.policy and not sparse_layers(trial.policy)
    }
    for trial in list(others.values())[: LOOKED_AT * (count - 1)]:
        if len(found) == count:
            break
        if _admitted(course, run, result, reference, trial):
            found.append(trial)
    return found


def sparse_layers(policy: Policy) -> list[str]:
    """Layers whose 2:4 pattern training would fill up."""
    return [name for name, precision in policy.precisions.items() if precision.sparse]


def halved(
    entrants: Sequence[TrialResult], epochs: Sequence[int], score: Callable[[TrialResult, int], float | None]
) -> tuple[list[TrialResult], dict[int, list[float]]]:
    """Successive halving (Jamieson and Talwalkar, arXiv:1502.07943, figure 3), with epochs for the resource.

    Args:
        entrants: the one that wins a tie first.
        epochs: at each rung, after which the best third goes on.
        score: of a trial after so many epochs, the more the better; None for one that is out.

    Returns:
        Those left, the best first, and trial -> its score at each rung.
    """
    left, found = list(entrants), {trial.number: list[float]() for trial in entrants}
    for rung in epochs:
        scores = {trial.number: value for trial in left if (value := score(trial, rung)) is not None}
        for number, value in scores.items():
            found[number].append(value)
        left = sorted((trial for trial in left if trial.number in scores), key=lambda trial: -scores[trial.number])
        left = left[: ceil(len(left) / KEPT)]
    return left, found


def decide(course: Course, run: Run, entrants: Sequence[TrialResult]) -> Decided:
    """Train all up to the first rung, and on those whose engines are the most accurate on the selection split.

    All follow the whole training's schedule, so the winner's is as if it had been alone and has the remaining epochs to
    go. Accuracies are journaled as they come, and a training that was stopped goes on from its checkpoint.

    Raises:
        CompressError: every entrant's training diverged.
    """
    epochs = rungs(course.recipe.epochs, len(entrants))
    if not epochs:
        return Decided(entrants[0], None)
    known: dict[tuple[str, int], float | None] = {
        (entry["policy"], entry["epochs"]): entry["accuracy"]
        for entry in run.entries(RUNG)
        if entry["recipe"] == course.recipe.digest
    }

    def score(trial: TrialResult, rung: int) -> float | None:
        place = trial.policy.digest, rung
        if place not in known:
            known[place] = _accuracy(course, trial, rung)
            run.record(RUNG, policy=place[0], recipe=course.recipe.digest, epochs=rung, accuracy=known[place])
        return known[place]

    left, found = halved(entrants, epochs, score)
    if not left:
        raise CompressError("the training of every finalist diverged: try a lower --lr")
    rows = [Entrant(t.number, t.score.divergence, tuple(found[t.number])) for t in entrants if t.score is not None]
    rows.sort(key=lambda row: (-len(row.accuracies), -max(row.accuracies[-1:], default=0.0)))
    return Decided(left[0], _ranked(epochs, rows))


def _accuracy(course: Course, trial: TrialResult, rung: int) -> float | None:
    """On the selection split after ``rung`` epochs; None where training diverged before."""
    course.observer(Note(f"trial {trial.number}: up to {rung} of {course.recipe.epochs} epochs"))
    try:
        compressed, _ = trained(course, trial.policy, rung)
    except CompressError as error:
        course.observer(Note(f"trial {trial.number} is out: {error}"))
        return None
    return accuracy_of(course.bench, course.bench.emitter.emit(compressed))


def _admitted(course: Course, run: Run, result: SearchResult, reference: bytes, trial: TrialResult) -> bool:
    """What fresh engines said of a policy, in this run or now."""
    bench, digest = course.bench, trial.policy.digest
    for entry in (*run.entries("verdict"), *run.entries(ENTRANT)):
        if entry["policy"] == digest:
            return bool(entry["admitted"])
    onnx, budgets = bench.emitter.skeleton(trial.policy), result.budgets
    rows = replace(result.reference, macs=bench.traced.graph.macs(trial.policy)), result.reference
    verdict = admit_here(onnx, reference, bench.spec, bench.backend, budgets, rows, 0.95, course.observer)
    run.record(ENTRANT, policy=digest, admitted=verdict.admitted, reason=verdict.reason)
    return verdict.admitted


def _ranked(epochs: tuple[int, ...], rows: Sequence[Entrant]) -> Contest:
    """With the rank correlations over the first rung."""
    pairs = [(-row.divergence, row.accuracies[0]) for row in rows if row.accuracies]
    if len(pairs) < FEWEST:
        return Contest(epochs, tuple(rows))
    scores, accuracies = zip(*pairs, strict=True)
    kendall = kendalltau(scores, accuracies)
    if not isfinite(kendall.statistic):
        return Contest(epochs, tuple(rows))
    return Contest(epochs, tuple(rows), float(kendall.statistic), spearman(scores, accuracies), float(kendall.pvalue))
