"""Profiles for readers: the bar while one is built, what is in one, what it says, how two differ."""

from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from autocomp.hardware import HardwareProfile, Kernel, KernelEstimate, ProfileDifference
from autocomp.outcome import Event, Note, Phase
from autocomp.report.tables import duration, significant
from autocomp.study.build_profile import Progress as Stand
from autocomp.study.profiles import Checked, PolicyLatency, Standing

__all__ = [
    "BuildScreen",
    "estimate_json",
    "print_checked",
    "print_difference",
    "print_estimated",
    "print_policy",
    "print_profile",
    "profile_json",
]

MOST = 20
"""Kernels that a difference lists on the screen."""


class BuildScreen:
    """Shows where a build stands: a bar on a terminal, elsewhere about ten lines. A context manager.

    Called with the events of preparing a model, and with a build's progress after each engine.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tenths = 0
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20))
        # Drawn after engines only: a thread that redraws by the clock would disturb what is being timed.
        self._bar = Progress(*columns, console=console, auto_refresh=False, transient=True)
        self._task = self._bar.add_task("starting", total=1.0)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            self._print(f"note: {event.text}")
        elif isinstance(event, Phase) and event.name != "profile":
            self._bar.update(self._task, description=event.name, refresh=self._console.is_terminal)

    def progress(self, stand: Stand) -> None:
        done = min(stand.elapsed_s / stand.seconds, 1.0)
        left = max(stand.seconds - stand.elapsed_s, 0.0)
        line = (
            f"{stand.engines} engines, {stand.kernels} kernels, uncertainty {100 * stand.uncertainty:.1f} %, "
            f"{duration(left)} left | {stand.model}, batch {stand.batch}"
        )
        self._bar.update(self._task, description=line, completed=done, refresh=self._console.is_terminal)
        if not self._console.is_terminal and int(10 * done) > self._tenths:
            self._tenths = int(10 * done)
            self._print(line)

    def _print(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)


def profile_json(profile: HardwareProfile, found: Standing) -> dict[str, Any]:
    """What is in a profile, and how it stands to this machine."""
    return {
        "device": profile.device,
        "engine": profile.engine,
        "threads": profile.threads,
        "details": profile.details,
        "date": profile.date.isoformat(),
        "protocol": profile.protocol,
        "notes": profile.notes,
        "standing": found.kind,
        "differences": list(found.differences),
        "rebuild": found.rebuild or None,
        "kernels": [
            {"op": op, "precision": precision, "batch": batch, "kernels": count}
            for (op, precision, batch), count in _counts(profile).items()
        ],
        "engines": [
            {"model": model, "batch": batch, "engines": count} for (model, batch), count in _engines(profile).items()
        ],
    }


def print_profile(profile: HardwareProfile, found: Standing, console: Console) -> None:
    """Print a profile's fingerprint, what was measured, and whether it still fits this machine."""
    rows = [("device", profile.device), ("engine", profile.engine), ("threads", str(profile.threads))]
    rows += [tuple(part.split(": ", 1)) for part in profile.details.split("; ") if ": " in part]  # type: ignore[misc]
    rows += [("date", profile.date.isoformat()), ("protocol", profile.protocol), ("notes", profile.notes)]
    for name, value in rows:
        if value:
            console.print(Text(f"{name}: {value}"), soft_wrap=True)
    console.print(Text(_standing(profile, found), style="" if found.kind == "measured" else "yellow"), soft_wrap=True)
    if not profile.measured:
        return
    for (model, batch), count in _engines(profile).items():
        console.print(Text(f"{count} engine{'s' * (count != 1)} of {model}, batch {batch}"), soft_wrap=True)
    table = _table("kernels", "precision", "batch", "count")
    for (op, precision, batch), count in _counts(profile).items():
        table.add_row(op, precision, str(batch), str(count))
    console.print(table)


def print_checked(profile: HardwareProfile, found: Checked, console: Console) -> None:
    """Print whether a profile still says what its device does, and else what to do."""
    for line in (*found.standing.differences, *map(str, found.drifts)):
        console.print(Text(line), soft_wrap=True)
    if found.rebuild:
        line = f"{profile.device} is stale: build it again with '{found.rebuild}'"
        console.print(Text(line, style="yellow"), soft_wrap=True)
    elif found.drifts:
        console.print(Text(f"{profile.device} fits this device"), soft_wrap=True)


