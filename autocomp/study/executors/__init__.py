"""Where waves of policies are evaluated."""

from collections.abc import Mapping
from typing import Any, Protocol

from autocomp.config import SearchConfig
from autocomp.errors import ConfigError
from autocomp.protocols import Executor
from autocomp.study.executors.kit import Kit
from autocomp.study.executors.local import LocalCrew, LocalExecutor
from autocomp.study.trial import Trials
from autocomp.train import Trainer, finetune

__all__ = ["EXECUTORS", "Crew", "Kit", "LocalCrew", "LocalExecutor", "hire", "trainer"]

EXECUTORS = ("local", "ray")


class Crew(Protocol):
    """Whoever does trials' tasks, from before a model is loaded until after the run has ended."""

    def equip(self, kit: Kit, device: Mapping[str, Any]) -> None:
        """Be ready to work.

        Args:
            kit: for workers elsewhere.
            device: fingerprint of the target, as this machine knows it.

        Raises:
            ConfigError: a worker cannot start.
        """
        ...

    def executor(self, trials: Trials) -> Executor: ...

    def trainer(self) -> Trainer:
        """Who trains where the crew works, once its trials are done."""
        ...

    def close(self) -> None: ...


def hire(config: SearchConfig) -> Crew:
    """The crew that a configuration names. Workers elsewhere start while this process prepares what they will need.

    Raises:
        ConfigError: no executor of this name, or a cluster that does not answer or does not suffice.
    """
    if config.executor not in EXECUTORS:
        raise ConfigError(f"unknown executor {config.executor!r}: use {', '.join(EXECUTORS)}")
    if config.executor == "local":
        return LocalCrew()
    crew: Crew = _ray().RayCrew(config)
    return crew


def trainer(config: SearchConfig) -> Trainer:
    """Who trains where a configuration's trials would run. Raises: ConfigError as `hire`."""
    if config.executor == "local":
        return finetune
    train: Trainer = _ray().trainer(config)
    return train


def _ray() -> Any:
    """The room that imports ray. Raises: ConfigError if it is not installed."""
    try:
        from autocomp.study.executors import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigError("the executor ray is not installed: pip install 'autocomp[ray]'") from error
    return ray
