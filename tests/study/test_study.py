"""The loop: waves, duplicates, failures, and resuming as if nothing had happened."""

import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from autocomp.outcome import Event, Note
from autocomp.policy import Policy
from autocomp.results import Score, TrialResult
from autocomp.study.run import Manifest, Run
from autocomp.study.study import MAX_DUPLICATES, MAX_FAILURES, FixedList, Plan, Study, StudyError, journaled_trials

MANIFEST = Manifest("0.1.0", {}, [], {}, {}, {})
POLICIES = [Policy({"a": a, "b": b}) for a in range(1, 9) for b in range(1, 9)]


class Scripted:
    """Asks at random; what it asks depends on everything it was told."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.told: list[TrialResult] = []

    def ask(self, count: int) -> list[Policy]:
        shift = sum(result.policy.kept["a"] for result in self.told)
        return [POLICIES[(self.random.randrange(64) + shift) % 64] for _ in range(count)]

    def tell(self, results: Sequence[TrialResult]) -> None:
        self.told += results


class Counting:
    """Scores a policy by a formula and counts; dies like a killed process after ``limit`` evaluations."""

    def __init__(self, limit: int | None = None, failing: bool = False) -> None:
        self.evaluated: list[str] = []
        self.limit = limit
        self.failing = failing

    def run(self, wave: Sequence[tuple[int, str, Policy]]) -> Iterator[Sequence[TrialResult]]:
        for number, role, policy in wave:
            if len(self.evaluated) == self.limit:
                raise KeyboardInterrupt
            self.evaluated.append(policy.digest)
            if self.failing:
                yield [TrialResult(number, role, policy, "failed", stage="build", error="refused: Foo")]
                continue
            value = 1.0 / (policy.kept["a"] + policy.kept["b"])
            yield [TrialResult(number, role, policy, "ok", (-0.1,), value, Score(value, 0.9, 10), 1.0, 2.0, 5, 7)]

    def close(self) -> None:
        pass


def ignore(event: Event) -> None:
    del event


def explore(folder: Path, executor: Counting, trials: int = 20) -> list[TrialResult]:
    opened = Run.open(folder) if folder.exists() else Run.create(folder, MANIFEST)
    with opened as run:
        return Study(run, executor, ignore).explore(Plan("search", Scripted(3), trials, 4))


def test_as_many_distinct_policies_as_planned_are_evaluated_once(tmp_path: Path) -> None:
    executor = Counting()
    results = explore(tmp_path / "run", executor)
    assert len(results) == len({result.policy.digest for result in results}) == 20
    assert len(executor.evaluated) == len(set(executor.evaluated)) == 20
    assert [result.number for result in results] == list(range(20))


@pytest.mark.parametrize("stop", [1, 4, 5, 11, 19])
def test_a_stopped_study_goes_on_as_if_it_had_not_stopped(tmp_path: Path, stop: int) -> None:
    whole = explore(tmp_path / "whole", Counting())
    first, second = Counting(limit=stop), Counting()
    with pytest.raises(KeyboardInterrupt):
        explore(tmp_path / "parts", first)
    (tmp_path / "parts").rename(tmp_path / "elsewhere")  # as another machine finds it
    resumed = explore(tmp_path / "elsewhere", second)
    assert [(r.number, r.policy) for r in resumed] == [(r.number, r.policy) for r in whole]
    assert len(first.evaluated) == stop
    assert not set(first.evaluated) & set(second.evaluated)


def test_a_policy_known_from_another_role_is_not_evaluated_again(tmp_path: Path) -> None:
    executor = Counting()
    with Run.create(tmp_path / "run", MANIFEST) as run:
        study = Study(run, executor, ignore)
        study.explore(Plan("uniform", FixedList(POLICIES[:3]), 3, 2))
        study.explore(Plan("random", FixedList(POLICIES[1:5]), 4, 2))
        assert [result.policy for result in study.of("random")] == POLICIES[1:5]
    assert len(executor.evaluated) == 5
    assert len({result.number for result in study.results}) == 7


def test_a_controller_that_repeats_itself_ends_the_study(tmp_path: Path) -> None:
    class Stuck(Scripted):
        def ask(self, count: int) -> list[Policy]:
            return POLICIES[:1] * count

    notes: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    controller = Stuck(0)
    with Run.create(tmp_path / "run", MANIFEST) as run:
        results = Study(run, Counting(), listen).explore(Plan("search", controller, 20, 4))
    assert len(results) == 1
    assert len(controller.told) >= MAX_DUPLICATES
    assert any("known already" in note for note in notes)


def test_failures_in_a_row_stop_with_the_last_reason(tmp_path: Path) -> None:
    executor = Counting(failing=True)
    with Run.create(tmp_path / "run", MANIFEST) as run, pytest.raises(StudyError, match=r"build.*refused: Foo"):
        Study(run, executor, ignore).explore(Plan("search", FixedList(POLICIES), 60, 1))
    assert len(executor.evaluated) == MAX_FAILURES


def test_what_failed_is_tried_again_when_the_run_goes_on(tmp_path: Path) -> None:
    with pytest.raises(StudyError):
        explore(tmp_path / "run", Counting(failing=True))
    results = explore(tmp_path / "run", Counting())
    assert len(results) == 20 and all(result.status == "ok" for result in results)
    entries = list(Run.entries_of(tmp_path / "run"))
    assert len([entry for entry in entries if entry["kind"] == "trial"]) > 20
    assert sorted(journaled_trials(entries), key=lambda result: result.number) == results


def test_results_are_on_disk_before_the_next_trial_begins(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    class Watching(Counting):
        def run(self, wave: Sequence[tuple[int, str, Policy]]) -> Iterator[Sequence[TrialResult]]:
            for (result,) in super().run(wave):
                on_disk = [entry for entry in Run.entries_of(folder) if entry["kind"] == "trial"]
                assert len(on_disk) == result.number
                yield [result]

    explore(folder, Watching(), trials=6)


def test_results_that_came_together_are_forced_to_disk_at_once_and_count_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced: list[int] = []

    class Together(Counting):
        def run(self, wave: Sequence[tuple[int, str, Policy]]) -> Iterator[Sequence[TrialResult]]:
            results = [result for (result,) in super().run(wave)]
            forced.clear()
            yield results[:3]
            assert len(forced) == 1
            yield []
            yield [*results[2:], results[0]]
            assert len(forced) == 2

    def force(handle: int) -> None:
        forced.append(handle)
        inner(handle)

    inner = os.fsync
    monkeypatch.setattr(os, "fsync", force)
    results = explore(tmp_path / "run", Together(), trials=8)
    assert [result.number for result in results] == list(range(8))
    assert [r.number for r in journaled_trials(Run.entries_of(tmp_path / "run"))] == list(range(8))
    assert sum(entry["kind"] == "trial" for entry in Run.entries_of(tmp_path / "run")) == 8
