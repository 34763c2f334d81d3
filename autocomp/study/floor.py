"""Budgets that no engine of the space can meet: found before trials are spent, with what to relax."""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from operator import itemgetter

from autocomp.budget import Budget, Metric
from autocomp.engines import device_lock, initializer_bytes
from autocomp.errors import InfeasibleError
from autocomp.hardware import ENTRY
from autocomp.outcome import Observer, Phase
from autocomp.policy import Policy
from autocomp.results import TrialResult
from autocomp.study.predicted import PredictedBackend
from autocomp.study.profiling import by_layer
from autocomp.study.trial import Limits, Trials
from autocomp.study.workbench import EditEmitter, Workbench

__all__ = ["probe_floor", "refuse_if_none_feasible"]

FLOOR_MARGIN = 0.05
"""A budget is called infeasible at once when the nearest of the most compressed engines misses it by more."""
SETTING = 3
"""Layers named as those that set a floor."""
PROFILED_RUNS = 20
_QUANTITY = {"latency": "time", "macs": "work", "size": "size"}
SLACK = 1.05
"""The relaxation proposed lies this much above the floor, so that timing noise cannot undo it."""


def _extremes(bench: Workbench) -> list[Policy]:
    """Policies likely to be fastest, most compressed first: every uniform one, with all branches and with none, at the
    lowest ranks and at full ones."""
    every = frozenset(bench.traced.graph.branch_by_name)
    policies = [
        bench.traced.graph.normalise(Policy(policy.kept, dropped, policy.precisions))
        for policy in reversed(bench.space.uniform())
        for dropped in (frozenset[str](), every)
    ]
    policies = [*map(bench.space.narrowest, policies), *policies]
    return [policy for policy in dict.fromkeys(policies) if bench.space.contains(policy)]


def probe_floor(bench: Workbench, trials: Trials, observer: Observer) -> None:
    """Refuse a budget that even the most compressed engines miss, before any trial is spent on it."""
    if trials.limits.goal == "speed":
        return
    observer(Phase("floor"))
    reached: dict[Policy, tuple[float, int, int]] = {}
    for policy in _extremes(bench):
        size_bytes = initializer_bytes(trials.emitter.skeleton(policy))
        reached[policy] = (trials.ratio(policy), bench.traced.graph.macs(policy), size_bytes)
        if max(trials.current().violations(*reached[policy])) <= FLOOR_MARGIN:
            return
    limits = trials.current()
    worst, policy, found = min(
        ((max(limits.violations(*found)), policy, found) for policy, found in reached.items()), key=itemgetter(0)
    )
    if worst > FLOOR_MARGIN:
        raise _below_floor(bench, limits, policy, found)


def _below_floor(bench: Workbench, limits: Limits, policy: Policy, found: tuple[float, int, int]) -> InfeasibleError:
    """What to say of a budget that the nearest engine misses: where that is, what sets it, and what to relax."""
    ratio, macs, size_bytes = found
    latency_ms = ratio * limits.latency_ms["p50"]
    over = list(zip(limits.budgets, limits.violations(*found), strict=True))
    budget, worst = max(over, key=itemgetter(1))
    relaxed = [str(_relaxed(each, 1 + by)) for each, by in over if by > 0]
    layers = _shares(bench, policy, budget.metric)[:SETTING]
    named = ", ".join(f"{name} ({100 * share:.0f}%)" for name, share in layers)
    line = (
        f"the budget {' and '.join(map(str, limits.budgets))} is below the floor: the nearest engine found runs at "
        f"{latency_ms:.2f} ms ({ratio:.2f}x) with {macs / 1e6:.1f} MMACs, {100 * worst:.0f}% over; most of its "
        f"{_QUANTITY[budget.metric]} is that of {named}; relax it to about {', '.join(relaxed)}, or allow more in the "
        "space (--space)"
    )
    floor = {
        "latency_ms": latency_ms,
        "ratio": ratio,
        "macs": macs,
        "size_bytes": size_bytes,
        "over": worst,
        "layers": [{"name": name, "share": share} for name, share in layers],
        "relaxed": relaxed,
    }
    return InfeasibleError(line, floor)


def _shares(bench: Workbench, policy: Policy, metric: Metric) -> list[tuple[str, float]]:
    """Layers with their shares of what a budget limits, the largest first.

    A layer's time holds that of the operators behind it, as the runtime's profiler has it. Where these cannot be told
    apart multiply-accumulates stand for it.
    """
    graph = bench.traced.graph
    if metric == "size":
        graph, policy = graph.paired(policy)
        shapes = graph.parameter_shapes(policy)
        left = [layer for layer in graph.layers if layer.weight in shapes]
        bits = {layer.name: policy.precision(layer.name).weight_bits for layer in left}
        parts = {layer.name: float(prod(shapes[layer.weight]) * bits[layer.name]) for layer in left}
    elif metric == "latency" and isinstance(bench.backend, PredictedBackend):
        parts = bench.backend.layer_ms(policy)
        parts.pop(ENTRY, None)
    elif metric == "latency" and isinstance(bench.emitter, EditEmitter):
        onnx = bench.emitter.skeleton(policy)
        with device_lock(bench.backend.device):
            times = bench.backend.profile(onnx, PROFILED_RUNS)
        parts = by_layer(graph, policy, onnx, times, bench.emitter.template.values)
        parts.pop(ENTRY, None)
    else:
        parts = {name: float(count) for name, count in graph.layer_macs(policy).items()}
    total = sum(parts.values()) or 1.0
    return sorted(((name, part / total) for name, part in parts.items()), key=lambda entry: -entry[1])


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
