"""Latencies measured before, by what an engine's time depends on."""

import json
import math
import sys
from bisect import insort
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from autocomp.capabilities import DeviceInfo
from autocomp.errors import ConfigError, InputError, RunError

__all__ = ["LatencyEntry", "LatencyKey", "LatencyTable"]

FORMAT = 1


@dataclass(frozen=True, slots=True)
class LatencyKey:
    """What a latency ratio depends on.

    Attributes:
        structure, reference: digests of the engine's and of the reference engine's structure (operators, shapes,
            precisions; no values).
        device: name, details and threads of the device, and the runtime with its version, as one text.
        batch: images a run.
    """

    structure: str
    reference: str
    device: str
    batch: int

    @classmethod
    def of(cls, structure: str, reference: str, device: DeviceInfo, batch: int) -> Self:
        return cls(structure, reference, json.dumps(device.to_json(), sort_keys=True), batch)

    def __post_init__(self) -> None:
        for name in ("reference", "device"):  # a table of a hundred thousand holds each once
            object.__setattr__(self, name, sys.intern(getattr(self, name)))


@dataclass(frozen=True, slots=True)
class LatencyEntry:
    """A measured ratio. It guides a search and never verifies a budget.

    Attributes:
        key: of what was measured.
        ratio: latency over the reference's, from paired blocks.
        reference_ms: of the reference beside it, which tells whether the device has changed since.
    """

    key: LatencyKey
    ratio: float
    reference_ms: float

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) and value > 0 for value in (self.ratio, self.reference_ms)):
            raise ConfigError("a measured latency must be a positive number: delete the entry, it is measured again")

    @property
    def latency_ms(self) -> float:
        return self.ratio * self.reference_ms

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Raises: ConfigError for another format or wrong fields."""
        try:
            if data["format"] != FORMAT:
                raise ConfigError(f"its format is not {FORMAT}: it was written by another version, delete the file")
            key = LatencyKey(**data["key"])
            return cls(key, float(data["ratio"]), float(data["reference_ms"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"this is no latency ({error}): delete the line, it is measured again") from error


class LatencyTable:
    """A file of entries, one JSON object a line, that is only ever appended to; of two with one key the later counts.

    A last line that was cut off by a kill is removed on opening.
    """

    def __init__(self, path: Path) -> None:
        """Raises: ConfigError naming a line that is no entry, RunError where the file cannot be read or mended."""
        self._path = path
        self._entries: dict[LatencyKey, LatencyEntry] = {}
        self._references_ms: list[float] = []
        try:
            data = path.read_bytes() if path.exists() else b""
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                with path.open("r+b") as file:
                    file.truncate(whole)
        except OSError as error:
            raise RunError(f"cannot read the latencies in {path}: {error.strerror}") from error
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                entry = LatencyEntry.from_json(json.loads(line))
            except (ValueError, InputError) as error:
                raise ConfigError(f"{path} line {number}: {error}") from error
            self._take(entry)

    def __len__(self) -> int:
        return len(self._entries)

    def references_ms(self) -> Sequence[float]:
        """Times of the reference beside every entry, the shortest first."""
        return self._references_ms

    def get(self, key: LatencyKey) -> LatencyEntry | None:
        return self._entries.get(key)

    def put(self, entry: LatencyEntry) -> None:
        """Raises: RunError if the file cannot be written, for example for want of space."""
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry.to_json()) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {self._path}: {error.strerror}; free some space and go on") from error
        self._take(entry)

    def _take(self, entry: LatencyEntry) -> None:
        before = self._entries.get(entry.key)
        if before is not None:
            self._references_ms.remove(before.reference_ms)
        insort(self._references_ms, entry.reference_ms)
        self._entries[entry.key] = entry
