"""What the functions of this room share."""

from pathlib import Path

from autocomp.config import SearchConfig
from autocomp.errors import InputError
from autocomp.outcome import Event

__all__ = ["LIVE", "of_live_objects", "refuse_filled", "silent"]

LIVE = "object:"
"""Marks a configuration whose model or data was a live object."""


def of_live_objects(config: SearchConfig) -> bool:
    return config.model.startswith(LIVE) or config.data.startswith(LIVE)


def silent(event: Event) -> None:
    del event


def refuse_filled(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already and is not empty: choose another --out")
