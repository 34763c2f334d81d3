"""What a TensorRT engine is made of, for the screen of ``autocomp build --layers`` and for a run's report."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from autocomp.engines.tensorrt import EngineLayer
from autocomp.errors import RunError
from autocomp.report.tables import ABSENT, markdown_table

__all__ = ["LAYERS", "layers_text", "print_layers", "read_layers"]

LAYERS = "layers.json"
"""File of a run's folder."""
_HEADER = ("runs", "computes in", "fused operators", "writes")


def print_layers(found: Sequence[EngineLayer], console: Console) -> None:
    """One row for each launch, and what there is of reformats."""
    table = Table(box=None, pad_edge=False)
    for title in _HEADER:
        table.add_column(title, overflow="fold")
    for layer in found:
        table.add_row(*map(Text, _row(layer)))
    console.print(table)
    console.print(Text(_summary(found)), soft_wrap=True)


def layers_text(found: Sequence[EngineLayer]) -> str:
    """The same as Markdown."""
    return f"{markdown_table(_HEADER, [_row(layer) for layer in found])}\n\n{_summary(found)}"


def read_layers(folder: Path) -> tuple[EngineLayer, ...]:
    """What a run's engine is made of; empty where it was not inspected.

    Raises:
        RunError: the file is damaged.
    """
    path = folder / LAYERS
    if not path.is_file():
        return ()
    try:
        return tuple(map(EngineLayer.from_json, json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}): remove it, and the report goes without it") from error


def _row(layer: EngineLayer) -> tuple[str, str, str, str]:
    if layer.reformats:
        before, after = (", ".join(kinds) or ABSENT for kinds in (layer.reads, layer.writes))
        return f"reformat for {', '.join(layer.feeds) or 'the output'}", ABSENT, ABSENT, f"{before} to {after}"
    name = ", ".join(layer.layers) or layer.name
    precision = f"{layer.precision}, 2:4 sparse" if layer.sparse else layer.precision
    return name, precision, ", ".join(layer.operators) or ABSENT, ", ".join(layer.writes) or ABSENT


def _summary(found: Sequence[EngineLayer]) -> str:
    reformats = sum(layer.reformats for layer in found)
    fused = sum(len(layer.operators) for layer in found)
    return f"{len(found)} launches for {fused} operators, {reformats} of them reformats"
