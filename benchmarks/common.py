"""What benchmarks share: where data is, the machine, the result file, a table on screen."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def shared() -> Path:
    """The folder with the CIFAR-10 images and the trained ResNets, from ``AUTOCOMP_SHARED``."""
    try:
        return Path(os.environ["AUTOCOMP_SHARED"])
    except KeyError:
        raise SystemExit("set AUTOCOMP_SHARED to the folder that holds data/unpack.py and weights/") from None


def cifar10(folder: Path) -> Path:
    """CIFAR-10 as one npz file in ``folder``, unpacked when it is not there yet."""
    path = folder / "cifar10.npz"
    if not path.exists():
        subprocess.run([sys.executable, str(shared() / "data" / "unpack.py"), str(path)], check=True)
    return path


def machine() -> dict[str, Any]:
    """What a figure was taken on."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    flags = Path("/proc/cpuinfo").read_text()
    wide = [flag for flag in ("avx2", "avx512_vnni", "avx_vnni", "amx_int8") if f" {flag}" in flags]
    return {"cpu": cpu, "cores": os.cpu_count(), "int8": wide, "python": platform.python_version()}


def save(name: str, data: Mapping[str, Any]) -> Path:
    """Write ``benchmarks/results/<name>.json``, parts measured earlier kept."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    stamp = {"machine": machine(), "date": datetime.now(UTC).strftime("%Y-%m-%d")}
    path.write_text(json.dumps({**old, **data, **stamp}, indent=2) + "\n")
    return path


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    table = Table(title=title)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console(width=120).print(table)
