"""Checked reading of TOML tables, and writing of the few value types that autocomp stores."""

import difflib
import json
from collections.abc import Callable, Mapping
from datetime import date, datetime
from typing import Any

from autocomp.errors import ConfigError
from autocomp.policy import Precision

__all__ = ["boolean", "day", "integer", "numbers", "precisions", "read", "string", "strings", "tables", "write"]

Reader = Callable[[object], Any]


def read(data: Mapping[str, object], readers: Mapping[str, Reader]) -> dict[str, Any]:
    """The table's values, each checked and converted by its key's reader.

    Raises:
        ConfigError: a key without a reader, or a value that its reader refuses.
    """
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in readers:
            close = difflib.get_close_matches(key, readers, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(readers))}"
            raise ConfigError(f"unknown key {key!r}: {hint}")
        try:
            values[key] = readers[key](value)
        except TypeError as error:
            raise ConfigError(f"{key} = {value!r}: it must be {error}") from error
    return values


def string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a text in quotes")
    return value


def strings(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
        raise TypeError('a list of texts like ["layer3.*"]')
    return tuple(value)


def boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError("true or false")
    return value


def integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError("a whole number")
    return value


def numbers(value: object) -> tuple[float, ...]:
    if not isinstance(value, list) or any(isinstance(v, bool) or not isinstance(v, int | float) for v in value):
        raise TypeError("a list of numbers")
    return tuple(float(v) for v in value)


def precisions(value: object) -> tuple[Precision, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise TypeError('a list like ["int8", "fp32"]')
    return tuple(Precision.parse(v) for v in value)


def day(value: object) -> date:
    if not isinstance(value, date) or isinstance(value, datetime):
        raise TypeError("a date written 2026-01-31, without quotes")
    return value


def tables(value: object) -> list[dict[str, object]]:
    if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
        raise TypeError("tables written [[rules]]")
    return value


def write(value: str | bool | int | float | date | list[Any] | tuple[Any, ...]) -> str:
    """A value as TOML. Texts are JSON's, but for DEL, which TOML wants escaped."""
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(write, value))}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\x7f", "\\u007f")
