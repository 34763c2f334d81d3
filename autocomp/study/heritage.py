"""What a search takes over from one for another engine or device: its policies, and the scores that still hold."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from autocomp.errors import RunError
from autocomp.outcome import Note, Observer
from autocomp.policy import Policy
from autocomp.results import Score, TrialResult
from autocomp.storage import write_atomic
from autocomp.study.run import Run, read_manifest
from autocomp.study.study import FixedList, Plan
from autocomp.study.workbench import Workbench

__all__ = ["FILE", "Heritage", "heritage_of", "inherited_plans", "read_heritage"]

FILE = "heritage.json"
SCORED_BY = ("weights", "data", "graph", "recipe", "numerics", "reference")
"""Digests that a trial's score depends on, beside its policy."""


@dataclass(frozen=True, slots=True)
class Heritage:
    """Policies of an earlier run, and what is known of them.

    Attributes:
        source: folder of that run.
        policies: role -> what it evaluated, in trial order.
        scores: digest of a policy -> its score on the search split; empty where a digest differs that they depend on.
    """

    source: str
    policies: Mapping[str, tuple[Policy, ...]]
    scores: Mapping[str, Score]

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "policies": {role: [policy.to_json() for policy in own] for role, own in self.policies.items()},
            "scores": {digest: score.to_json() for digest, score in self.scores.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        policies = {role: tuple(map(Policy.from_json, own)) for role, own in data["policies"].items()}
        return cls(data["source"], policies, {digest: Score(**score) for digest, score in data["scores"].items()})

    def write(self, folder: Path) -> None:
        write_atomic(folder / FILE, json.dumps(self.to_json()))


def heritage_of(source: Path, bench: Workbench, observer: Observer) -> Heritage:
    """What a run leaves to a workbench for another engine; what that engine does not run is left out, with a note.

    Raises:
        RunError: the folder is no run, or no policy of it is left.
    """
    digests = read_manifest(source).digests
    trials = [TrialResult.from_json(entry["result"]) for entry in Run.entries_of(source) if entry["kind"] == "trial"]
    trials.sort(key=lambda trial: trial.number)
    legal = {trial.policy: bench.space.contains(trial.policy) for trial in trials}
    policies: dict[str, dict[Policy, None]] = {}
    for trial in trials:
        if legal[trial.policy]:
            policies.setdefault(trial.role, {})[trial.policy] = None
    if "search" not in policies:
        raise RunError(f"{source} evaluated no policy that {bench.backend.name} runs: start a new search")
    other = [name for name in SCORED_BY if digests.get(name) != bench.digests[name]]
    scored = [trial for trial in trials if trial.score is not None and legal[trial.policy]]
    gone = sum(not kept for kept in legal.values())
    if gone:
        observer(Note(f"{gone} of {len(legal)} policies are left out, for {bench.backend.name} does not run them"))
    if other:
        observer(Note(f"every policy is scored again: its {' and '.join(other)} differ from those of {source}"))
    scores = {} if other else {trial.policy.digest: trial.score for trial in scored if trial.score is not None}
    return Heritage(str(source), {role: tuple(own) for role, own in policies.items()}, scores)


def read_heritage(folder: Path) -> Heritage | None:
    """What a run took over from another; None where it took over nothing.

    Raises:
        RunError: the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        return Heritage.from_json(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}): retarget again") from error


def inherited_plans(heritage: Heritage, wave: int) -> Sequence[Plan]:
    """The earlier run's policies once more, role by role."""
    roles = [role for role in ("search", "uniform", "random") if role in heritage.policies]
    return [Plan(role, FixedList(heritage.policies[role]), len(heritage.policies[role]), wave) for role in roles]
