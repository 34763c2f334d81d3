"""One trial after the other, in this process."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from autocomp.policy import Policy
from autocomp.results import TrialResult
from autocomp.study.executors.kit import Kit
from autocomp.study.trial import Trials
from autocomp.train import Trainer, finetune

__all__ = ["LocalCrew", "LocalExecutor"]


class LocalExecutor:
    """Evaluates each policy of a wave in order."""

    def __init__(self, trials: Trials) -> None:
        self._trials = trials

    def run(self, wave: Sequence[tuple[int, str, Policy]]) -> Iterator[Sequence[TrialResult]]:
        for number, role, policy in wave:
            yield [self._trials.evaluate(number, role, policy)]

    def close(self) -> None:
        """Nothing is held."""


class LocalCrew:
    """Nobody but this process."""

    def equip(self, kit: Kit, device: Mapping[str, Any]) -> None:
        """All is here."""

    def executor(self, trials: Trials) -> LocalExecutor:
        return LocalExecutor(trials)

    def trainer(self) -> Trainer:
        return finetune

    def close(self) -> None:
        """Nothing is held."""
