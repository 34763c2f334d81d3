"""The command line: parse, call, print.

Exit status: 0 verified (or the command did what it says), 1 an exported card is not true, 2 bad input, 3 nothing
verified or infeasible, 130 interrupted.
"""

from autocomp.cli.commands import app, main

__all__ = ["app", "main"]
