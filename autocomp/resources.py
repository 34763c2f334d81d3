"""Where search spaces and hardware profiles are found, and where new ones are written.

Three places are asked in turn: the working directory, the user's data folder, and what came with the package. A wheel
carries the package's own under ``autocomp/_resources``; a source checkout has them at its top level.
"""

import os
from pathlib import Path
from typing import Literal

from platformdirs import user_cache_path, user_data_path

from autocomp.errors import ConfigError, RunError, SpaceError

__all__ = ["Kind", "available", "cache", "find", "writable"]

Kind = Literal["search_spaces", "hardware_profiles"]


def find(kind: Kind, name: str) -> Path:
    """The TOML file of a search space, or the folder of a hardware profile.

    Args:
        kind: which of the two.
        name: as `available` lists it, or the path of one that exists.

    Raises:
        SpaceError: no such search space.
        ConfigError: no such hardware profile.
    """
    path = Path(name)
    looks_like_path = path.suffix == ".toml" or len(path.parts) > 1
    if looks_like_path and (path.is_file() or (kind == "hardware_profiles" and (path / "profile.toml").is_file())):
        return path
    known = available(kind)
    if name in known:
        return known[name]
    listed = ", ".join(known) or "none was found"
    if kind == "search_spaces":
        raise SpaceError(f"unknown search space {name!r}: use one of {listed}, or the path of a TOML file")
    raise ConfigError(f"unknown hardware profile {name!r}: use one of {listed}, or the path of a profile's folder")


def available(kind: Kind) -> dict[str, Path]:
    """Name -> path of everything there is, sorted; of two with one name the first place's wins."""
    found: dict[str, Path] = {}
    for root in reversed(_roots(kind)):
        if kind == "search_spaces":
            found.update({path.stem: path for path in root.glob("*.toml")})
        else:
            found.update({path.parent.name: path.parent for path in root.glob("*/profile.toml")})
    return dict(sorted(found.items()))


def writable(kind: Kind) -> Path:
    """The first place that can be written: the working directory's folder only where it exists already.

    Raises:
        RunError: none can.
    """
    here, user, package = _roots(kind)
    try:
        if not here.is_dir():
            user.mkdir(parents=True, exist_ok=True)
    except OSError:
        pass  # the user's folder then fails the test below
    for root in (here, user, package):
        if root.is_dir() and os.access(root, os.W_OK | os.X_OK):
            return root
    raise RunError(f"no folder for {kind} can be written: make {here} and try again")


def cache(name: str) -> Path:
    """The user's folder for what can be measured again; it may not exist yet."""
    return user_cache_path("autocomp") / name


def _roots(kind: Kind) -> tuple[Path, Path, Path]:
    package = Path(__file__).resolve().parent
    bundled = package / "_resources" / kind
    return (
        Path.cwd() / kind,
        user_data_path("autocomp") / kind,
        bundled if bundled.is_dir() else package.parent / kind,
    )
