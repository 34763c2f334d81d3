"""The screen of ``autocomp debug-accuracy``."""

from rich.console import Console
from rich.table import Table

from autocomp.report.tables import percent, significant
from autocomp.study.debug import AccuracyGap, Culprit

__all__ = ["print_accuracy_gap"]


def print_accuracy_gap(found: AccuracyGap, console: Console) -> None:
    """Both scores, the gap, and where it comes from."""
    table = Table(box=None, pad_edge=False)
    for title, side in (("", "left"), ("top-1", "right"), ("agrees with torch", "right"), ("divergence", "right")):
        table.add_column(title, justify=side)  # type: ignore[arg-type]
    for name, score in (("torch model", found.torch), (str(found.device["engine"]), found.engine)):
        divergence = significant(score.divergence, 3)
        table.add_row(name, percent(score.accuracy), percent(score.agreement), divergence)
    console.print(table)
    console.print(f"{_points(found.lost)} points lost by the engine, on {found.torch.images} images", soft_wrap=True)
    if found.partials:
        console.print()
        tried = Table(box=None, pad_edge=False)
        tried.add_column("engine up to, torch from")
        tried.add_column("points lost", justify="right")
        for partial in found.partials:
            tried.add_row(partial.layer, _points(partial.lost))
        console.print(tried)
    console.print()
    console.print(_verdict(found), soft_wrap=True, markup=False)


def _verdict(found: AccuracyGap) -> str:
    if found.agrees:
        return "no more than half a point: the engine computes what the torch model does"
    if found.culprit is None:
        return f"no layer could be named: {found.reason}"
    return _where(found.culprit)


def _where(culprit: Culprit) -> str:
    lost = f"{_points(culprit.before)} points lost before it, {_points(culprit.after)} with it"
    if culprit.layer is None:
        return f"it goes wrong before the first layer, where the input is quantized: {lost}"
    rest = "the end" if culprit.until is None else culprit.until
    return f"it goes wrong at {culprit.layer} ({culprit.precision}), or between it and {rest}: {lost}"


def _points(lost: float) -> str:
    return f"{100 * lost:.2f}"
