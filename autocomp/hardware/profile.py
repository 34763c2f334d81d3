"""A device's profile: a folder with ``profile.toml``, and ``kernels.csv`` and ``engines.csv`` where it was measured."""

import csv
import datetime
import io
import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self, TypeVar

from autocomp.capabilities import Capabilities, DeviceInfo, Numerics
from autocomp.errors import ConfigError, InputError, RunError
from autocomp.hardware.kernels import Kernel
from autocomp.space import toml

__all__ = ["EngineTime", "HardwareProfile", "KernelTime"]

FORMAT = 1
Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class KernelTime:
    """What one kernel takes inside engines.

    Attributes:
        kernel: what was timed.
        median_ms: mean over engines of its median in each, at the speed the device had when the profile was begun.
        deviation_ms: standard deviation of these medians over engines.
        samples: engines, or places in them, that it was timed in.
    """

    kernel: Kernel
    median_ms: float
    deviation_ms: float
    samples: int

    def __post_init__(self) -> None:
        _refuse_times(str(self.kernel), self.median_ms, self.deviation_ms)
        if self.samples < 1:
            raise ConfigError(f"kernel {self.kernel}: samples must be 1 or more")

    @property
    def error_ms(self) -> float:
        """Standard error; a single sample is taken to be 5 % off."""
        if self.samples == 1:
            return 0.05 * self.median_ms
        return float(max(self.deviation_ms, 0.01 * self.median_ms) / math.sqrt(self.samples))

    def with_sample(self, ms: float) -> Self:
        """One more (Welford 1962)."""
        count = self.samples + 1
        mean = self.median_ms + (ms - self.median_ms) / count
        squares = self.deviation_ms**2 * max(self.samples - 1, 0) + (ms - self.median_ms) * (ms - mean)
        return type(self)(self.kernel, mean, math.sqrt(max(squares, 0.0) / (count - 1)), count)


@dataclass(frozen=True, slots=True)
class EngineTime:
    """A whole engine that kernels were timed in.

    Attributes:
        model: of the engine, as ``--model`` names it.
        batch: images a run.
        kernels: it runs.
        kernels_ms: of all of them together.
        ms: of a run, at the speed the device had when the profile was begun.
        data: noise of the model's input shape and classes, as ``--data`` names it, which is all that times depend on;
            empty where it was not recorded.
    """

    model: str
    batch: int
    kernels: int
    kernels_ms: float
    ms: float
    data: str = ""

    def __post_init__(self) -> None:
        _refuse_times(f"an engine of {self.model}", self.kernels_ms, self.ms)


def _refuse_times(name: str, *times: float) -> None:
    if not all(math.isfinite(time) and time >= 0 for time in times):
        raise ConfigError(f"{name} has a time that is negative or no number: build the profile again")


