"""In which order the tasks of trials go to workers and devices, on a cluster of stubs."""

import gc
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from autocomp.budget import parse_budgets
from autocomp.engines import initializer_bytes, structure_digest
from autocomp.hardware import LatencyTable
from autocomp.policy import Policy
from autocomp.protocols import Backend
from autocomp.results import Score, TimingProtocol, TrialResult
from autocomp.study.executors.ray import Pool, RayExecutor, executor
from autocomp.study.tasks import Answer, Task, Timed, TimeTask
from autocomp.study.trial import Limits, Trials
from autocomp.study.worker import Emitter
from tests.engines.conftest import Case


def answer(task: Task) -> Answer:
    if isinstance(task, TimeTask):
        return Answer(timed=Timed(0.5, 1.0), stage="time")
    return Answer(score=Score(1.0, None, 1), stage="score")


class File(bytes):
    """Known to be held as long as it is."""

    held = 0
    most = 0

    def __init__(self, content: bytes) -> None:
        File.held += 1
        File.most = max(File.most, File.held)

    def __del__(self) -> None:
        File.held -= 1


@dataclass(frozen=True)
class Skeletons:
    """Only the step of an emitter that a driver takes."""

    model: Case

    def skeleton(self, policy: Policy) -> bytes:
        return File(self.model.emit(policy))


@dataclass(frozen=True)
class Stubbed(Trials):
    """Trials that are timed in no time, and keep a log of it."""

    log: list[str] = field(default_factory=list)

    def do(self, task: Task, announce: Callable[[str], None]) -> Answer:
        self.log.append("time")
        return answer(task)


@dataclass(eq=False)
class Sent:
    """What Ray gives a reference to."""

    answer: Answer
    looks: int


@dataclass(eq=False)
class Stub:
    """A member of a pool and its actor; it logs what it is sent, and has done it after so many ``looks``."""

    host: str
    log: list[str]
    looks: int = 0
    busy: bool = False

    @property
    def actor(self) -> Any:
        return SimpleNamespace(do=self)

    def options(self, name: str) -> Any:
        return self

    def remote(self, task: Task) -> Any:
        self.log.append("time" if isinstance(task, TimeTask) else "score")
        return Sent(answer(task), self.looks)


@dataclass
class Crew:
    """As much of a pool as an executor sees."""

    members: list[Stub]
    joining: dict[Any, Any] = field(default_factory=dict)
    lost: int = 0

    @property
    def size(self) -> int:
        return len(self.members)

    def require(self) -> None:
        """They are here."""


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that an executor would have waited for answers that did not come."""
    waits: list[float] = []

    def wait(refs: list[Sent], num_returns: int = 1, timeout: float = 0.0) -> tuple[list[Sent], list[Sent]]:
        done = [ref for ref in refs if ref.looks <= 0]
        if timeout and not done:
            waits.append(timeout)
        for ref in refs:
            ref.looks -= 1
        return done, []

    monkeypatch.setattr(executor, "ray", SimpleNamespace(wait=wait, get=lambda ref: ref.answer))
    return waits


@pytest.fixture
def trials(model: Case, tmp_path: Path) -> Stubbed:
    file = model.emit(Policy())
    limits = Limits(parse_budgets(["1x"]), {"p50": 1.0}, model.net.graph.macs(Policy()), initializer_bytes(file))
    backend = SimpleNamespace(measures=True, device=SimpleNamespace(to_json=dict), batch=1)
    nobody: Any = None
    File.held = File.most = 0
    return Stubbed(
        cast(Emitter, Skeletons(model)), cast(Backend, backend), nobody, nobody, TimingProtocol(), model.net.graph,
        structure_digest(file), limits, LatencyTable(tmp_path / "latencies.jsonl"), tmp_path, lambda event: None,
    )  # fmt: skip


@pytest.fixture
def wave() -> list[tuple[int, str, Policy]]:
    """Of distinct structures."""
    return [(kept, "search", Policy({"layer1.0.conv1": kept})) for kept in range(1, 8)]


def ran(trials: Trials, wave: list[tuple[int, str, Policy]], workers: Crew, meters: Crew | None) -> list[TrialResult]:
    return list(chain.from_iterable(RayExecutor(trials, cast(Pool, workers), cast(Pool, meters)).run(wave)))


def test_workers_elsewhere_score_while_this_machine_times(
    trials: Stubbed, wave: list[tuple[int, str, Policy]], waits: list[float]
) -> None:
    workers = Crew([Stub("elsewhere", trials.log, looks=6) for _ in range(4)])
    results = ran(trials, wave, workers, None)
    assert sorted(result.number for result in results) == list(range(1, 8))
    assert trials.log[:8] == ["time", "score"] * 4
    assert len(waits) <= 6  # never while there is something to time


def test_this_machine_times_all_it_may_before_its_workers_score_again(
    trials: Stubbed, wave: list[tuple[int, str, Policy]]
) -> None:
    workers = Crew([Stub(platform.node(), trials.log, looks=1) for _ in range(2)])
    assert len(ran(trials, wave, workers, None)) == 7
    assert trials.log[:6] == [*["time"] * 4, *["score"] * 2]


@pytest.mark.parametrize("devices", [0, 2])
def test_a_driver_holds_no_more_files_than_devices_wait_for(
    trials: Stubbed, wave: list[tuple[int, str, Policy]], devices: int
) -> None:
    workers = Crew([Stub("elsewhere", trials.log, looks=3) for _ in range(7)])
    meters = Crew([Stub("device", trials.log, looks=3) for _ in range(devices)]) if devices else None
    again = [(number + 10, role, policy) for number, role, policy in wave]
    alike = [trial for pair in zip(wave, again, strict=True) for trial in pair]
    assert len(ran(trials, alike, workers, meters)) == 14
    gc.collect()
    assert File.most <= 4 + 1 and File.held == 0
