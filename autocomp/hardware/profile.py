"""A device's profile: a folder with ``profile.toml`` and, where kernels were timed, ``kernels.csv``."""

import csv
import io
import math
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Self

from autocomp.errors import ConfigError, InputError, RunError
from autocomp.policy import Precision
from autocomp.space import toml

__all__ = ["HardwareProfile", "Kernel"]

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Kernel:
    """One measured operator.

    Attributes:
        name: the operator with its shapes, as the profiler wrote it.
        precision: of its weights and activations.
        batch: images a run.
        median_ms: of one run.
        deviation_ms: median absolute deviation of the runs.
        samples: runs measured.
    """

    name: str
    precision: Precision
    batch: int
    median_ms: float
    deviation_ms: float
    samples: int

    def __post_init__(self) -> None:
        times = (self.median_ms, self.deviation_ms)
        if not all(math.isfinite(time) and time >= 0 for time in times):
            raise ConfigError(f"kernel {self.name!r} has a time that is negative or no number: measure it again")
        if self.batch < 1 or self.samples < 1:
            raise ConfigError(f"kernel {self.name!r}: batch and samples must be 1 or more")


@dataclass(frozen=True, slots=True)
class HardwareProfile:
    """A device as it was when it was described or measured.

    Attributes:
        device: name, also the folder's.
        engine: runtime and its version.
        threads: used by the engine.
        date: of the measurement, or of the description.
        measured: False where the device is only described and no time was taken.
        notes: what a reader should know.
        kernels: measured; empty for a described device.
    """

    device: str
    engine: str
    threads: int
    date: date
    measured: bool
    notes: str = ""
    kernels: tuple[Kernel, ...] = ()

    def __post_init__(self) -> None:
        if not self.engine or not self.device or Path(self.device).name != self.device:
            raise ConfigError("a profile needs an engine, and a device whose name can be a folder's")
        if self.threads < 1:
            raise ConfigError(f"threads = {self.threads}: it must be 1 or more")
        if self.kernels and not self.measured:
            raise ConfigError("a device that is only described has no measured kernels: set measured = true")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a profile's folder.

        Raises:
            ConfigError: a missing, torn or newer file, an unknown key, a wrong value; the message names the file.
        """
        path = folder / "profile.toml"
        readers = {
            "format": toml.integer,
            "device": toml.string,
            "engine": toml.string,
            "threads": toml.integer,
            "date": toml.day,
            "measured": toml.boolean,
            "notes": toml.string,
        }
        try:
            values = toml.read(tomllib.loads(path.read_text(encoding="utf-8")), readers)
            if values.pop("format", None) != FORMAT:
                raise ConfigError(f"its format is not {FORMAT}: profile the device again with this version")
            missing = [key for key in ("device", "engine", "threads", "date", "measured") if key not in values]
            if missing:
                raise ConfigError(f"{', '.join(missing)} missing: the file is torn, profile the device again")
            path = folder / "kernels.csv"
            kernels = tuple(_kernels(path.read_text(encoding="utf-8"))) if path.exists() else ()
            return cls(**values, kernels=kernels)
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, InputError) as error:
            raise ConfigError(f"{path}: {error}") from error

    def save(self, root: Path) -> Path:
        """Write the profile as a folder of its device's name under ``root``; one of that name is replaced.

        Raises:
            RunError: the folder cannot be written.
        """
        folder = root / self.device
        head = {key: value for key, value in asdict(self).items() if key != "kernels"}
        lines = [f"{key} = {toml.write(value)}" for key, value in {"format": FORMAT, **head}.items()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.kernels:
                _replace(folder / "kernels.csv", _csv(self.kernels))
            else:
                (folder / "kernels.csv").unlink(missing_ok=True)
            _replace(folder / "profile.toml", "\n".join(lines) + "\n")
        except OSError as error:
            raise RunError(
                f"cannot write the profile {folder}: {error.strerror}; free space or choose a folder"
            ) from error
        return folder


_COLUMNS = [field.name for field in fields(Kernel)]


def _csv(kernels: tuple[Kernel, ...]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows([k.name, k.precision, k.batch, k.median_ms, k.deviation_ms, k.samples] for k in kernels)
    return text.getvalue()


def _kernels(text: str) -> Iterator[Kernel]:
    """Raises: ConfigError naming the first line that is not a whole kernel."""
    reader = csv.reader(io.StringIO(text))
    if next(reader, None) != _COLUMNS:
        raise ConfigError(f"its first line is not {','.join(_COLUMNS)}: profile the device again")
    for row in reader:
        try:
            name, precision, batch, median, deviation, samples = row
            yield Kernel(name, Precision.parse(precision), int(batch), float(median), float(deviation), int(samples))
        except ValueError as error:
            raise ConfigError(f"line {reader.line_num} is torn or no kernel: profile the device again") from error


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    draft = path.with_suffix(path.suffix + ".part")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
