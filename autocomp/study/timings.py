"""Timings already taken in a run, by the structure they depend on."""

import json
from pathlib import Path

from autocomp.study.run import storage_errors

__all__ = ["TimingCache"]


class TimingCache:
    """Latency ratios by structure digest, appended to a file of the run; a torn last line is forgotten.

    A ratio guides the search; it never verifies a budget.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._ratios: dict[str, float] = {}
        if path is not None and path.exists():
            for line in path.read_text(errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                    self._ratios[entry["structure"]] = float(entry["ratio"])
                except (ValueError, KeyError, TypeError):
                    continue

    def get(self, structure: str) -> float | None:
        return self._ratios.get(structure)

    def put(self, structure: str, ratio: float, reference_ms: float) -> None:
        self._ratios[structure] = ratio
        if self._path is not None:
            entry = {"structure": structure, "ratio": ratio, "reference_ms": reference_ms}
            with storage_errors(self._path), self._path.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def __len__(self) -> int:
        return len(self._ratios)
