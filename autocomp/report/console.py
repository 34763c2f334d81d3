"""The terminal: one live line while a search runs, a table at its end."""

from time import monotonic
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from autocomp.outcome import EpochDone, Event, Fleet, Note, Phase, SearchResult, Stage, Step, TrialDone
from autocomp.report.tables import (
    ContenderRow,
    contender_rows,
    duration,
    milliseconds,
    percent,
    reference_precision,
    significant,
    statistic,
    untrained,
    verdict,
)
from autocomp.results import LatencyEstimate, TrialResult
from autocomp.study.finetune import Finetuned
from autocomp.study.recheck import Verification
from autocomp.study.shipped import ShippedVerification
from autocomp.study.sparsify import Sparsified

__all__ = [
    "LiveScreen",
    "print_estimate",
    "print_finetuned",
    "print_result",
    "print_shipped",
    "print_sparsified",
    "print_verification",
]

ESTIMATE = "predicted, an estimate"


class LiveScreen:
    """An observer that shows where a search stands; a context manager.

    On a terminal one line is redrawn in place, and notes and finished phases scroll by above it. Elsewhere only
    those lines are written, and about ten a phase on its way.

    Args:
        console: where to draw.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._phase: Phase | None = None
        self._begun = monotonic()
        self._done = self._trials = self._failed = 0
        self._stage: Stage | None = None
        self._fleet: Fleet | None = None
        self._best: dict[str, TrialResult] = {}
        # Drawn on events only: a thread that redraws by the clock would disturb what is being timed.
        self._live = Live(console=console, get_renderable=self._line, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._end_phase()
        self._live.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case Phase():
                self._end_phase()
                self._phase, self._begun, self._stage = event, monotonic(), None
                self._done = self._trials = self._failed = 0
            case Stage():
                self._stage = event
            case Fleet():
                self._fleet = event
            case Step():
                self._advance()
            case TrialDone(result):
                self._count(result)
            case EpochDone(number, loss):
                self._print(f"epoch {number}: loss {significant(loss, 3)}")
            case Note(text):
                self._print(f"note: {text}")
        if self._live.is_started:
            self._live.refresh()

    def _count(self, result: TrialResult) -> None:
        best = self._best.get(result.role)
        if result.feasible and (best is None or _rank(result) < _rank(best)):
            self._best[result.role] = result
        self._trials += 1
        self._failed += result.status == "failed"
        self._advance()

    def _advance(self) -> None:
        self._done += 1
        total = self._phase.total if self._phase else None
        if not self._console.is_terminal and total and self._done < total and self._done % max(total // 10, 1) == 0:
            self._print(self._line().plain)

    def _end_phase(self) -> None:
        if self._phase is None:
            return
        counted = f"{self._trials} trial{'s' * (self._trials != 1)} in " if self._trials else ""
        best = self._best.get(self._phase.name)
        found = f"; best {_found(best)}" if best and self._trials else ""
        self._print(f"{self._phase.name}: {counted}{duration(monotonic() - self._begun)}{found}")
        self._phase = None

    def _line(self) -> Text:
        """Most important first: a narrow terminal cuts off the end."""
        if self._phase is None:
            return Text("starting", no_wrap=True, overflow="ellipsis")
        name, total = self._phase.name, self._phase.total
        parts = [f"{name} {self._done}/{total}" if total else name]
        if total and 0 < self._done < total:
            left = (monotonic() - self._begun) / self._done * (total - self._done)
            parts[0] += f", {duration(left)} left"
        best = self._best.get(name) or self._best.get("search")
        if best is not None:
            parts.append(f"best {_found(best)}")
        if self._fleet is not None and self._trials:
            a_minute = 60 * self._trials / max(monotonic() - self._begun, 1e-3)
            parts.append(_counts(self._fleet, a_minute, self._failed))
        if self._stage is not None:
            role = f" ({self._stage.role})" if self._stage.role != name else ""
            parts.append(f"trial {self._stage.number}{role}: {self._stage.name}")
        return Text(" | ".join(parts), no_wrap=True, overflow="ellipsis")

    def _print(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)


def print_result(result: SearchResult, console: Console) -> None:
    """Print the closing table, the verdict, and what the user should know. Fits 80 columns."""
    rows = contender_rows(result)
    title = ESTIMATE if result.predicted else None
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, title=title, title_justify="left")
    headings = (f"latency\n{statistic(result)}, ms", "ratio\n", "accuracy\ntest", "change\npoints", "MACs\nsize")
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, no_wrap=True, justify="right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in _cells(row)))
    console.print()
    console.print(table)
    remark = untrained(result)
    if remark is not None:
        console.print(Text(remark))
    console.print()
    style = "bold green" if result.verified else "bold yellow"
    console.print(Text(verdict(result), style=style))
    for row in rows:
        if row.note and row.note not in verdict(result):
            console.print(Text(f"{row.label}: {row.note}"))
    for note in result.notes:
        console.print(Text(f"note: {note}"))
    counts = ", ".join(f"{count} {role}" for role, count in result.trials.items())
    console.print(Text(f"{sum(result.trials.values())} evaluations ({counts}) in {duration(result.seconds)}"))
    console.print(Text(f"run folder: {result.run}"), soft_wrap=True)


def print_verification(found: Verification, console: Console) -> None:
    """Print what fresh engines said of a run's model."""
    latency = found.verdict.latency
    asked = " and ".join(map(str, found.result.budgets))
    base = f"uncompressed {reference_precision(found.result.reference, found.device)}"
    said = f"Verified: within {asked}" if found.verdict.admitted else f"Not verified: {found.verdict.reason}"
    lines = [
        f"latency {latency.statistic}: {milliseconds(latency.latency_ms).line} ms",
        f"{base}: {milliseconds(latency.reference_ms).line} ms",
        f"ratio: {latency.ratio.value:.3f} ({latency.ratio.low:.3f} to {latency.ratio.high:.3f})",
        f"{said}, on {found.device['name']} with {found.device['engine']}, bounds at {100 * found.confidence:.3g} %",
    ]
    if found.changed:
        lines.append(f"the run was predicted for this device; its report now has the measurement: {found.result.run}")
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def print_finetuned(found: Finetuned, console: Console) -> None:
    """Print what training did for a run."""
    before, after = found.selection
    lines = [
        f"loss of each epoch: {', '.join(f'{loss:.4g}' for loss in found.losses) or 'none'}",
        f"accuracy on the selection split: {percent(before)} before, {percent(after)} after",
    ]
    if found.contest is not None:
        lines.append(str(found.contest))
    best = found.result.best
    if found.change is not None and best is not None:
        change = found.change
        lines.append(
            f"accuracy on the test split: {percent(best.test_accuracy)}, {100 * change.value:+.2f} points "
            f"({100 * change.low:+.2f} to {100 * change.high:+.2f})"
        )
    lines.append(verdict(found.result) if found.replaced else f"the run stays as it was: {found.reason}")
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def print_sparsified(found: Sparsified, console: Console) -> None:
    """Print what sparse training did to a model."""
    before, after = found.accuracy
    lines = [
        f"loss of each epoch: {', '.join(f'{loss:.4g}' for loss in found.losses)}",
        f"accuracy on the selection split: {percent(before)} before, {percent(after)} after",
    ]
    counted = (("small batch-norm factors", found.factors), ("filters of zeros", found.filters))
    lines += [f"{what}: {was} before, {now} after, of {count}" for what, (count, was, now) in counted]
    lines.append(f"weights: {found.weights}, for a search with --weights")
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def print_shipped(found: ShippedVerification, console: Console) -> None:
    """Print which claims of a shipped folder hold."""
    lines = []
    if found.verdict is not None and found.device is not None:
        latency = found.verdict.latency
        lines.append(f"latency {latency.statistic}: {milliseconds(latency.latency_ms).line} ms")
        base = f"uncompressed {reference_precision(found.card.reference, found.device)}"
        lines.append(f"{base}: {milliseconds(latency.reference_ms).line} ms")
        lines.append(f"ratio: {latency.ratio.value:.3f} ({latency.ratio.low:.3f} to {latency.ratio.high:.3f})")
        lines.append(f"device: {found.device['name']} with {found.device['engine']}")
    if found.accuracy is not None:
        lines.append(f"accuracy: {percent(found.accuracy)}, on the card {percent(found.card.model.test_accuracy)}")
    if found.verdict is not None and not found.verdict.admitted and found.verdict.reason not in found.broken:
        lines.append(f"not on the card, which claims no budget: {found.verdict.reason}")
    lines += [f"no longer true: {line}" for line in found.broken] or ["all that the card claims holds"]
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def print_estimate(estimate: LatencyEstimate, console: Console, *, predicted: bool, compared: bool) -> None:
    """Print one measured latency, and with ``compared`` how it stands to the reference."""
    label = f"{estimate.statistic}{f' ({ESTIMATE})' if predicted else ''}"
    lines = [f"latency {label}: {milliseconds(estimate.latency_ms).line} ms"]
    if compared:
        ratio = estimate.ratio
        lines.append(f"reference: {milliseconds(estimate.reference_ms).line} ms")
        lines.append(f"ratio: {ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})")
    if estimate.copies is not None:
        there, back = estimate.copies.to_device_ms, estimate.copies.from_device_ms
        lines.append(f"beside that, copies to the device {there:.3f} ms and back {back:.3f} ms")
    lines.append(f"runs: {estimate.samples}, blocks rejected for drift: {estimate.rejected}")
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _cells(row: ContenderRow) -> tuple[str, ...]:
    """Each cell has a second line, for bounds and the like: the table then fits a narrow terminal."""
    numbers = (row.latency_ms, row.ratio, row.change)
    latency, ratio, change = (f"{number.value}\n{number.bounds}" for number in numbers)
    state = row.state.replace(", ", ",\n")
    return f"{row.label}\n{row.precision or state}", latency, ratio, row.accuracy, change, f"{row.macs}\n{row.size}"


def _rank(result: TrialResult) -> float:
    """What the search minimises, of a scored trial."""
    return float("inf") if result.objective is None else result.objective


def _counts(fleet: Fleet, a_minute: float, failed: int) -> str:
    parts = [f"{fleet.in_flight} trials on {fleet.workers} workers", f"{significant(a_minute, 2)}/min"]
    if failed:
        parts.append(f"{failed} failed")
    if fleet.measuring is not None:
        parts.append(f"device timing {100 * fleet.measuring:.0f}% of the time")
    if fleet.lost:
        parts.append(f"{fleet.lost} workers lost, {fleet.retried} trials sent again")
    return ", ".join(parts)


def _found(result: TrialResult) -> str:
    parts = []
    if result.ratio is not None:
        parts.append(f"{result.ratio:.3f}x")
    if result.score is not None:
        if result.score.accuracy is not None:
            parts.append(f"search accuracy {percent(result.score.accuracy)}")
        parts.append(f"divergence {significant(result.score.divergence, 3)}")
    return ", ".join(parts)
