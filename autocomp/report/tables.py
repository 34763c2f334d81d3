"""Rows and sentences of a result as text; the screen and the report lay them out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, log10
from typing import Any

from autocomp.budget import Budget
from autocomp.outcome import Contender, SearchResult
from autocomp.policy import FP32
from autocomp.results import Interval, LatencyEstimate, TrialResult

__all__ = [
    "BudgetRow",
    "ContenderRow",
    "Quantity",
    "TrialsRow",
    "budget_rows",
    "contender_rows",
    "duration",
    "macs",
    "markdown_table",
    "megabytes",
    "milliseconds",
    "ordered",
    "percent",
    "reference_precision",
    "significant",
    "statistic",
    "trial_rows",
    "untrained",
    "verdict",
]

LABELS = {"reference": "uncompressed", "best": "best found", "uniform": "uniform", "random": "random"}
"""Role -> how a row is called, in the order of the rows."""
ABSENT = "-"


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number with its bounds, as text; ``bounds`` is empty where there are none."""

    value: str = ABSENT
    bounds: str = ""

    @property
    def line(self) -> str:
        return f"{self.value} ({self.bounds})" if self.bounds else self.value


@dataclass(frozen=True, slots=True)
class ContenderRow:
    """One row of the closing table. Accuracy is of the engine on the test split, its change in points.

    ``precision`` is that of the uncompressed engine, and empty for the others.
    """

    label: str
    precision: str
    state: str
    latency_ms: Quantity
    ratio: Quantity
    accuracy: str
    change: Quantity
    macs: str
    size: str
    note: str | None

    @property
    def name(self) -> str:
        return f"{self.label} {self.precision}".strip()


@dataclass(frozen=True, slots=True)
class BudgetRow:
    """One budget: what it allows, what the uncompressed engine needs, what the best found is judged by."""

    budget: str
    limit: str
    reference: str
    judged: str
    holds: str


@dataclass(frozen=True, slots=True)
class TrialsRow:
    """What came of one role's trials; ``unlisted`` are those whose results are not in the result's front."""

    role: str
    evaluated: int
    feasible: int
    infeasible: int
    failed: int

    @property
    def unlisted(self) -> int:
        return max(self.evaluated - self.feasible - self.infeasible - self.failed, 0)


def significant(value: float, digits: int = 4) -> str:
    """``digits`` significant digits without an exponent; whole digits are never dropped."""
    return "0" if value == 0 else f"{value:.{_decimals(value, digits)}f}"


def milliseconds(interval: Interval) -> Quantity:
    """Four significant digits of the value, the bounds with as many decimals."""
    places = 0 if interval.value == 0 else _decimals(interval.value, 4)
    return Quantity(f"{interval.value:.{places}f}", f"{interval.low:.{places}f} to {interval.high:.{places}f}")


def percent(fraction: float | None) -> str:
    return ABSENT if fraction is None else f"{100 * fraction:.2f} %"


def macs(count: int) -> str:
    """Multiply-accumulates with three significant digits and the fitting prefix."""
    for factor, unit in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if count >= factor:
            return f"{significant(count / factor, 3)}{unit}"
    return str(count)


def megabytes(size_bytes: int) -> str:
    return f"{significant(size_bytes / 10**6, 3)} MB" if size_bytes >= 10**5 else f"{size_bytes / 10**3:.1f} kB"


def duration(seconds: float) -> str:
    """``43 s``, ``3:05`` or ``1:02:03``."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def statistic(result: SearchResult) -> str:
    """Of the latencies in the table."""
    return next((row.latency.statistic for row in ordered(result) if row.latency is not None), "p50")


def ordered(result: SearchResult) -> tuple[Contender, ...]:
    """The contenders that exist: uncompressed, best found, uniform, random."""
    return tuple(result.contenders[role] for role in LABELS if role in result.contenders)


def contender_rows(result: SearchResult) -> tuple[ContenderRow, ...]:
    """The closing table's rows, as `ordered`."""
    return tuple(_contender_row(row, result) for row in ordered(result))


def untrained(result: SearchResult) -> str | None:
    """What the rows beside a fine-tuned one are; None where they are all of one kind."""
    beside = [LABELS[row.role] for row in ordered(result) if row.role in ("uniform", "random")]
    if not beside or result.best is None or not result.best.fine_tuned:
        return None
    return f"{' and '.join(beside)}: as searched, only {LABELS['best']} was trained"


def budget_rows(result: SearchResult) -> tuple[BudgetRow, ...]:
    """Each budget, judged by the upper confidence bound of the best found."""
    return tuple(_budget_row(budget, result.reference, result.best) for budget in result.budgets)


def trial_rows(result: SearchResult) -> tuple[TrialsRow, ...]:
    """Per role, in the order the roles ran."""
    counts = Counter((trial.role, _fate(trial)) for trial in result.front)
    return tuple(
        TrialsRow(role, total, *(counts[role, fate] for fate in ("feasible", "infeasible", "failed")))
        for role, total in result.trials.items()
    )


