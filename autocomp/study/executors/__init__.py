"""Where waves of policies are evaluated."""

from autocomp.errors import ConfigError
from autocomp.protocols import Executor
from autocomp.study.executors.local import LocalExecutor
from autocomp.study.trial import Trials

__all__ = ["EXECUTORS", "LocalExecutor", "make_executor"]

EXECUTORS = {"local": LocalExecutor}


def make_executor(name: str, trials: Trials) -> Executor:
    """Raises: ConfigError if there is no executor of that name."""
    if name not in EXECUTORS:
        raise ConfigError(f"unknown executor {name!r}: use {' or '.join(EXECUTORS)}")
    return EXECUTORS[name](trials)
