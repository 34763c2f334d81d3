"""The settings of a search: defaults, an optional TOML file over them, flags over both."""

import difflib
import itertools
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, Self, get_type_hints

from autocomp.budget import parse_budgets
from autocomp.errors import ConfigError

__all__ = ["DEFAULT_FILE", "SearchConfig", "default_folder", "load_config", "read_config"]

DEFAULT_FILE = "autocomp.toml"
_POSITIVE = (
    "threads",
    "batch",
    "trials",
    "finalists",
    "finetune_finalists",
    "wave",
    "size",
    "calibration_images",
    "search_images",
    "selection_images",
    "workers",
)


@dataclass(frozen=True, slots=True)
class SearchConfig:
    """Everything a search is told. The fields are the flags of ``autocomp search`` and the keys of ``autocomp.toml``.

    Attributes:
        model: ``zoo:NAME``, ``torchvision:NAME`` or ``package.module:factory``.
        weights: file of the model's weights; None for embedded ones, or the factory's own.
        output_key: of the logits, where the model returns a dict, a dataclass or a tuple: name or position.
        data: ``digits``, ``npz:FILE``, ``imagefolder:DIR``, ``cifar10:DIR``, ``random:3x224x224`` or
            ``package.module:factory``.
        budget: limits that must all hold, as `autocomp.budget.Budget.parse` reads them.
        engine: name of the backend.
        hardware: device profile or described device; None for this machine.
        tf32: lets a GPU's float32 layers compute with 10-bit mantissas.
        reference: precision of all layers of the uncompressed engine that others are compared with.
        threads: of the engine.
        batch: images per run of the engine; None for 32 in the default job and 1 elsewhere.
        space: name of a search space, or a TOML file.
        exclude, include: globs on layers, beside those of the space: what is left as it is, and all that is compressed.
        controller: ``guided``, which gives way to ``evolution`` where too little is known; ``evolution``, ``tpe``,
            ``nsga2``, ``gp``, ``cmaes``, ``ddpg`` or ``random``.
        trials: policies to evaluate.
        baseline_trials: policies to evaluate for each baseline, 0 for none; None for as many as ``trials``.
        seed: of every draw.
        executor: where trials run: ``local`` or ``ray``.
        address: of a Ray cluster: ``auto``, ``local`` or ``ray://HOST:PORT``; None for the job's, else the one that
            this machine is part of, else a local one.
        workers: actors that score; None for as many as the cluster has room for.
        gpus_per_worker: that each of them takes, a fraction where several share one.
        target_resource: Ray resource of the nodes that measure; None where this machine does.
        finetune_epochs: that the best found are trained for after the search, as ``autocomp finetune`` does; 0 for
            none; None for 5 in the default job and none elsewhere.
        finetune_finalists: policies of which training decides which is trained to its end, at most.
        finalists: policies that may be verified, at most.
        wave: policies asked for at once.
        out: run folder; None for ``runs/<timestamp>-<model>-<budget>``.
        mean, std: of the data's channels; None for the source's own.
        size: side of the square input in pixels; None for the source's own.
        calibration_images, search_images, selection_images: drawn for each split, at most.
        ranges: of int8 values: ``minmax``, ``percentile``, ``entropy`` as TensorRT's calibrator took them, or ``mse``.
        front: one search a budget from 0.25x to 0.9x, instead of one under ``budget``.
        metric: ``kl``, or ``package.module:function``.
        json: print one JSON object instead of the table.
    """

    model: str = "zoo:resnet20"
    weights: str | None = None
    output_key: str | None = None
    data: str = "digits"
    budget: tuple[str, ...] = ()
    engine: str = "onnxruntime"
    hardware: str | None = None
    tf32: bool = False
    reference: str = "fp32"
    threads: int = 1
    batch: int | None = None
    space: str = "default"
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    controller: str = "guided"
    trials: int = 12
    baseline_trials: int | None = None
    seed: int = 0
    executor: str = "local"
    address: str | None = None
    workers: int | None = None
    gpus_per_worker: float = 0.0
    target_resource: str | None = None
    finetune_epochs: int | None = None
    finetune_finalists: int = 3
    finalists: int = 3
    wave: int = 4
    out: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: int | None = None
    calibration_images: int = 1024
    search_images: int = 2048
    selection_images: int = 2048
    ranges: str = "minmax"
    front: bool = False
    metric: str = "kl"
    json: bool = False

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            _at_least(1, name, getattr(self, name))
        for name in ("seed", "baseline_trials", "finetune_epochs"):
            _at_least(0, name, getattr(self, name))
        if not 0 <= self.gpus_per_worker < float("inf"):
            raise ConfigError(f"gpus-per-worker must be at least 0, not {self.gpus_per_worker}")
        if self.gpus_per_worker > 1 and self.gpus_per_worker != int(self.gpus_per_worker):
            raise ConfigError(f"gpus-per-worker above 1 must be a whole number, not {self.gpus_per_worker:g}")
        for name in ("address", "workers", "target_resource"):
            if self.executor == "local" and getattr(self, name) is not None:
                raise ConfigError(f"{name.replace('_', '-')} is for a cluster: give --executor ray with it")
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise ConfigError(f"mean has {len(self.mean)} values and std {len(self.std)}: give one of each per channel")
        if self.std is not None and min(self.std) <= 0:
            raise ConfigError("std must be positive in every channel")
        if self.budget:
            parse_budgets(self.budget)

    def resolved_batch(self) -> int:
        """Images per run of the engine: as asked, else 32 for the default model on the default data, else 1."""
        if self.batch is not None:
            return self.batch
        return 32 if self._default_job() else 1

    def resolved_finetune_epochs(self) -> int:
        """Epochs of training after the search: as asked, else 5 for the default model on the default data, else 0."""
        if self.finetune_epochs is not None:
            return self.finetune_epochs
        return 5 if self._default_job() else 0

    def _default_job(self) -> bool:
        return (self.model, self.data) == (SearchConfig().model, SearchConfig().data)

    def resolved_baseline_trials(self) -> int:
        """Evaluations granted to each baseline."""
        return self.trials if self.baseline_trials is None else self.baseline_trials

    def to_json(self) -> dict[str, Any]:
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises: ConfigError if a key is unknown or a value is of the wrong type."""
        return cls(**_checked(data, "the stored settings"))


def load_config(path: Path | None, flags: Mapping[str, object]) -> SearchConfig:
    """Settings of a search.

    Args:
        path: a TOML file that must exist; None reads ``autocomp.toml`` of the working directory where there is one.
        flags: field name -> value; those that are None (or empty) were not given and leave the file's value.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or out of range, or an unreadable file.
        BudgetError: no budget is given anywhere, or one does not parse.
    """
    config = read_config(path, flags)
    if config.budget or not config.front:
        parse_budgets(config.budget)
    return config


def read_config(path: Path | None, flags: Mapping[str, object]) -> SearchConfig:
    """As `load_config`, for commands that need no budget."""
    given = {name: value for name, value in flags.items() if value is not None and value not in ((), [])}
    return SearchConfig(**{**_from_file(path), **_checked(given, "the flags")})


def default_folder(config: SearchConfig, now: datetime, *prefix: str) -> Path:
    """``runs/<prefix>-<timestamp>-<model>-<budget>``, free of characters that a file system minds; not there yet."""
    asked = ("front", *config.budget) if config.front else config.budget
    words = (*prefix, now.strftime("%Y%m%d-%H%M%S"), config.model.rpartition(":")[2], *asked)
    name = "-".join(re.sub(r"[^A-Za-z0-9.]+", "-", word).strip("-.") for word in words)
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(path for path in (Path("runs") / name for name in names) if not path.exists())


def _from_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        path = Path(DEFAULT_FILE)
        if not path.exists():
            return {}
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give --config an existing TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    return _checked(table, str(path))


def _checked(values: Mapping[str, object], source: str) -> dict[str, Any]:
    """Field name -> value of the field's type, from keys with ``-`` or ``_``."""
    kinds = _field_types()
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in kinds:
            close = difflib.get_close_matches(name, kinds, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(kinds)}"
            raise ConfigError(f"unknown key {key!r} in {source}: {hint}")
        if name in result:
            raise ConfigError(f"{name!r} is given twice in {source}, with - and with _: keep one")
        expected, read = _READERS[kinds[name]]
        try:
            result[name] = read(value)
        except (TypeError, ValueError):
            raise ConfigError(f"{key} in {source} must be {expected}, not {value!r}") from None
    return result


