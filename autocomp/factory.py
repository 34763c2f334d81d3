"""The user's own objects, named on the command line as ``package.module:factory``."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from autocomp.errors import InputError

__all__ = ["call_factory", "import_callable", "is_factory"]


def is_factory(spec: str) -> bool:
    """Whether ``spec`` is written like ``package.module:factory``."""
    module, colon, name = spec.partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), *name.split(".")])


def import_callable(spec: str, error: type[InputError], hint: str) -> Callable[..., object]:
    """Import what ``package.module:name`` names.

    The working directory joins the import path, and stays there: the user's code may import more of itself later.

    Args:
        spec: what to import.
        error: the kind to raise.
        hint: how else ``spec`` could be written, for a module that is not there.

    Raises:
        error: the module or the name is missing, cannot be imported, or is not callable; the message says which.
    """
    module_name, _, path = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as missing:
        if missing.name and (module_name == missing.name or module_name.startswith(f"{missing.name}.")):
            raise error(f"cannot import {module_name}: run from the folder that holds it, or {hint}") from missing
        raise error(f"importing {module_name} needs {missing.name}, which is missing: install it") from missing
    except Exception as failure:  # the user's code may fail in any way
        raise error(f"importing {module_name} raised {_line(failure)}: mend it and try again") from failure
    for name in path.split("."):
        if not hasattr(found, name):
            raise error(f"{module_name} has no {path}: check the name behind the colon")
        found = getattr(found, name)
    if not callable(found):
        raise error(f"{spec} is no function: name one")
    return found


def call_factory(spec: str, error: type[InputError], hint: str) -> object:
    """Import ``package.module:factory`` and call it without arguments.

    Raises:
        error: as `import_callable`, or the factory fails.
    """
    factory = import_callable(spec, error, hint)
    try:
        return factory()
    except InputError:
        raise
    except Exception as failure:  # as above
        raise error(f"{spec}() raised {_line(failure)}: mend it and try again") from failure


def _line(failure: Exception) -> str:
    text = str(failure).strip().splitlines()
    return f"{type(failure).__name__}({text[0] if text else ''})"