def estimate_json(kernel: Kernel, found: KernelEstimate, profile: HardwareProfile) -> dict[str, Any]:
    """One kernel's time."""
    low, high = found.interval_ms
    return {
        "device": profile.device,
        "kernel": str(kernel),
        "context": kernel.context,
        "ms": found.ms,
        "low_ms": low,
        "high_ms": high,
        "source": found.source,
    }


def print_estimated(kernel: Kernel, found: KernelEstimate, console: Console, *, chosen: bool) -> None:
    """Print one kernel's time with its interval, how it is known, and the context; ``chosen``: the user named it."""
    context = kernel.context + ("" if chosen else " (measured most often; --context picks another)")
    for line in (
        f"{_ms(found.ms, found.interval_ms)}, {found.source}",
        f"kernel: {_short(kernel)}",
        f"context: {context}",
    ):
        console.print(Text(line), soft_wrap=True)


def print_policy(found: PolicyLatency, console: Console) -> None:
    """Print a policy's predicted latency and its kernels."""
    table = _table("layer", "ms", "95 %", "source", "kernel", left=(0, 3, 4))
    for name, (kernel, entry) in found.kernels.items():
        low, high = (significant(bound, 3) for bound in entry.interval_ms)
        table.add_row(
            Text(name or "(input)"), significant(entry.ms, 3), f"{low} to {high}", entry.source, _short(kernel)
        )
    console.print(table)
    prediction = found.prediction
    console.print(
        Text(
            f"predicted: {_ms(prediction.ms, prediction.interval_ms)} at batch {found.batch}; "
            f"{100 * prediction.measured:.0f} % of the kernels' time was measured"
        ),
        soft_wrap=True,
    )


def print_difference(found: ProfileDifference, console: Console) -> None:
    """Print how two profiles differ, the kernels that differ most beyond their errors first."""
    for line in found.fingerprint or ("both have the same engine, threads and device",):
        console.print(Text(line), soft_wrap=True)
    if found.ratios:
        table = _table("in both", "precision", "kernels", "median ratio")
        for (op, precision), (ratio, count) in found.ratios.items():
            table.add_row(op, precision, str(count), f"{ratio:.3f}")
        console.print(table)
    console.print(Text(f"{len(found.differing)} of {len(found.shared)} kernels differ beyond their errors"))
    if found.differing:
        table = _table("ratio", "errors", "old ms", "new ms", "kernel", left=(4,))
        for entry in found.differing[:MOST]:
            times = (significant(time.median_ms, 3) for time in (entry.old, entry.new))
            table.add_row(f"{entry.ratio:.3f}", f"{entry.errors:.1f}", *times, Text(str(entry.kernel)))
        console.print(table)
        if len(found.differing) > MOST:
            console.print(Text(f"and {len(found.differing) - MOST} more: --json lists them all"))
    for name, kernels in (("first", found.only_old), ("second", found.only_new)):
        if kernels:
            console.print(Text(f"only in the {name}: {len(kernels)} kernels, such as {kernels[0]}"), soft_wrap=True)


def _table(*headings: str, left: tuple[int, ...] = (0,)) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place in left else "right")
    return table


def _standing(profile: HardwareProfile, found: Standing) -> str:
    if found.kind == "described":
        return "described: nothing was measured"
    if found.kind == "stale":
        return f"stale on this machine: {'; '.join(found.differences)}; build it again with '{found.rebuild}'"
    if found.kind == "foreign":
        return f"note: of another device than this one{f' ({found.here})' if found.here else ''}"
    return "measured: it fits this machine"


def _counts(profile: HardwareProfile) -> Mapping[tuple[str, str, int], int]:
    counts = Counter((e.kernel.op, e.kernel.precision, e.kernel.batch) for e in profile.kernels)
    return dict(sorted(counts.items()))


def _engines(profile: HardwareProfile) -> Mapping[tuple[str, int], int]:
    return dict(sorted(Counter((entry.model, entry.batch) for entry in profile.engines).items()))


def _ms(value: float, interval: tuple[float, float]) -> str:
    low, high = (significant(bound) for bound in interval)
    return f"{significant(value)} ms (95 %: {low} to {high})"


def _short(kernel: Kernel) -> str:
    """Without its context, which the machine-readable output has."""
    return str(kernel).partition(" [")[0]