@cache
def _field_types() -> dict[str, Any]:
    return get_type_hints(SearchConfig)


def _at_least(least: int, name: str, value: int | None) -> None:
    if value is not None and value < least:
        raise ConfigError(f"{name.replace('_', '-')} must be at least {least}, not {value}")


def _exactly(kind: type) -> Callable[[object], Any]:
    def read(value: object) -> object:
        if type(value) is not kind:  # an isinstance would take true for 1
            raise TypeError
        return value

    return read


def _or_none(read: Callable[[object], Any]) -> Callable[[object], Any]:
    return lambda value: None if value is None else read(value)


def _texts(value: object) -> tuple[str, ...]:
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list | tuple) or not all(isinstance(entry, str) for entry in entries):
        raise TypeError
    return tuple(entries)


def _number(value: object) -> float:
    if type(value) not in (int, float):
        raise TypeError
    return float(value)  # type: ignore[arg-type]


def _numbers(value: object) -> tuple[float, ...]:
    """From a list, a number, or ``0.5,0.5,0.5`` as a flag gives it."""
    entries: Any = value.split(",") if isinstance(value, str) else value
    if not isinstance(entries, list | tuple):
        entries = [entries]
    if not entries or any(isinstance(entry, bool) for entry in entries):
        raise TypeError
    numbers = tuple(float(entry) for entry in entries)
    if not all(abs(number) < float("inf") for number in numbers):
        raise ValueError
    return numbers


# Type of a field -> what to call it, how to read it.
_READERS: Mapping[Any, tuple[str, Callable[[object], Any]]] = {
    str: ("a text", _exactly(str)),
    int: ("a whole number", _exactly(int)),
    float: ("a number", _number),
    bool: ("true or false", _exactly(bool)),
    str | None: ("a text", _or_none(_exactly(str))),
    int | None: ("a whole number", _or_none(_exactly(int))),
    tuple[str, ...]: ("a text or a list of texts", _texts),
    tuple[float, ...] | None: ("a list of numbers, one per channel", _or_none(_numbers)),
}
