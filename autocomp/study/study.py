"""The loop ask -> evaluate -> tell, its stop rules, and its replay after a kill."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from autocomp.errors import AutocompError
from autocomp.outcome import Note, Observer, Phase, TrialDone
from autocomp.policy import Policy
from autocomp.protocols import Controller, Executor
from autocomp.results import TrialResult
from autocomp.study.run import Run

__all__ = ["MAX_DUPLICATES", "MAX_FAILURES", "FixedList", "Plan", "Study", "StudyError", "journaled_trials"]

MAX_DUPLICATES = 100
"""Duplicates in a row that end a study: the controller has nothing new to say."""
MAX_FAILURES = 10
"""Failed trials in a row that stop the run: something else than the policies is wrong."""


class StudyError(AutocompError):
    """Too many trials failed one after the other; the message carries the last reason."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One role's share of the run: who asks, and for how many evaluations, in waves of what size."""

    role: str
    controller: Controller
    trials: int
    wave: int


def journaled_trials(entries: Iterable[Mapping[str, Any]]) -> list[TrialResult]:
    """The trials of a journal's lines; of one that failed and was evaluated again only the last result counts."""
    found = (TrialResult.from_json(entry["result"]) for entry in entries if entry["kind"] == "trial")
    return list({(result.role, result.policy.digest): result for result in found}.values())


class Study:
    """Runs plans one after the other over one journal.

    Every wave is journaled before it is evaluated, and results as they arrive. Opened again after a kill, the
    study asks each controller the same questions and tells it the same answers, so that its random state is what it
    was; only what has no result is evaluated.
    """

    def __init__(self, run: Run, executor: Executor, observer: Observer) -> None:
        self._run = run
        self._executor = executor
        self._observer = observer
        past = journaled_trials(Run.entries_of(run.folder))
        self.results = [result for result in past if result.status != "failed"]  # what failed may have been passing
        self._by_policy: dict[str, TrialResult] = {}
        for result in self.results:
            self._by_policy.setdefault(result.policy.digest, result)
        self._journaled = {(r.role, r.policy.digest): r for r in self.results}
        self._number = max((result.number for result in self.results), default=-1) + 1

    def of(self, role: str) -> list[TrialResult]:
        """Results of a role, in trial order."""
        return sorted((result for result in self.results if result.role == role), key=lambda result: result.number)

    def explore(self, plan: Plan) -> list[TrialResult]:
        """Evaluate until the plan's number of distinct policies has been, or its controller is dry.

        Raises:
            StudyError: `MAX_FAILURES` trials in a row failed.
        """
        self._observer(Phase(plan.role, plan.trials))
        past = self._past_waves(plan.role)
        distinct: set[str] = set()
        last: deque[TrialResult] = deque(maxlen=MAX_FAILURES)
        duplicates = 0
        while len(distinct) < plan.trials and duplicates < MAX_DUPLICATES:
            asked = plan.controller.ask(min(plan.wave, plan.trials - len(distinct)))
            wave = next(past, None)
            if wave is None:
                if not asked:
                    break
                wave = asked
                self._run.record("wave", role=plan.role, policies=[policy.to_json() for policy in wave])
            fresh = list(dict.fromkeys(policy for policy in wave if policy.digest not in distinct))
            duplicates = 0 if fresh else duplicates + len(wave)
            distinct.update(policy.digest for policy in fresh)
            answers = self._answer(plan.role, fresh)
            told = [answers.get(policy.digest) or self._journaled[plan.role, policy.digest] for policy in wave]
            plan.controller.tell(told)
            last.extend(answers.values())
            _stop_if_hopeless(last)
        if duplicates >= MAX_DUPLICATES:
            self._observer(Note(f"{plan.role}: {duplicates} proposals in a row were known already, so it ended early"))
        return self.of(plan.role)

    def _past_waves(self, role: str) -> Iterator[list[Policy]]:
        """What was asked before a stop, read as it is needed."""
        for entry in Run.entries_of(self._run.folder):
            if entry["kind"] == "wave" and entry["role"] == role:
                yield [Policy.from_json(policy) for policy in entry["policies"]]

    def _answer(self, role: str, policies: Sequence[Policy]) -> dict[str, TrialResult]:
        """Results for distinct policies, in trial order: journaled, known from another role, or evaluated."""
        answers: dict[str, TrialResult] = {}
        copied: list[TrialResult] = []
        todo: list[tuple[int, str, Policy]] = []
        for policy in policies:
            done = self._journaled.get((role, policy.digest))
            if done is not None:
                answers[policy.digest] = done
                continue
            known = self._by_policy.get(policy.digest)
            if known is not None and known.status != "failed":
                copied.append(replace(known, number=self._number, role=role, cached_timing=True, seconds={}))
            else:
                todo.append((self._number, role, policy))
            self._number += 1
        for results in chain([copied], self._executor.run(todo)):
            fresh = {digest: result for result in results if (digest := result.policy.digest) not in answers}
            self._record(fresh)
            answers.update(fresh)
        return dict(sorted(answers.items(), key=lambda item: item[1].number))

    def _record(self, results: Mapping[str, TrialResult]) -> None:
        """Journal what came together, by digest of the policy, and only then tell of it."""
        if not results:
            return
        self._run.record_all("trial", [{"result": result.to_json()} for result in results.values()])
        for digest, result in results.items():
            self.results.append(result)
            self._journaled[result.role, digest] = result
            self._by_policy.setdefault(digest, result)
            self._observer(TrialDone(result))


def _stop_if_hopeless(last: Sequence[TrialResult]) -> None:
    """Raises: StudyError if `MAX_FAILURES` trials, the last ones, all failed."""
    if len(last) == MAX_FAILURES and all(result.status == "failed" for result in last):
        stages = ", ".join(sorted({result.stage for result in last}))
        raise StudyError(
            f"{MAX_FAILURES} trials in a row failed (stage: {stages}); the last one said: {last[-1].error}"
        )


class FixedList:
    """A controller that proposes given policies in order; the uniform baseline is one."""

    def __init__(self, policies: Iterable[Policy]) -> None:
        self._left = list(policies)

    def ask(self, count: int) -> list[Policy]:
        wave, self._left = self._left[:count], self._left[count:]
        return wave

    def tell(self, results: Sequence[TrialResult]) -> None:
        """A list learns nothing."""
