"""The picture of a search: what each trial cost and how good it was."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autocomp.budget import Budget, Metric
from autocomp.outcome import Contender, SearchResult
from autocomp.report.tables import reference_precision
from autocomp.results import TrialResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["HEIGHT_PX", "WIDTH_PX", "draw", "non_dominated"]

WIDTH_PX, HEIGHT_PX = 1440, 720
_DPI = 120
# Okabe and Ito's colours, told apart by readers with any colour vision; each role has its own marker besides.
_STYLES = {"search": ("#0072B2", "o"), "uniform": ("#E69F00", "s"), "random": ("#009E73", "^")}
_NAMES = {"search": "search", "uniform": "uniform policies", "random": "random policies"}
_BEST, _LIMIT = "#D55E00", "#555555"
_COSTS: dict[Metric, str] = {"latency": "latency", "size": "size", "macs": "MACs"}

Quality = Callable[[TrialResult], float | None]


def draw(result: SearchResult, path: Path) -> None:
    """Write a PNG of `WIDTH_PX` x `HEIGHT_PX` pixels.

    The horizontal axis is what the first budget limits, as a fraction of the uncompressed model's. One panel shows the
    divergence of every trial on the search split, a second one the accuracy there where the data has labels.
    """
    # Imported here, as a figure of its own without pyplot's global state: a search that draws nothing pays nothing.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scored = [trial for trial in result.front if trial.score is not None]
    panels: list[tuple[str, Quality]] = [("divergence on the search split (less is better)", _divergence)]
    if any(_accuracy(trial) is not None for trial in scored):
        panels.append(("accuracy on the search split, % (more is better)", _accuracy))
    figure = Figure(figsize=(WIDTH_PX / _DPI, HEIGHT_PX / _DPI), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (label, quality) in zip(axes, panels, strict=True):
        _panel(axis, result, quality)
        axis.set_ylabel(label)
        axis.set_xlabel(_cost_label(result))
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    _scale_divergence(axes[0], scored)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle("Search under " + " and ".join(str(budget) for budget in result.budgets))
    figure.savefig(path, format="png")


def non_dominated(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points (cost, loss), those that no other beats in both; by rising cost."""
    front: list[tuple[float, float]] = []
    for cost, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((cost, loss))
    return front


def _panel(axis: "Axes", result: SearchResult, quality: Quality) -> None:
    metric, reference = _metric(result), result.reference
    for role, (colour, marker) in _STYLES.items():
        trials = [trial for trial in result.front if trial.role == role]
        points = [(trial, _cost(trial, metric, reference), quality(trial)) for trial in trials]
        drawn = [(trial.feasible, cost, at) for trial, cost, at in points if cost is not None and at is not None]
        inside = [(cost, at) for feasible, cost, at in drawn if feasible]
        outside = [(cost, at) for feasible, cost, at in drawn if not feasible]
        if inside:
            x, y = zip(*inside, strict=True)
            axis.scatter(x, y, s=26, c=colour, marker=marker, alpha=0.6, lw=0, label=_NAMES[role])
        if outside:
            x, y = zip(*outside, strict=True)
            label = f"{_NAMES[role]}, infeasible"
            axis.scatter(x, y, s=26, ec=colour, fc="none", marker=marker, lw=1, label=label)
        if role == "search" and len(inside) > 1:
            sign = 1.0 if quality is _divergence else -1.0
            x, y = zip(*non_dominated([(cost, sign * at) for cost, at in inside]), strict=True)
            axis.step(x, [sign * at for at in y], where="post", c=colour, lw=1.2, label="best at each cost")
    _unscored(axis, result, metric)
    _limits(axis, result, metric)
    _contenders(axis, result, metric, quality)


def _unscored(axis: "Axes", result: SearchResult, metric: Metric) -> None:
    """Trials that were over budget when timed have no quality: ticks along the axis."""
    costs = [_cost(trial, metric, result.reference) for trial in result.front if trial.status == "infeasible"]
    known = [cost for cost in costs if cost is not None]
    if known:
        axis.plot(
            known, [0.0] * len(known), transform=axis.get_xaxis_transform(), ls="", marker="|", ms=12, c=_LIMIT,
            alpha=0.5, clip_on=False, label="infeasible, not scored",
        )  # fmt: skip


