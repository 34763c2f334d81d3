"""Actors of one kind: started, lost, replaced."""

import os
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

import ray
from ray.exceptions import RayError

from autocomp.errors import AutocompError, ConfigError, RunError
from autocomp.study.executors.kit import Parcel, lacks, open_kit, receive
from autocomp.study.tasks import Answer, Task
from autocomp.study.worker import Worker, line_of

__all__ = ["Member", "Pool", "Station", "reason_of"]

FAILED_STARTS = 3
"""Workers that may fail to start, one after the other, before no more are started."""
START_S = 300.0
"""Longest wait for a first worker to start, and for one to come back when all are lost."""
REST_S = 10.0
"""Longest wait for the rest once a first one has started."""
_NODE_DIED = "its node has died"
"""As Ray says it of an actor."""


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
    """One actor of a pool, the machine it is on, and the engine it has there."""

    actor: Any
    host: str = ""
    engine: str = ""
    busy: bool = False


class Pool:
    """Actors of one kind, which join when they have loaded the kit. One that is lost is replaced.

    Args:
        make: starts an actor of a given name.
        size: how many there are to be.
        name: of the pool, for the dashboard.
    """

    def __init__(self, make: Callable[[str], Any], size: int, name: str) -> None:
        self._make, self._name = make, name
        self._kit: Any = None
        self._device: Mapping[str, Any] | None = None
        self.size = size
        self.members: list[Member] = []
        self.joining: dict[Any, Member] = {}
        self.lost = 0
        self._made = self._failed_starts = 0
        self._reason = ""
        self._missing_since = monotonic()
        self._waiting = [self._started() for _ in range(size)]

    def equip(self, kit: Any, device: Mapping[str, Any] | None = None) -> None:
        """Have all load the kit, those that were closed after they have started again.

        Args:
            kit: reference to the parcel.
            device: fingerprint that all must have; None where any will do.
        """
        self._kit, self._device, self._missing_since = kit, device, monotonic()
        missing = self.size - len(self.members) - len(self.joining) - len(self._waiting)
        self._waiting += [self._started() for _ in range(missing)]
        while self._waiting:
            self._load(self._waiting.pop())

    def gather(self) -> None:
        """Wait for a first member, and a little for the rest, whose start would disturb what is measured next.

        Raises:
            ConfigError: none can start.
            RunError: none does in time.
        """
        while not self.members:
            self.require()
            self._let_in()
        until = monotonic() + REST_S
        while self.joining and monotonic() < until:
            self._let_in()

    def require(self) -> None:
        """Raises: RunError if all members have been away for too long."""
        if self.members:
            self._missing_since = monotonic()
        elif not self.joining or monotonic() - self._missing_since > START_S:
            raise RunError(
                f"no {self._name} is left on the cluster, and none came back{self._reason}: mend it, then go on "
                "with 'autocomp resume'"
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
            if _NODE_DIED in str(error):  # which is no fault of what starts, on as many actors as were there
                self._load(self._started())
                return
            self._failed_starts += 1
            self._reason = f" ({reason_of(error)})"
            never = not self.members and not self.lost
            if never and (isinstance(error, ConfigError) or self._failed_starts >= FAILED_STARTS):
                raise ConfigError(reason_of(error)) from error
            if self._failed_starts < FAILED_STARTS:
                self._load(self._started())
            return
        if self._device is not None and device != self._device:
            raise ConfigError(
                f"the device of {member.host} is {device}, and this machine's {self._device}: start the search on a "
                "node that has the target, as with 'ray job submit --entrypoint-resources'"
            )
        self._failed_starts = 0
        member.engine = device["engine"]
        self.members.append(member)

    def lose(self, member: Member) -> None:
        """Replace a member that died or cannot be reached."""
        if member in self.members:
            self.members.remove(member)
            self.lost += 1
            self._missing_since = monotonic()
            ray.kill(member.actor)  # where it is only unreachable: its answer must not come twice
            self._load(self._started())

    def close(self) -> None:
        for actor in (*self._waiting, *(member.actor for member in (*self.members, *self.joining.values()))):
            ray.kill(actor)
        self._waiting, self.members, self.joining = [], [], {}

    def _let_in(self) -> None:
        for ref in ray.wait(list(self.joining), timeout=1.0)[0]:
            self.joined(ref)

    def _started(self) -> Any:
        name = f"autocomp {self._name} {self._made} of {platform.node()}-{os.getpid()}-{id(self)}"
        self._made += 1
        return self._make(name)

    def _load(self, actor: Any) -> None:
        self.joining[actor.load.remote(self._kit)] = Member(actor)


def reason_of(error: BaseException) -> str:
    """What an actor's end was, as one line."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, AutocompError):
        return line_of(cause)
    missing = re.search(r"No module named '([^'.]+)", str(error))  # as Ray tells it of an actor's own code
    return f"a worker cannot start: {lacks(missing[1])}" if missing else line_of(error)
