"""A front: one search a budget, from the tightest to the loosest, each beginning with what those before it found."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autocomp.budget import parse_budgets
from autocomp.config import SearchConfig
from autocomp.errors import BudgetError, RunError
from autocomp.outcome import SearchResult
from autocomp.policy import Policy
from autocomp.results import Score, TrialResult
from autocomp.storage import write_atomic
from autocomp.study.run import read_manifest
from autocomp.study.trial import Limits

__all__ = [
    "FRONT",
    "Front",
    "FrontPoint",
    "best_of",
    "front_configs",
    "hand_on",
    "refuse_other_settings",
    "scores_of",
    "write_front",
]

FRONT = (0.25, 0.35, 0.5, 0.65, 0.8, 0.9)
"""Latency budgets, as fractions of the uncompressed engine's latency."""
HANDED_ON = 4
"""Policies of the searches before that the next one begins with, at most."""
SHARED = ("latencies.jsonl", "sensitivity.json", "profile")
"""What a run leaves to the next one: it depends on no budget."""


@dataclass(frozen=True)
class FrontPoint:
    """One budget of a front.

    Attributes:
        budget: of latency.
        result: of its search; None where the budget is out of reach.
        reason: why there is none.
    """

    budget: str
    result: SearchResult | None
    reason: str | None = None

    @property
    def verified(self) -> bool:
        return self.result is not None and self.result.verified

    def to_json(self) -> dict[str, Any]:
        return {
            "budget": self.budget,
            "verified": self.verified,
            "reason": self.reason,
            "result": None if self.result is None else self.result.to_json(),
        }


@dataclass(frozen=True)
class Front:
    """What a search with ``--front`` gives.

    Attributes:
        points: from the tightest budget to the loosest.
        folder: with one run's folder for each.
    """

    points: tuple[FrontPoint, ...]
    folder: Path

    @property
    def results(self) -> tuple[SearchResult, ...]:
        """Of the budgets within reach."""
        return tuple(point.result for point in self.points if point.result is not None)

    @property
    def verified(self) -> bool:
        """Every budget within reach is, and there is one."""
        return bool(self.results) and all(result.verified for result in self.results)

    def to_json(self) -> dict[str, Any]:
        return {
            "verified": self.verified,
            "predicted": any(result.predicted for result in self.results),
            "points": [point.to_json() for point in self.points],
            "run": str(self.folder),
        }


def front_configs(config: SearchConfig, folder: Path) -> tuple[SearchConfig, ...]:
    """One configuration a budget of the front, each with a folder of its own; budgets of size and MACs go with all.

    Raises:
        BudgetError: a budget of latency is given, which the front has itself.
    """
    if any(budget.metric == "latency" for budget in (parse_budgets(config.budget) if config.budget else ())):
        raise BudgetError("--front has its own latency budgets: leave --budget out, or give one on size or MACs")
    return tuple(
        replace(config, front=False, budget=(f"{limit:g}x", *config.budget), out=str(folder / f"{limit:g}x"))
        for limit in FRONT
    )


def refuse_other_settings(configs: Sequence[SearchConfig]) -> None:
    """Raises: RunError: one's folder holds a run with other settings."""
    for config in configs:
        folder = Path(str(config.out))
        if (folder / "manifest.json").exists():
            found = SearchConfig.from_json(read_manifest(folder).config)
            if replace(found, json=config.json) != config:
                raise RunError(f"{folder} is a run with other settings: choose another --out")


def hand_on(before: Path, folder: Path) -> None:
    """Copy what does not depend on a budget from one run's folder to the next one's, unless it has its own."""
    for name in SHARED:
        source, target = before / name, folder / name
        if target.exists() or not source.exists():
            continue
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)


def best_of(earlier: Sequence[TrialResult], limits: Limits) -> tuple[Policy, ...]:
    """Of trials under other budgets the `HANDED_ON` best policies that keep these, the best first."""
    kept = [
        trial
        for trial in earlier
        if trial.score is not None
        and trial.ratio is not None
        and all(over <= 0 for over in limits.violations(trial.ratio, trial.macs or 0, trial.size_bytes or 0))
    ]
    kept.sort(key=lambda trial: (trial.score.divergence if trial.score else 0.0, trial.number))
    return tuple(dict.fromkeys(trial.policy for trial in kept))[:HANDED_ON]


def scores_of(earlier: Sequence[TrialResult]) -> Mapping[str, Score]:
    """Digest of a policy -> its score."""
    return {trial.policy.digest: trial.score for trial in earlier if trial.score is not None}


def write_front(front: Front) -> None:
    """Write ``front.json``."""
    write_atomic(front.folder / "front.json", json.dumps(front.to_json(), indent=2))
