"""Trials under way on a cluster: who does which task, and when."""

import platform
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from autocomp.outcome import Fleet, Stage
from autocomp.policy import Policy
from autocomp.results import TrialResult
from autocomp.study.executors.ray.pool import Member, Pool, reason_of
from autocomp.study.tasks import Answer, Task, TimeTask
from autocomp.study.trial import Steps, Trials

__all__ = ["ATTEMPTS", "RayExecutor"]

ATTEMPTS = 3
"""Workers that a trial may lose before it has failed."""
AHEAD = 2
"""Files that wait to be timed in this process: the one that is next, and one that shows that timing will go on."""
WAIT_S = 1.0
"""Longest wait for an answer while there is nothing else to do."""


_Trial = tuple[int, str, Policy]
"""Number, role and policy."""


@dataclass(eq=False)
class _Flight:
    """A trial under way."""

    number: int
    role: str
    policy: Policy
    steps: Steps
    task: Task
    losses: list[str] = field(default_factory=list)


class RayExecutor:
    """Sends the tasks of trials to pools of actors and takes their answers as they come.

    Args:
        trials: of the run; with no ``meters`` they time in this process.
        workers: score.
        meters: time, one at a time on each target device; None where this machine is the target.
    """

    def __init__(self, trials: Trials, workers: Pool, meters: Pool | None) -> None:
        self._trials, self._workers, self._meters = trials, workers, meters
        self._queues: dict[bool, deque[_Flight]] = {True: deque(), False: deque()}  # by whether it is to be timed
        self._same: dict[str, list[_Trial]] = {}  # structure under way -> who waits for its time
        self._sent: dict[Any, tuple[_Flight, Pool, Member]] = {}
        self._retried = 0
        self._begun, self._timed_s = monotonic(), 0.0

    def run(self, wave: Sequence[_Trial]) -> Iterator[Sequence[TrialResult]]:
        left = deque(wave)
        try:
            while left or self._sent or any(self._queues.values()):
                while left and self._has_room():
                    yield list(self._begin(*left.popleft()))
                yield list(self._time_one())
                self._send()
                more_to_do = bool(left and self._has_room()) or self._may_time_here()
                came: list[TrialResult] = []
                try:
                    for flight, answer in self._answers(0.0 if more_to_do else WAIT_S):
                        came += self._advance(flight, answer)
                finally:
                    yield came  # those before a bug in a worker's answer as well
        finally:
            self.close()

    def close(self) -> None:
        """Forget what is under way; the pools go on, as another search may use them."""
        for _, _, member in self._sent.values():
            member.busy = False
        self._sent, self._queues, self._same = {}, {True: deque(), False: deque()}, {}

    def _has_room(self) -> bool:
        """Whether another trial may begin: no more than workers can use, and no more files than devices wait for."""
        under_way = len(self._sent) + sum(map(len, self._queues.values())) + sum(map(len, self._same.values()))
        files = AHEAD if self._meters is None else len(self._meters.members)
        enough = files > 0 and len(self._queues[True]) >= files  # without a device, what needs none goes on
        return under_way < 2 * self._workers.size and not enough

    def _begin(self, number: int, role: str, policy: Policy) -> Iterator[TrialResult]:
        steps = self._trials.steps(number, role, policy)
        try:
            self._queue(_Flight(number, role, policy, steps, next(steps)))
        except StopIteration as end:
            yield end.value

    def _advance(self, flight: _Flight, answer: Answer) -> Iterator[TrialResult]:
        same: list[_Trial] = []
        if isinstance(flight.task, TimeTask):
            same = self._same.pop(flight.task.structure)
            self._timed_s += answer.seconds.get("time", 0.0)
        try:
            flight.task = flight.steps.send(answer)
            self._queue(flight)
        except StopIteration as end:
            yield end.value
        for other in same:  # from the beginning: now its time is known
            yield from self._begin(*other)

    def _queue(self, flight: _Flight) -> None:
        if isinstance(flight.task, TimeTask):
            if flight.task.structure in self._same:
                self._same[flight.task.structure].append((flight.number, flight.role, flight.policy))
                return  # the file is dropped
            self._same[flight.task.structure] = []
        self._push(flight)

    def _push(self, flight: _Flight) -> None:
        self._queues[isinstance(flight.task, TimeTask)].append(flight)

    def _may_time_here(self) -> bool:
        """Whether a timing waits for this process, and no worker of this machine is busy."""
        return self._meters is None and bool(self._queues[True]) and self._quiet(platform.node())

    def _time_one(self) -> Iterator[TrialResult]:
        """Time one trial in this process; workers elsewhere are sent what has come of it before the next one."""
        if self._may_time_here():
            flight = self._queues[True].popleft()
            self._announce(flight)
            yield from self._advance(flight, self._trials.do(flight.task, lambda stage: None))

    def _send(self) -> None:
        if self._meters is not None:
            for member in self._meters.members:
                if not member.busy and self._queues[True] and self._quiet(member.host):
                    self._hand_over(self._queues[True].popleft(), self._meters, member)
        for member in self._workers.members:
            if not member.busy and self._queues[False] and not self._measuring(member.host):
                self._hand_over(self._queues[False].popleft(), self._workers, member)
        if self._queues[False]:
            self._workers.require()
        elif self._queues[True] and self._meters is not None and not self._sent:  # what can be scored is, before
            self._meters.require()

    def _hand_over(self, flight: _Flight, pool: Pool, member: Member) -> None:
        self._announce(flight)
        member.busy = True
        name = f"{_stage_of(flight.task)} {flight.role} {flight.number}"
        self._sent[member.actor.do.options(name=name).remote(flight.task)] = flight, pool, member

    def _answers(self, wait_s: float) -> Iterator[tuple[_Flight, Answer]]:
        """What has been done since; members that died are replaced, and their trials wait for another."""
        pools = [pool for pool in (self._workers, self._meters) if pool is not None]
        refs = [*self._sent, *(ref for pool in pools for ref in pool.joining)]
        if not self._sent and not (refs and any(self._queues.values())):
            return
        ray.wait(refs, timeout=wait_s)
        for ref in ray.wait(refs, num_returns=len(refs), timeout=0)[0]:
            if ref not in self._sent:
                next(pool for pool in pools if ref in pool.joining).joined(ref)
                continue
            flight, pool, member = self._sent.pop(ref)
            member.busy = False
            try:
                answer = ray.get(ref)
            except RayTaskError:
                raise  # a bug, which another worker has as well
            except RayError as error:
                pool.lose(member)
                flight.losses.append(f"on {member.host}: {error}")
                if len(flight.losses) < ATTEMPTS:
                    self._retried += 1
                    self._push(flight)
                    continue
                reason = f"it lost {ATTEMPTS} workers, the last one so: {reason_of(error)}"
                answer = Answer(stage=_stage_of(flight.task), error=reason, log="\n\n".join(flight.losses))
            yield flight, answer
        lost = sum(pool.lost for pool in pools)
        fleet = Fleet(len(self._workers.members), len(self._sent), lost, self._retried, self._share_timed())
        self._trials.observer(fleet)

    def _share_timed(self) -> float | None:
        """Part of the time so far that each target device was timing; None where times are computed."""
        if not self._trials.backend.measures:
            return None
        devices = 1 if self._meters is None else self._meters.size
        return self._timed_s / (devices * max(monotonic() - self._begun, 1e-3))

    def _announce(self, flight: _Flight) -> None:
        self._trials.observer(Stage(flight.number, flight.role, _stage_of(flight.task)))

    def _quiet(self, host: str) -> bool:
        """Whether nothing disturbs a measurement there: nobody scores, or times are computed anyway."""
        return not self._trials.backend.measures or not any(
            member.busy for member in self._workers.members if member.host == host
        )

    def _measuring(self, host: str) -> bool:
        """Whether a measurement is going on or waited for there."""
        if not self._trials.backend.measures:
            return False
        if self._meters is None:
            return bool(self._queues[True]) and host == platform.node()
        here = [member for member in self._meters.members if member.host == host]
        return any(member.busy for member in here) or bool(here and self._queues[True])


def _stage_of(task: Task) -> str:
    return "time" if isinstance(task, TimeTask) else "score"
