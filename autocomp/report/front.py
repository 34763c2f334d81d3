"""A front for readers: a table on the screen and in ``front.md``, and the Pareto picture."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from autocomp.errors import RunError
from autocomp.report.pareto import non_dominated
from autocomp.report.tables import (
    ABSENT,
    contender_rows,
    macs,
    markdown_table,
    megabytes,
    percent,
    reference_precision,
    untrained,
)
from autocomp.study.front import Front, FrontPoint

__all__ = ["print_front", "write_front_report"]

WIDTH_PX, HEIGHT_PX = 1440, 720
_DPI = 120
_ROLES = {"best": ("#D55E00", "*", 160, "best found"), "uniform": ("#E69F00", "s", 50, "best uniform"),
          "random": ("#009E73", "^", 50, "best random")}  # fmt: skip
_HEADER = (
    "budget",
    "ratio",
    "latency, ms",
    "accuracy (test)",
    "change, points",
    "uniform",
    "random",
    "MACs",
    "size",
    "",
)

_SHOWN = (0, 1, 2, 3, 4, 9)
"""Columns of the table on the screen."""


def print_front(front: Front, console: Console) -> None:
    """Print one row a budget, and where the runs lie. Fits 80 columns."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for place in _SHOWN:
        table.add_column(_two_lines(_HEADER[place]), justify="left" if place == 0 else "right")
    for point in front.points:
        row = _row(point)
        table.add_row(*(Text(_two_lines(row[place])) for place in _SHOWN))
    console.print(table)
    count = sum(point.verified for point in front.points)
    for line in (_ratios(front), f"{count} of {len(front.points)} budgets verified; a run for each: {front.folder}"):
        console.print(Text(line), soft_wrap=True)


def _ratios(front: Front) -> str:
    """What the ratios are of."""
    found = sorted({reference_precision(result.reference, result.device) for result in front.results})
    return f"ratio: of the uncompressed {' and '.join(found)} engine's latency".replace("  ", " ")


def _two_lines(text: str) -> str:
    """What stands in parentheses below the rest."""
    return text.replace(" (", "\n").removesuffix(")")


def write_front_report(front: Front) -> None:
    """Write ``front.md`` and ``front.png`` into the front's folder.

    Raises:
        RunError: the folder cannot be written.
    """
    label = " (predicted, an estimate)" if any(result.predicted for result in front.results) else ""
    reasons = "".join(f"\n- {point.budget}: {point.reason}" for point in front.points if point.reason)
    table = markdown_table(_HEADER, [_row(point) for point in front.points])
    remark = (
        "One search a budget, from the tightest to the loosest, each with a run folder of its own. Ratio and latency "
        "with confidence bounds; accuracy of the engine on the test split, which was read for a budget once all its "
        "choices were journaled. Uniform and random: test accuracy of the best policies of these kinds at equal cost"
        f"{', as searched and not trained' if any(map(untrained, front.results)) else ''}; {_ratios(front)}."
    )
    parts = [f"# Front{label}", table, reasons.strip(), remark, "![Accuracy and divergence over latency](front.png)"]
    try:
        _draw(front)
        (front.folder / "front.md").write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write the report into {front.folder} ({error.strerror}): free space there") from error


def _row(point: FrontPoint) -> tuple[str, ...]:
    result = point.result
    if result is None:
        return (point.budget, *[ABSENT] * 8, "out of reach")
    rows = {row.role: found for row, found in zip(result.contenders.values(), contender_rows(result), strict=True)}
    best = result.best
    others = [percent(found.test_accuracy) if (found := result.contenders.get(role)) else ABSENT
              for role in ("uniform", "random")]  # fmt: skip
    if best is None:
        return (point.budget, *[ABSENT] * 4, *others, ABSENT, ABSENT, "nothing found")
    row = rows["best"]
    return (
        point.budget, row.ratio.line, row.latency_ms.line, row.accuracy, row.change.line, *others, macs(best.macs),
        megabytes(best.size_bytes), row.state,
    )  # fmt: skip


def _draw(front: Front) -> None:
    """Left every scored trial's divergence over its ratio, with the front; right, where the data has labels, the
    finalists' test accuracy."""
    # Imported here, as a figure of its own without pyplot's global state: a search that draws nothing pays nothing.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_PX / _DPI, HEIGHT_PX / _DPI), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    labelled = any(result.reference.test_accuracy is not None for result in front.results)
    axes = figure.subplots(1, 1 + labelled, squeeze=False)[0]
    left, right = axes[0], axes[-1]
    trials = {
        trial.policy.digest: (trial.ratio, trial.score.divergence)
        for result in front.results
        for trial in result.front
        if trial.score is not None and trial.ratio is not None
    }
    points = list(trials.values())
    if points:
        left.scatter(*zip(*points, strict=True), s=16, c="#0072B2", alpha=0.5, lw=0, label="trials")
        left.step(
            *zip(*non_dominated(points), strict=True), where="post", c="#0072B2", lw=1.2, label="best at each ratio"
        )
        left.set_yscale("symlog", linthresh=max(min((d for _, d in points if d > 0), default=1e-6), 1e-9))
    for role, (colour, marker, size, label) in _ROLES.items():
        for place, result in enumerate(front.results):
            row = result.contenders.get(role)
            if row is None or row.latency is None or row.test_accuracy is None:
                continue
            ratio, accuracy = row.latency.ratio, 100 * row.test_accuracy
            right.scatter([ratio.value], [accuracy], s=size, c=colour, marker=marker, ec="k", lw=0.7, zorder=3,
                          label=label if place == 0 else None)  # fmt: skip
            right.hlines(accuracy, ratio.low, ratio.high, colors=colour, lw=1.0)
    right.set_ylabel("accuracy on the test split, % (more is better)")
    left.set_ylabel("divergence on the search split (less is better)")
    predicted = any(result.predicted for result in front.results)
    for axis in axes:
        for point in front.points:
            axis.axvline(float(point.budget.removesuffix("x")), c="#555555", ls="--", lw=0.7)
        axis.set_xlabel(f"latency, fraction of the uncompressed model's{' (predicted, an estimate)' * predicted}")
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(front.folder / "front.png", format="png")
