"""``autocomp spaces``: what there is, and what is in it."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["spaces"]

spaces = typer.Typer(help="Search spaces: what may be pruned and quantized.", no_args_is_help=True)


@spaces.command("list")
def list_spaces() -> None:
    """Name every search space that is found."""
    from autocomp.resources import available

    found = available("search_spaces")
    width = max(map(len, found), default=0)
    for name, path in found.items():
        print(f"{name:<{width}}  {_description(path)}  [{path}]")
    if not found:
        print("no search spaces were found", file=sys.stderr)


@spaces.command("show")
def show_space(name: Annotated[str, typer.Argument(help="name or TOML file")]) -> None:
    """Print a search space."""
    from autocomp.resources import find

    path = find("search_spaces", name)
    print(f"# {path}\n{path.read_text(encoding='utf-8')}", end="")


def _description(path: Path) -> str:
    """What a TOML file says of itself; empty where it cannot be read, which `show` then tells in full."""
    import tomllib

    with suppress(OSError, ValueError):
        return str(tomllib.loads(path.read_text(encoding="utf-8")).get("description", ""))
    return ""