@dataclass(frozen=True, slots=True)
class HardwareProfile:
    """A device as it was when it was described or measured.

    Attributes:
        device: name, also the folder's.
        engine: runtime and its version.
        threads: used by the engine.
        date: of the measurement, or of the description.
        measured: False where the device is only described and no time was taken.
        details: driver, processor and what else tells two devices apart, as ``name: value; ...``.
        protocol: how times were taken.
        notes: what a reader should know.
        kernels: measured, sorted; empty for a described device.
        engines: that they were measured in.
        capabilities: what the engine runs there, and in which arithmetic; None where that was not recorded.
    """

    device: str
    engine: str
    threads: int
    date: datetime.date
    measured: bool
    details: str = ""
    protocol: str = ""
    notes: str = ""
    kernels: tuple[KernelTime, ...] = ()
    engines: tuple[EngineTime, ...] = ()
    capabilities: Capabilities | None = None

    def __post_init__(self) -> None:
        if not self.engine or not self.device or Path(self.device).name != self.device:
            raise ConfigError("a profile needs an engine, and a device whose name can be a folder's")
        if self.threads < 1:
            raise ConfigError(f"threads = {self.threads}: it must be 1 or more")
        if self.kernels and not self.measured:
            raise ConfigError("a device that is only described has no measured kernels: set measured = true")

    @classmethod
    def of(
        cls, device: DeviceInfo, today: datetime.date, protocol: str, capabilities: Capabilities | None = None
    ) -> Self:
        """An empty one, to be measured."""
        fields = (device.name, device.engine, device.threads, today, True, _details(device), protocol)
        return cls(*fields, capabilities=capabilities)

    @property
    def fingerprint(self) -> DeviceInfo:
        """The device as it was measured."""
        details = tuple(part.split(": ", 1) for part in self.details.split("; ") if ": " in part)
        return DeviceInfo(self.device, self.engine, self.threads, tuple((name, value) for name, value in details))

    def differences(self, device: DeviceInfo) -> tuple[str, ...]:
        """What a device has otherwise than the one that was measured; empty where the profile fits."""
        return self.unlike(type(self).of(device, self.date, self.protocol))

    def unlike(self, other: Self) -> tuple[str, ...]:
        """What another profile's device has otherwise, but for its name; empty where both are of one kind."""
        names = (("engine", "engine"), ("threads", "threads"), ("device", "details"))
        pairs = ((name, getattr(self, field), getattr(other, field)) for name, field in names)
        return tuple(f"{name} was {old or 'unknown'}, is {new or 'unknown'}" for name, old, new in pairs if old != new)

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
            "details": toml.string,
            "protocol": toml.string,
            "notes": toml.string,
            "precisions": toml.precisions,
            "channel_multiple": toml.integer,
            "signed_activations": toml.boolean,
            "symmetric_activations": toml.boolean,
            "weight_max": toml.integer,
        }
        try:
            values = toml.read(tomllib.loads(path.read_text(encoding="utf-8")), readers)
            if values.pop("format", None) != FORMAT:
                raise ConfigError(f"its format is not {FORMAT}: profile the device again with this version")
            missing = [key for key in ("device", "engine", "threads", "date", "measured") if key not in values]
            if missing:
                raise ConfigError(f"{', '.join(missing)} missing: the file is torn, profile the device again")
            values["capabilities"] = _capabilities(values)
            path = folder / "kernels.csv"
            if values["measured"] and not path.exists():
                raise ConfigError("it is missing: the profile is torn, profile the device again")
            kernels = _rows(path, _KERNEL_COLUMNS, _kernel_time)
            path = folder / "engines.csv"
            engines = _rows(path, _ENGINE_COLUMNS, _engine_time, optional=("data",))
            return cls(**values, kernels=kernels, engines=engines)
        except csv.Error as error:
            raise ConfigError(f"{path}: it is torn ({error}): profile the device again") from error
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, InputError) as error:
            raise ConfigError(f"{path}: {error}") from error

    def save(self, root: Path) -> Path:
        """Write the profile as a folder of its device's name under ``root``; one of that name is replaced.

        Raises:
            RunError: the folder cannot be written.
        """
        folder = root / self.device
        head = {key: value for key, value in asdict(self).items() if key not in ("kernels", "engines", "capabilities")}
        found = self.capabilities
        if found is not None:
            own = {"precisions": tuple(map(str, found.precisions)), "channel_multiple": found.channel_multiple}
            head |= own | found.numerics.to_json()
        lines = [f"{key} = {toml.write(value)}" for key, value in {"format": FORMAT, **head}.items()]
        kernels = [
            [*map(_cell, _values(entry.kernel)), entry.median_ms, entry.deviation_ms, entry.samples]
            for entry in sorted(self.kernels, key=lambda entry: entry.kernel)
        ]
        tables = (
            ("kernels.csv", _KERNEL_COLUMNS, kernels),
            ("engines.csv", _ENGINE_COLUMNS, map(_values, self.engines)),
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, columns, rows in tables:
                if self.measured:
                    _replace(folder / name, _csv(columns, list(rows)))
                else:
                    (folder / name).unlink(missing_ok=True)
            _replace(folder / "profile.toml", "\n".join(lines) + "\n")
        except OSError as error:
            raise RunError(
                f"cannot write the profile {folder}: {error.strerror}; free space or choose a folder"
            ) from error
        return folder


def _capabilities(values: dict[str, Any]) -> Capabilities | None:
    """Take what an engine runs out of a file's values; none of it may be missing where there is some.

    Raises:
        ConfigError: a part is missing, or is no sensible number.
    """
    names = ("precisions", "channel_multiple", *(field.name for field in fields(Numerics)))
    found = {name: values.pop(name) for name in names if name in values}
    if not found:
        return None
    missing = [name for name in names if name not in found]
    if missing:
        raise ConfigError(f"{', '.join(missing)} missing: the file is torn, profile the device again")
    if found["channel_multiple"] < 1 or not 1 <= found["weight_max"] <= 127:
        raise ConfigError("channel_multiple must be 1 or more, and weight_max between 1 and 127")
    precisions, multiple, *numerics = found.values()
    return Capabilities(precisions, multiple, Numerics(*numerics))


def _details(device: DeviceInfo) -> str:
    return "; ".join(f"{name}: {value}" for name, value in device.details)


_KERNEL_COLUMNS = [*(field.name for field in fields(Kernel)), "median_ms", "deviation_ms", "samples"]
_ENGINE_COLUMNS = [field.name for field in fields(EngineTime)]


def _values(row: Any) -> list[Any]:
    return [getattr(row, field.name) for field in fields(row)]


def _cell(value: Any) -> Any:
    return "x".join(map(str, value)) if isinstance(value, tuple) else value


def _csv(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def _rows(
    path: Path, columns: Sequence[str], parse: Callable[[Mapping[str, str]], Row], optional: Sequence[str] = ()
) -> tuple[Row, ...]:
    """Raises: ConfigError naming the first line that is not a whole row. Columns of ``optional`` may be missing."""
    if not path.exists():
        return ()
    reader = csv.reader(io.StringIO(path.read_text(encoding="utf-8")))
    found_columns = next(reader, [])
    if [*found_columns, *(name for name in optional if name not in found_columns)] != columns:
        raise ConfigError(f"its first line is not {','.join(columns)}: profile the device again")
    found = []
    for row in reader:
        try:
            found.append(parse(dict(zip(found_columns, row, strict=True))))
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"line {reader.line_num} is torn or wrong ({error}): profile the device again") from error
    return tuple(found)


def _kernel_time(row: Mapping[str, str]) -> KernelTime:
    kernel = Kernel(
        row["op"], int(row["channels_in"]), int(row["channels_out"]), _sizes(row["kernel"]), _sizes(row["stride"]),
        int(row["groups"]), _sizes(row["size"]), int(row["batch"]), row["precision"], row["context"],
    )  # fmt: skip
    return KernelTime(kernel, float(row["median_ms"]), float(row["deviation_ms"]), int(row["samples"]))


def _engine_time(row: Mapping[str, str]) -> EngineTime:
    times = float(row["kernels_ms"]), float(row["ms"])
    return EngineTime(row["model"], int(row["batch"]), int(row["kernels"]), *times, row.get("data", ""))


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x"))) if text else ()


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    draft = path.with_suffix(path.suffix + ".part")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