def verdict(result: SearchResult) -> str:
    """One sentence: did it work, and what was found."""
    asked = " and ".join(str(budget) for budget in result.budgets)
    best = result.best
    if best is None:
        return f"Nothing verified: no policy was found that meets {asked}."
    found = ", ".join(filter(None, (_speed(best.latency), _quality(best), _savings(best, result.reference))))
    if result.predicted:
        estimate = f"Predicted, an estimate: for {asked} the best found reaches {found}."
        return f"{estimate} No latency was measured, nothing is verified."
    if result.verified:
        return f"Verified: within {asked}, the best found reaches {found}."
    reason = f" ({best.note})" if best.note else ""
    return f"Not verified{reason}: for {asked} the best found reaches {found}."


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A pipe table; the first column to the left, the others to the right."""
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *[[_cell(text) for text in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _decimals(value: float, digits: int) -> int:
    return max(digits - 1 - floor(log10(abs(value))), 0)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", r"\|").split())


def reference_precision(reference: Contender, device: Mapping[str, Any]) -> str:
    """What the uncompressed engine computes in, as ``fp32``; on a GPU whether float32 is cut to TF32 as well."""
    tf32 = dict(device.get("details") or {}).get("tf32") == "on"
    return f"{reference.precision} (TF32)" if tf32 and reference.precision == str(FP32) else reference.precision


def _contender_row(row: Contender, result: SearchResult) -> ContenderRow:
    is_reference = row.role == "reference"
    state = "" if is_reference else "predicted" if result.predicted else "verified" if row.verified else "not verified"
    latency, delta = row.latency, row.test_delta
    state += ", fine-tuned" if row.fine_tuned else ""
    return ContenderRow(
        label=LABELS[row.role],
        precision=reference_precision(row, result.device) if is_reference else "",
        state=state,
        latency_ms=Quantity() if latency is None else milliseconds(latency.latency_ms),
        ratio=Quantity("1") if is_reference else Quantity() if latency is None else _ratio(latency.ratio),
        accuracy=percent(row.test_accuracy),
        change=Quantity() if delta is None else _points(delta),
        macs=macs(row.macs),
        size=megabytes(row.size_bytes),
        note=row.note,
    )


def _ratio(interval: Interval) -> Quantity:
    return Quantity(f"{interval.value:.3f}", f"{interval.low:.3f} to {interval.high:.3f}")


def _points(delta: Interval) -> Quantity:
    value, low, high = (f"{100 * part:+.2f}" for part in (delta.value, delta.low, delta.high))
    return Quantity(value, f"{low} to {high}")


def _budget_row(budget: Budget, reference: Contender, best: Contender | None) -> BudgetRow:
    measured = _measured(budget, reference)
    limit = str(budget) if measured is None else _amount(budget, budget.limit_for(measured))
    judged = None if best is None else _judged(budget, best, measured)
    return BudgetRow(
        budget=str(budget),
        limit=limit,
        reference=ABSENT if measured is None else _amount(budget, measured),
        judged=ABSENT if judged is None else _amount(budget, judged),
        holds=ABSENT if judged is None or measured is None else _holds(judged, budget.limit_for(measured)),
    )


def _holds(judged: float, limit: float) -> str:
    return "yes" if judged <= limit else "no"


def _measured(budget: Budget, row: Contender) -> float | None:
    """The budgeted quantity of a contender; None where it was not measured with the budget's statistic."""
    if budget.metric == "macs":
        return float(row.macs)
    if budget.metric == "size":
        return float(row.size_bytes)
    if row.latency is None or row.latency.statistic != budget.statistic:
        return None
    return row.latency.latency_ms.value


def _judged(budget: Budget, best: Contender, reference: float | None) -> float | None:
    """What is compared with the limit: the upper bound of the latency, of the paired ratio for a relative budget."""
    latency = best.latency
    if budget.metric != "latency":
        return _measured(budget, best)
    if latency is None or latency.statistic != budget.statistic or reference is None:
        return None
    return latency.ratio.high * reference if budget.relative else latency.latency_ms.high


def _amount(budget: Budget, value: float) -> str:
    if budget.metric == "latency":
        return f"{significant(value)} ms"
    return megabytes(round(value)) if budget.metric == "size" else macs(round(value))


def _fate(trial: TrialResult) -> str:
    if trial.status == "failed":
        return "failed"
    return "feasible" if trial.feasible else "infeasible"


def _speed(latency: LatencyEstimate | None) -> str:
    if latency is None:
        return ""
    return f"{significant(latency.latency_ms.value)} ms ({latency.statistic}), {latency.ratio.value:.3f}x the latency"


def _quality(best: Contender) -> str:
    if best.test_accuracy is None:
        return ""
    change = f" ({_points(best.test_delta).value} points)" if best.test_delta is not None else ""
    return f"{percent(best.test_accuracy)} test accuracy{change}"


def _savings(best: Contender, reference: Contender) -> str:
    return f"{best.macs / reference.macs:.2f}x the MACs, {best.size_bytes / reference.size_bytes:.2f}x the size"
