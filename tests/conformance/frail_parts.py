"""An emitter and a worker that fail, which travel to a cluster's processes as code."""

import os
import platform
import time
from dataclasses import dataclass
from typing import Any

import ray

from autocomp.compress import Compressed
from autocomp.errors import CompressError
from autocomp.policy import Policy
from autocomp.results import Score
from autocomp.study.tasks import Answer, ScoreTask
from autocomp.study.worker import Emitter


@dataclass(frozen=True)
class Refusing:
    """An emitter that fails on one policy, wherever it is."""

    inner: Emitter
    refused: str

    def skeleton(self, policy: Policy) -> bytes:
        return self.inner.skeleton(policy)

    def compress(self, policy: Policy) -> Compressed:
        if policy.digest == self.refused:
            raise CompressError("layer1 is not\nfinite")
        return self.inner.compress(policy)

    def finish(self, policy: Policy) -> Compressed:
        return self.inner.finish(policy)

    def emit(self, compressed: Compressed) -> bytes:
        return self.inner.emit(compressed)


class Frail:
    """An actor in place of a `Station` that starts within a second, for it imports no torch.

    It dies of one policy always, and of another one once.
    """

    def load(self, kit: tuple[str, str, str]) -> tuple[str, dict[str, str]]:
        self._killing, self._killing_once, self._killed = kit
        return platform.node(), {"engine": "another"}

    def do(self, task: ScoreTask) -> Answer:
        digest = task.policy.digest
        if digest == self._killing:
            os._exit(1)
        if digest == self._killing_once and not os.path.exists(self._killed):
            os.close(os.open(self._killed, os.O_CREAT))
            os._exit(1)
        time.sleep(0.1)
        return Answer(score=Score(1.0, None, 1), stage="score")


class Gone:
    """A device that goes away with the first task and does not come back."""

    def load(self, gone: str) -> tuple[str, dict[str, str]]:
        while os.path.exists(gone):
            time.sleep(0.1)
        self._gone = gone
        return "elsewhere", {"engine": "another"}

    def do(self, task: Any) -> None:
        os.close(os.open(self._gone, os.O_CREAT))
        os._exit(1)


def start(name: str, kind: type = Frail, **options: Any) -> Any:
    return ray.remote(kind).options(name=name, num_cpus=0, **options).remote()
