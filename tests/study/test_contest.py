"""Which finalist is trained to its end: against trainings done apart, and against the rule on accuracies made up."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autocomp import api
from autocomp.errors import CompressError
from autocomp.outcome import Step
from autocomp.policy import Policy
from autocomp.results import Contest, TrialResult
from autocomp.study.contest import halved, rungs
from autocomp.study.run import Run

SETTINGS = {"epochs": 3, "lr": 0.05, "flip": 0.0, "crop": 0, "distillation": 0.1}


def of(run: Path, kind: str) -> list[dict[str, Any]]:
    return [entry for entry in Run.entries_of(run) if entry["kind"] == kind]


@pytest.mark.parametrize(
    ("epochs", "count", "expected"), [(10, 3, (3,)), (9, 9, (1, 3)), (27, 10, (1, 3, 9)), (1, 4, (1, 1)), (5, 1, ())]
)
def test_rungs_lie_a_factor_of_three_apart(epochs: int, count: int, expected: tuple[int, ...]) -> None:
    assert rungs(epochs, count) == expected


def test_the_best_after_training_goes_on_whatever_stops_it(run: Path) -> None:
    stops = iter(range(7))

    def stopped(event: object) -> None:
        if isinstance(event, Step) and next(stops, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.finetune(run, SETTINGS, stopped, finalists=3)
    before = of(run, "rung")
    assert len(before) == 1 and len(of(run, "entrant")) == 2
    events: list[object] = []
    found = api.finetune(run, SETTINGS, events.append, finalists=3)
    assert sum(isinstance(event, Step) for event in events) == (3 - 1 + 2) * 5  # of 600 images, 5 steps an epoch
    rows = of(run, "rung")
    assert rows[: len(before)] == before and len({row["policy"] for row in rows}) == len(rows) == 3
    assert all(row["epochs"] == 1 for row in rows) and len(of(run, "entrant")) == 2
    contest = found.contest
    assert contest is not None and contest.epochs == (1,)
    trials = {trial.number: trial for trial in found.result.front}
    ranked = {trials[entrant.trial].policy.digest: entrant.accuracies for entrant in contest.entrants}
    assert ranked == {row["policy"]: (row["accuracy"],) for row in rows}
    winner = trials[contest.entrants[0].trial]
    assert ranked[winner.policy.digest] == (max(row["accuracy"] for row in rows),)
    pairs = list(combinations([(entrant.divergence, entrant.accuracies[0]) for entrant in contest.entrants], 2))
    ties = sum(one[1] == other[1] for one, other in pairs)
    if ties < len(pairs):  # Kendall's tau-b: scores are never equal
        agree = sum(np.sign(other[0] - one[0]) * np.sign(one[1] - other[1]) for one, other in pairs)
        assert contest.kendall == pytest.approx(agree / (len(pairs) * (len(pairs) - ties)) ** 0.5)
    assert found.result.best is not None and found.replaced
    assert found.result.best.policy == winner.policy
    assert found.result.layers == api.load_result(run).layers
    stored = json.loads((run / "result.json").read_text())
    assert Contest.from_json(stored["contest"]) == contest and str(contest) in stored["notes"]
    text = (run / "report.md").read_text()
    assert f"{str(contest)[1:]}" in text and "| trial | search score | selection split after 1 |" in text
    assert not list(run.glob("finetune-*"))


def test_of_accuracies_the_best_third_goes_on_at_each_rung() -> None:
    table = np.random.default_rng(0).permutation(20).reshape(10, 2) / 20  # of ten trials, after 1 and 3 of 9 epochs
    diverged, asked = int(table[:, 0].argmax()), []

    def score(trial: TrialResult, epochs: int) -> float | None:
        asked.append((trial.number, epochs))
        return None if trial.number == diverged else float(table[trial.number, (1, 3).index(epochs)])

    trials = [TrialResult(number, "search", Policy({"a": 1 + number}), "ok") for number in range(10)]
    left, found = halved(trials, (1, 3), score)
    others = [number for number in range(10) if number != diverged]
    third = sorted(others, key=lambda number: table[number, 0])[-3:]
    assert sorted(asked) == sorted([(number, 1) for number in range(10)] + [(number, 3) for number in third])
    assert [trial.number for trial in left] == [max(third, key=lambda number: table[number, 1])]
    assert found[diverged] == [] and all(len(found[number]) == 1 + (number in third) for number in others)
    assert halved(trials, (1,), lambda trial, epochs: 0.5)[0] == trials[:4]  # of equals the first
    assert halved(trials, (1,), lambda trial, epochs: None)[0] == []


def test_where_every_training_diverges_the_run_stays(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = (run / "result.json").read_bytes()
    with pytest.raises(CompressError, match="every finalist diverged: try a lower --lr"):
        api.finetune(run, {**SETTINGS, "lr": 1e38}, finalists=2)
    assert (run / "result.json").read_bytes() == result
    assert [entry["accuracy"] for entry in of(run, "rung")] == [None, None]
