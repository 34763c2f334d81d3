"""What the commands write, and where to."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

if TYPE_CHECKING:
    from rich.console import Console

    from autocomp.outcome import Observer

__all__ = [
    "INTERRUPTED",
    "NOTHING_VERIFIED",
    "UNTRUE",
    "console",
    "fail",
    "print_found",
    "print_json",
    "quiet_stdout",
    "watched",
]

UNTRUE = 1
"""Exit status where a claim does not hold: of a card, or of a file that is to compute what the torch model does."""

NOTHING_VERIFIED = 3
"""Exit status where the work is done and no budget is known to hold."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Send to standard error what libraries, native ones too, write to standard output."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        os.dup2(2, 1)
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def console(file: TextIO) -> "Console":
    from rich.console import Console

    return Console(file=file, highlight=False)


def print_json(data: object) -> None:
    import json

    print(json.dumps(data, indent=2, allow_nan=False))


def print_found(found: Any, show: Callable[[Any, "Console"], None], *, as_json: bool) -> None:
    """A result as one JSON object, or as ``show`` prints it."""
    if as_json:
        print_json(found.to_json())
    else:
        show(found, console(sys.stdout))


def fail(message: str, status: int) -> NoReturn:
    print(f"autocomp: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


@contextmanager
def watched(left: str, *, as_json: bool) -> Iterator["Observer"]:
    """A live screen, beside the one JSON object where there is to be one.

    Args:
        left: what an interrupt leaves.
    """
    from autocomp.report import LiveScreen

    try:
        with (
            quiet_stdout() if as_json else nullcontext(),
            LiveScreen(console(sys.stderr if as_json else sys.stdout)) as screen,
        ):
            yield screen
    except KeyboardInterrupt:
        fail(f"interrupted: {left}", INTERRUPTED)
