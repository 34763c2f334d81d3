"""Where waves of policies are evaluated."""

from typing import Any, Protocol

from autocomp.config import SearchConfig
from autocomp.errors import ConfigError
from autocomp.protocols import Executor
from autocomp.study.executors.kit import Kit
from autocomp.study.executors.local import LocalCrew, LocalExecutor
from autocomp.study.trial import Trials

__all__ = ["EXECUTORS", "Crew", "Kit", "LocalCrew", "LocalExecutor", "check_executor", "hire"]

EXECUTORS = ("local", "ray")


class Crew(Protocol):
    """Whoever does trials' tasks, from before a run begins until after it ends."""

    def executor(self, trials: Trials) -> Executor: ...

    def close(self) -> None: ...


def check_executor(config: SearchConfig) -> None:
    """Refuse what cannot work before anything is loaded.

    Raises:
        ConfigError: a cluster that does not answer or does not suffice.
    """
    if config.executor == "ray":
        _ray().check(config)


def hire(config: SearchConfig, kit: Kit, device: Any) -> Crew:
    """The crew that a configuration names, ready to work.

    Args:
        kit: for workers elsewhere.
        device: fingerprint of the target, as this machine knows it.

    Raises:
        ConfigError: as `check_executor`, or a worker cannot start.
    """
    if config.executor == "local":
        return LocalCrew()
    crew: Crew = _ray().RayCrew(config, kit, device)
    return crew


def _ray() -> Any:
    """The room that imports ray. Raises: ConfigError if it is not installed."""
    try:
        from autocomp.study.executors import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigError("the executor ray is not installed: pip install 'autocomp[ray]'") from error
    return ray
