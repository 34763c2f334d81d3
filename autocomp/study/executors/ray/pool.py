"""Actors of one kind: started, lost, replaced."""

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

import ray
from ray.exceptions import RayError

from autocomp.errors import AutocompError, ConfigError, RunError
from autocomp.study.executors.kit import Parcel, open_kit, receive
from autocomp.study.tasks import Answer, Task
from autocomp.study.worker import Worker, line_of

__all__ = ["Member", "Pool", "Station", "reason_of"]

FAILED_STARTS = 3
"""Workers that may fail to start, one after the other, before no more are started."""
START_S = 300.0
"""Longest wait for a first worker to start, and for one to come back when all are lost."""


class Station:
    """An actor: it opens the kit once, then does one task after the other."""

    def __init__(self) -> None:
        self._worker: Worker | None = None

    def load(self, parcel: Parcel) -> tuple[str, Any]:
        """The machine's name, and the fingerprint of what its engines run on.

        Raises:
            AutocompError: something the kit needs is missing here.
        """
        host = platform.node()
        try:
            self._worker = open_kit(receive(parcel))
        except AutocompError as error:
            raise ConfigError(f"a worker on {host} cannot start: {error}") from error
        return host, self._worker.device.to_json()

    def do(self, task: Task) -> Answer:
        assert self._worker is not None
        return self._worker.do(task, lambda stage: None)


@dataclass(eq=False)
class Member:
    """One actor of a pool, and the machine it is on."""

    actor: Any
    host: str = ""
    busy: bool = False


class Pool:
    """Actors of one kind. One that is lost is replaced; its successor joins when it has loaded the kit.

    Args:
        make: starts an actor of a given name.
        size: how many there are to be.
        kit: reference to the parcel they load.
        name: of the pool, for the dashboard.
        device: fingerprint that all must have; None where any will do.
    """

    def __init__(
        self, make: Callable[[str], Any], size: int, kit: Any, name: str, device: Mapping[str, Any] | None = None
    ) -> None:
        self._make, self._kit, self._name, self._device = make, kit, name, device
        self.size = size
        self.members: list[Member] = []
        self.joining: dict[Any, Member] = {}
        self.lost = 0
        self._made = self._failed_starts = 0
        self._missing_since = monotonic()
        for _ in range(size):
            self._hire()

    def wait_for_one(self) -> None:
        """Raises: ConfigError if none can start, RunError if none does in time."""
        while not self.members:
            self.require()
            for ref in ray.wait(list(self.joining), timeout=1.0)[0]:
                self.joined(ref)

    def require(self) -> None:
        """Raises: RunError if all members have been away for too long."""
        if self.members:
            self._missing_since = monotonic()
        elif not self.joining or monotonic() - self._missing_since > START_S:
            raise RunError(
                f"no {self._name} is left on the cluster, and none came back: mend it, then go on with "
                "'autocomp resume'"
            )

    def joined(self, ref: Any) -> None:
        """Take in an actor that has loaded the kit, or failed to.

        Raises:
            ConfigError: it says why it cannot work, and no other can.
        """
        member = self.joining.pop(ref)
        try:
            member.host, device = ray.get(ref)
        except RayError as error:
            self._failed_starts += 1
            if not self.members and (isinstance(error, ConfigError) or self._failed_starts >= FAILED_STARTS):
                raise ConfigError(reason_of(error)) from error
            if self._failed_starts < FAILED_STARTS:
                self._hire()
            return
        if self._device is not None and device != self._device:
            raise ConfigError(
                f"the device of {member.host} is {device}, and this machine's {self._device}: start the search on a "
                "node that has the target, as with 'ray job submit --entrypoint-resources'"
            )
        self._failed_starts = 0
        self.members.append(member)

    def lose(self, member: Member) -> None:
        """Replace a member that died or cannot be reached."""
        if member in self.members:
            self.members.remove(member)
            self.lost += 1
            self._missing_since = monotonic()
            ray.kill(member.actor)  # where it is only unreachable: its answer must not come twice
            self._hire()

    def close(self) -> None:
        for member in (*self.members, *self.joining.values()):
            ray.kill(member.actor)
        self.members, self.joining = [], {}

    def _hire(self) -> None:
        name = f"autocomp {self._name} {self._made} of {platform.node()}-{os.getpid()}-{id(self)}"
        actor = self._make(name)
        self._made += 1
        self.joining[actor.load.remote(self._kit)] = Member(actor)


def reason_of(error: BaseException) -> str:
    """What an actor's end was, as one line."""
    cause = getattr(error, "cause", None)
    return line_of(cause if isinstance(cause, AutocompError) else error)
