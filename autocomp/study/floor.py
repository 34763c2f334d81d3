"""Budgets that no engine of the space can meet: found before trials are spent, with what to relax."""

from collections.abc import Sequence
from dataclasses import replace

from autocomp.budget import Budget
from autocomp.engines import initializer_bytes
from autocomp.errors import InfeasibleError
from autocomp.outcome import Observer, Phase
from autocomp.policy import Policy
from autocomp.results import TrialResult
from autocomp.study.trial import Limits, Trials
from autocomp.study.workbench import Workbench

__all__ = ["probe_floor", "refuse_if_none_feasible"]

FLOOR_MARGIN = 0.05
"""A budget is called infeasible at once when the nearest of the most compressed engines misses it by more."""
SLACK = 1.05
"""The relaxation proposed lies this much above the floor, so that timing noise cannot undo it."""


def _extremes(bench: Workbench) -> list[Policy]:
    """Policies likely to be fastest, most compressed first: every uniform one, with all branches and with none."""
    every = frozenset(bench.traced.graph.branch_by_name)
    policies = [
        bench.traced.graph.normalise(Policy(policy.kept, dropped, policy.precisions))
        for policy in reversed(bench.space.uniform())
        for dropped in (frozenset[str](), every)
    ]
    return [policy for policy in dict.fromkeys(policies) if bench.space.contains(policy)]


def probe_floor(bench: Workbench, trials: Trials, observer: Observer) -> None:
    """Refuse a budget that even the most compressed engines miss, before any trial is spent on it."""
    if trials.limits.goal == "speed":
        return
    observer(Phase("floor"))
    reached: list[tuple[float, int, int]] = []
    for policy in _extremes(bench):
        size_bytes = initializer_bytes(trials.emitter.skeleton(policy))
        reached.append((trials.ratio(policy), bench.traced.graph.macs(policy), size_bytes))
        if max(trials.current().violations(*reached[-1])) <= FLOOR_MARGIN:
            return
    limits = trials.current()
    worst, (ratio, macs, size_bytes) = min((max(limits.violations(*found)), found) for found in reached)
    if worst > FLOOR_MARGIN:
        raise InfeasibleError(_floor_line(limits, ratio, macs, size_bytes, worst))


def _floor_line(limits: Limits, ratio: float, macs: int, size_bytes: int, worst: float) -> str:
    latency = ratio * limits.latency_ms["p50"]
    over = zip(limits.budgets, limits.violations(ratio, macs, size_bytes), strict=True)
    relaxed = ", ".join(str(_relaxed(budget, 1 + by)) for budget, by in over if by > 0)
    return (
        f"the budget {' and '.join(map(str, limits.budgets))} is below the floor: the nearest engine found runs at "
        f"{latency:.2f} ms ({ratio:.2f}x) with {macs / 1e6:.1f} MMACs, {100 * worst:.0f}% over; relax it to about "
        f"{relaxed}, or allow more in the space (--space)"
    )


def _relaxed(budget: Budget, factor: float) -> Budget:
    """The budget with a limit that the floor meets, in three digits; a relative one is at most 1."""
    limit = float(f"{budget.limit * factor * SLACK:.3g}")
    return replace(budget, limit=min(limit, 1.0) if budget.relative else limit)


def refuse_if_none_feasible(results: Sequence[TrialResult], limits: Limits) -> None:
    """Raises: InfeasibleError naming the nearest trial if none met every budget."""
    if any(result.feasible for result in results):
        return
    timed = [result for result in results if result.violations]
    if not timed:
        raise InfeasibleError("no trial could be timed: read the errors in the run's journal.jsonl")
    nearest = min(timed, key=lambda result: max(result.violations))
    raise InfeasibleError(
        f"no trial met the budget {' and '.join(map(str, limits.budgets))}: the nearest ran at "
        f"{nearest.ratio or 1.0:.2f}x, {100 * max(nearest.violations):.0f}% over, though the fastest engines of the "
        "space come nearer; give more --trials, or relax it"
    )