def _limits(axis: "Axes", result: SearchResult, metric: Metric) -> None:
    for budget in result.budgets:
        limit = _limit(budget, result.reference) if budget.metric == metric else None
        if limit is not None:
            axis.axvline(limit, c=_LIMIT, ls="--", lw=1.2, label=f"budget {budget}")


def _contenders(axis: "Axes", result: SearchResult, metric: Metric, quality: Quality) -> None:
    """Larger marks at the verified cost; as high as the trial that found them."""
    quality_of = {trial.policy.digest: quality(trial) for trial in result.front if trial.score is not None}
    marks = {
        "reference": ("k", "D", 60, f"uncompressed {reference_precision(result.reference, result.device)}"),
        "best": (_BEST, "*", 240, "best found"),
        "uniform": (_STYLES["uniform"][0], "s", 90, "best uniform"),
        "random": (_STYLES["random"][0], "^", 100, "best random"),
    }
    for role, (colour, marker, size, label) in marks.items():
        row = result.contenders.get(role)
        if row is None:
            continue
        x, low, high = _verified_cost(row, metric, result.reference)
        if role == "reference":
            y = 0.0 if quality is _divergence else _percent(row.search_accuracy)
        else:
            y = quality_of.get(row.policy.digest)
        if x is None or y is None:
            continue
        axis.scatter([x], [y], s=size, c=colour, marker=marker, ec="k", lw=0.9, zorder=5, label=label)
        if low is not None and high is not None:
            axis.hlines(y, low, high, colors="k", lw=1.2, zorder=4)


def _scale_divergence(axis: "Axes", scored: Sequence[TrialResult]) -> None:
    """Divergences span decades; the part between 0 and the smallest of them is linear, so that 0 has a place."""
    positive = [trial.score.divergence for trial in scored if trial.score and trial.score.divergence > 0]
    if positive:
        smallest = min(positive)
        axis.set_yscale("symlog", linthresh=smallest, linscale=0.4)
        axis.set_ylim(-0.15 * smallest, 2 * max(positive))


def _metric(result: SearchResult) -> Metric:
    return result.budgets[0].metric if result.budgets else "latency"


def _cost_label(result: SearchResult) -> str:
    base = reference_precision(result.reference, result.device)
    label = f"{_COSTS[_metric(result)]}, fraction of the uncompressed {base} model's"
    return f"{label}\n(predicted, an estimate)" if result.predicted and _metric(result) == "latency" else label


def _cost(trial: TrialResult, metric: Metric, reference: Contender) -> float | None:
    if metric == "latency":
        return trial.ratio
    value, whole = (trial.macs, reference.macs) if metric == "macs" else (trial.size_bytes, reference.size_bytes)
    return None if value is None else value / whole


def _verified_cost(
    row: Contender, metric: Metric, reference: Contender
) -> tuple[float | None, float | None, float | None]:
    """Value, low and high; without bounds where the quantity is exact."""
    if row.role == "reference":
        return 1.0, None, None
    if metric == "macs":
        return row.macs / reference.macs, None, None
    if metric == "size":
        return row.size_bytes / reference.size_bytes, None, None
    if row.latency is None:
        return None, None, None
    ratio = row.latency.ratio
    return ratio.value, ratio.low, ratio.high


def _limit(budget: Budget, reference: Contender) -> float | None:
    """The budget as a fraction of the reference; None where that was not measured."""
    if budget.relative:
        return budget.limit
    if budget.metric == "latency":
        return None if reference.latency is None else budget.limit / reference.latency.latency_ms.value
    return budget.limit / (reference.macs if budget.metric == "macs" else reference.size_bytes)


def _divergence(trial: TrialResult) -> float | None:
    return None if trial.score is None else trial.score.divergence


def _accuracy(trial: TrialResult) -> float | None:
    return None if trial.score is None else _percent(trial.score.accuracy)


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction
