"""What single choices do to a model: tables on the screen, a picture, and the files for other programs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from autocomp.report.tables import ABSENT, macs, megabytes, significant
from autocomp.storage import write_atomic
from autocomp.study.sensitivity import Kind, Sensitivity, SensitivityRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

__all__ = ["CSV", "JSON", "PICTURE", "draw", "print_sensitivity", "write_sensitivity"]

CSV, JSON, PICTURE = "sensitivity.csv", "sensitivity.json", "sensitivity.png"
_DPI, _COLOURS = 120, "cividis_r"
_TITLES: dict[Kind, str] = {
    "channels": "channels kept",
    "branch": "branch removed",
    "precision": "precision of the layer",
}


def write_sensitivity(sensitivity: Sensitivity, folder: Path) -> None:
    """Write ``sensitivity.csv``, ``sensitivity.json`` and ``sensitivity.png``, replacing older ones.

    Raises:
        RunError: the folder cannot be written.
    """
    write_atomic(folder / CSV, sensitivity.to_csv())
    write_atomic(folder / JSON, json.dumps(sensitivity.to_json(), indent=2))
    draw(sensitivity, folder / PICTURE)


def print_sensitivity(sensitivity: Sensitivity, console: Console) -> None:
    """Print one table a kind of choice, divergences in thousandths, and what they rest on."""
    for kind, title in _TITLES.items():
        found = sensitivity.of(kind)
        if not found:
            continue
        columns = _columns([row for row in sensitivity.rows if row.kind == kind])
        saved = "MACs, of all" if kind != "precision" else "bytes, of all"
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, title=title, title_justify="left")
        table.add_column("", no_wrap=True)
        for heading in (*columns, f"saves at most\n{saved}"):
            table.add_column(heading, no_wrap=True, justify="right")
        for name, rows in found.items():
            cells = {_column(row): ABSENT if row.divergence is None else _millinats(row.divergence) for row in rows}
            most = max(_saved(row, sensitivity) for row in rows)
            table.add_row(Text(name), *(cells.get(column, "") for column in columns), f"{100 * most:.1f} %")
        console.print(table)
        console.print()
    for line in _remarks(sensitivity):
        console.print(Text(line))


def draw(sensitivity: Sensitivity, path: Path) -> None:
    """Write a PNG: one heat map a kind of choice, in one logarithmic scale of divergence, the model's input on top."""
    # Imported here, as a figure of its own without pyplot's global state: a search that draws nothing pays nothing.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    kinds = [kind for kind in _TITLES if sensitivity.of(kind)]
    tables = {kind: sensitivity.of(kind) for kind in kinds}
    columns = {kind: _columns([row for row in sensitivity.rows if row.kind == kind]) for kind in kinds}
    tallest = max((len(found) for found in tables.values()), default=1)
    widths = [len(columns[kind]) + 3.0 for kind in kinds]
    figure = Figure(figsize=(max(7.0, 0.62 * sum(widths)), 2.2 + 0.24 * tallest), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    measured = [row.divergence for row in sensitivity.rows if row.divergence]
    highest = max(measured, default=1.0)
    scale = LogNorm(max(min(measured, default=highest), highest / 1e5) / 1.001, highest)
    axes = figure.subplots(1, max(len(kinds), 1), squeeze=False, width_ratios=widths or [1.0])[0]
    for axis, kind in zip(axes, kinds, strict=False):
        _heat_map(axis, list(tables[kind].items()), columns[kind], scale)
        axis.set_title(_TITLES[kind], fontsize=10)
    _legend(figure, list(axes), scale, sensitivity.unit)
    figure.suptitle(f"{sensitivity.model} on {sensitivity.data}: what each choice alone costs")
    figure.savefig(path, format="png")


def _heat_map(
    axis: "Axes", found: Sequence[tuple[str, Sequence[SensitivityRow]]], columns: Sequence[str], scale: "Normalize"
) -> None:
    import numpy as np
    from matplotlib import colormaps

    cells = np.full((len(found), len(columns)), np.nan)
    for line, (_, rows) in enumerate(found):
        for row in rows:
            if row.divergence is not None:
                cells[line, columns.index(_column(row))] = row.divergence
    colours = colormaps[_COLOURS]
    axis.imshow(np.clip(cells, scale.vmin, None), norm=scale, cmap=colours, aspect="auto", interpolation="nearest")
    for line, place in np.argwhere(np.isfinite(cells)):
        value = cells[line, place]
        dark = scale(max(value, scale.vmin or 0.0)) > 0.55
        text = _millinats(value)
        axis.text(place, line, text, ha="center", va="center", fontsize=6, color="white" if dark else "black")
    axis.set_xticks(range(len(columns)), columns, fontsize=8)
    axis.set_yticks(range(len(found)), [name for name, _ in found], fontsize=7)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def _legend(figure: "Figure", axes: "list[Axes]", scale: "Normalize", unit: str) -> None:
    from matplotlib.cm import ScalarMappable

    label = f"divergence from the uncompressed model, {unit} (cells: thousandths)"
    mappable = ScalarMappable(norm=scale, cmap=_COLOURS)
    figure.colorbar(mappable, ax=axes, orientation="horizontal", label=label, fraction=0.05, aspect=50, pad=0.02)


def _columns(rows: Sequence[SensitivityRow]) -> list[str]:
    """Headings of a kind's columns, the least compressed first."""
    kept = {_column(row): -row.kept for row in rows if row.kept is not None}
    return sorted(kept, key=kept.__getitem__) or list(dict.fromkeys(_column(row) for row in rows))


def _column(row: SensitivityRow) -> str:
    """A choice as it heads a column: groups of different widths share their fractions."""
    if row.kept is not None:
        return f"{row.kept:.2f}"
    return "removed" if row.choice is True else str(row.choice)


def _saved(row: SensitivityRow, sensitivity: Sensitivity) -> float:
    if row.kind == "precision":
        return row.bytes_saved / sensitivity.size_bytes
    return row.macs_saved / sensitivity.macs


def _millinats(divergence: float) -> str:
    """In thousandths of a nat, three digits at most behind the point."""
    value = 1000 * divergence
    return significant(value, 3) if value >= 1 else f"{value:.2f}"


def _remarks(sensitivity: Sensitivity) -> list[str]:
    lines = [
        f"Divergence from the uncompressed model ({macs(sensitivity.macs)} MACs, "
        f"{megabytes(sensitivity.size_bytes)}) in thousandths ({sensitivity.unit}), each choice made alone, on "
        f"{sensitivity.images} images of the search split of {sensitivity.data}; the statistics that weights are "
        "reconstructed from come from others."
    ]
    if sensitivity.correlation is not None:
        lines.append(
            "The error that reconstruction leaves in the next layers, known without running the model, ranks the "
            f"kept counts alike with Spearman {sensitivity.correlation:.2f}."
        )
    return lines
