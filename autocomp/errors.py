"""Every error autocomp raises on purpose.

The tree::

    AutocompError                  one line that says what to change; the CLI prints it without a traceback
    |-- InputError                 bad input, found before or during work              (exit status 2)
    |   |-- ConfigError            an unknown key or a wrong value in a TOML file or a flag
    |   |-- BudgetError            a budget that does not parse or cannot be judged
    |   |-- ModelError             a model, its weights or its outputs do not fit
    |   |-- DataError              data of the wrong shape, empty, out of range
    |   |-- SpaceError             a search space that is unknown or leaves no choice
    |   `-- RunError               a run folder that is locked, torn, foreign or full
    |-- EngineError                a backend could not build, run or time a file; carries the stage
    |-- InfeasibleError            no policy in the space can meet the budget           (exit status 3)
    `-- CompressError              a policy could not be applied to the model
"""

from collections.abc import Mapping
from typing import Any

__all__ = [
    "AutocompError",
    "BudgetError",
    "CompressError",
    "ConfigError",
    "DataError",
    "EngineError",
    "InfeasibleError",
    "InputError",
    "ModelError",
    "RunError",
    "SpaceError",
]


class AutocompError(Exception):
    """Base of all deliberate errors. The message is one line and tells the user what to do next."""


class InputError(AutocompError):
    """The user's input must change before work can go on."""


class ConfigError(InputError):
    """An unknown key or a wrong value in a flag or a TOML file."""


class BudgetError(InputError):
    """A budget that does not parse, or that the measurement cannot judge."""


class ModelError(InputError):
    """The model, its weights or its outputs do not fit."""


class DataError(InputError):
    """Data of the wrong shape or type, empty, or with labels out of range."""


class SpaceError(InputError):
    """A search space that is unknown, malformed, or leaves nothing to choose."""


class RunError(InputError):
    """A run folder that is in use, torn, written by another version, or cannot be written."""


class EngineError(AutocompError):
    """A backend could not build, run or time a file."""


class CompressError(AutocompError):
    """A policy could not be applied to a model."""


class InfeasibleError(AutocompError):
    """No policy in the space can meet the budget; the message names the floor and what to relax.

    Attributes:
        floor: the same for programs, as plain data; None where the floor is not known.
    """

    def __init__(self, message: str, floor: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.floor = floor
