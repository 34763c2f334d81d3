"""``autocomp spaces`` and ``autocomp profile``: what there is, and what is in it."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from autocomp.resources import Kind

__all__ = ["profiles", "spaces"]

spaces = typer.Typer(help="Search spaces: what may be pruned and quantized.", no_args_is_help=True)
profiles = typer.Typer(help="Hardware profiles: what was measured on a device.", no_args_is_help=True)


@spaces.command("list")
def list_spaces() -> None:
    """Name every search space that is found."""
    _list("search_spaces")


@spaces.command("show")
def show_space(name: Annotated[str, typer.Argument(help="name or TOML file")]) -> None:
    """Print a search space."""
    _show("search_spaces", name)


@profiles.command("list")
def list_profiles() -> None:
    """Name every hardware profile that is found."""
    _list("hardware_profiles")


@profiles.command("show")
def show_profile(name: Annotated[str, typer.Argument(help="name or folder")]) -> None:
    """Print a hardware profile."""
    _show("hardware_profiles", name)


def _list(kind: "Kind") -> None:
    from autocomp.resources import available

    found = available(kind)
    width = max(map(len, found), default=0)
    for name, path in found.items():
        print(f"{name:<{width}}  {_description(path)}  [{path}]")
    if not found:
        print(f"no {kind.replace('_', ' ')} were found", file=sys.stderr)


def _show(kind: "Kind", name: str) -> None:
    from autocomp.resources import find

    path = _file(find(kind, name))
    print(f"# {path}\n{path.read_text(encoding='utf-8')}", end="")


def _file(path: Path) -> Path:
    return path / "profile.toml" if path.is_dir() else path


def _description(path: Path) -> str:
    """What a TOML file says of itself; empty where it cannot be read, which `show` then tells in full."""
    import tomllib

    with suppress(OSError, ValueError):
        table = tomllib.loads(_file(path).read_text(encoding="utf-8"))
        return str(table.get("description") or table.get("notes", ""))
    return ""
