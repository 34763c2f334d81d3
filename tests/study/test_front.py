"""A front on the simulated engine: one search a budget, nothing scored twice, gone on with after a stop."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from PIL import Image

from autocomp.api import Interrupted, run_front, run_search
from autocomp.config import SearchConfig, load_config
from autocomp.errors import BudgetError, ConfigError, RunError
from autocomp.outcome import Event, TrialDone
from autocomp.study import front as fronts
from autocomp.study.front import Front, front_configs
from autocomp.study.run import Run
from autocomp.study.trial import Trials

CONFIG = SearchConfig(
    model="zoo:resnet8", data="random:3x16x16x10", engine="simulated", batch=2, calibration_images=16, search_images=32,
    selection_images=32, trials=5, baseline_trials=0, finalists=1, front=True,
)  # fmt: skip


@dataclass
class Watched:
    """An observer that remembers what was scored, and stops a search after some trials."""

    stop_after: int | None = None
    trials: int = 0

    def __call__(self, event: Event) -> None:
        self.trials += isinstance(event, TrialDone)
        if self.stop_after is not None and self.trials >= self.stop_after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def scored() -> list[str]:
    return []


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, scored: list[str]) -> Iterator[Front]:
    """Stopped in the middle of the second search, and then gone on with."""
    config = replace(CONFIG, out=str(tmp_path_factory.mktemp("front") / "run"))
    inner = Trials._score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fronts, "FRONT", (0.01, 0.7, 0.9))
        patch.setattr(
            Trials, "_score", lambda own, policy, watch: scored.append(policy.digest) or inner(own, policy, watch)
        )
        with pytest.raises(Interrupted, match=r"the same command with --out .*run$"):
            run_front(config, Watched(stop_after=7))
        made = run_front(config)
    yield made


def test_each_budget_has_a_point_and_a_looser_one_is_never_worse(found: Front) -> None:
    assert [point.budget for point in found.points] == ["0.01x", "0.7x", "0.9x"]
    unreachable, tight, loose = found.points
    assert unreachable.result is None and "below the floor" in (unreachable.reason or "")
    best = []
    for point, limit in ((tight, 0.7), (loose, 0.9)):
        assert point.result is not None and point.result.best is not None and point.result.best.latency is not None
        assert point.result.best.latency.ratio.value <= limit and point.result.predicted
        assert point.result.run == found.folder / point.budget
        trials = [trial for trial in point.result.front if trial.feasible and trial.score is not None]
        best.append(min(trial.score.divergence for trial in trials if trial.score is not None))
    assert best[1] <= best[0]
    assert not found.verified  # the simulated engine verifies nothing


def test_nothing_is_scored_twice(found: Front, scored: list[str]) -> None:
    finished = {trial.policy.digest for result in found.results for trial in result.front if trial.score is not None}
    assert finished <= set(scored)
    assert len(scored) - len(set(scored)) <= 1  # the one at hand when it was stopped
    assert sum(len(result.front) for result in found.results) > len(finished)  # some came up under both budgets


def test_it_is_written_and_what_was_finished_is_not_run_again(found: Front) -> None:
    text = (found.folder / "front.md").read_text()
    assert all(f"| {budget} |" in text for budget in ("0.01x", "0.7x", "0.9x")) and "out of reach" in text
    with Image.open(found.folder / "front.png") as picture:
        assert picture.size == (1440, 720) and len(picture.convert("RGB").getcolors(2**20) or ()) > 10
    assert json.loads((found.folder / "front.json").read_text()) == json.loads(json.dumps(found.to_json()))
    opened = [
        sum(entry["kind"] == "opened" for entry in Run.entries_of(found.folder / budget)) for budget in ("0.7x", "0.9x")
    ]
    assert opened == [1, 2]
    (found.folder / "0.25x").symlink_to(found.folder / "0.7x")
    with pytest.raises(RunError, match="other settings"):
        run_front(replace(CONFIG, out=str(found.folder)))


def test_budgets_of_a_front_are_its_own() -> None:
    both = front_configs(replace(CONFIG, budget=("4MB",)), Path("f"))
    assert [config.budget for config in both] == [(f"{limit:g}x", "4MB") for limit in fronts.FRONT]
    assert both[0].out == "f/0.25x" and fronts.FRONT[0] == 0.25 and fronts.FRONT[-1] == 0.9
    with pytest.raises(BudgetError, match="leave --budget out"):
        front_configs(replace(CONFIG, budget=("0.5x",)), Path("f"))
    assert load_config(None, {"front": True}).budget == ()
    with pytest.raises(ConfigError, match="run_front"):
        run_search(CONFIG)
