"""The gauge: which policies it takes, how it correlates, what it journals and never asks twice."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from autocomp.errors import EngineError
from autocomp.outcome import Event, Note, Phase, Step, Trust
from autocomp.policy import Policy
from autocomp.results import Score, Status, TrialResult
from autocomp.study.run import Manifest, Run
from autocomp.study.trust import FEWEST, POLICIES, gauge, spearman, spread_over_scores, trust_in

MANIFEST = Manifest("0.1.0", {}, [], {}, {}, {})


def trial(number: int, divergence: float, status: Status = "ok", kept: int | None = None) -> TrialResult:
    score = Score(divergence, 0.9, 10) if status == "ok" else None
    return TrialResult(number, "search", Policy({"a": kept or number + 1}), status, score=score)


@pytest.mark.parametrize("seed", range(5))
def test_spearman_is_scipys_with_ties_and_without(seed: int) -> None:
    generator = np.random.default_rng(seed)
    for first, second in (generator.normal(size=(2, 12)), generator.integers(4, size=(2, 30))):
        assert spearman(first.tolist(), second.tolist()) == pytest.approx(spearmanr(first, second).statistic)


def test_constant_scores_have_no_correlation() -> None:
    assert spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    assert trust_in([1.0] * 8, list(range(8)), 0) is None
    assert trust_in([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 0) is None


def test_the_interval_is_the_percentile_bootstraps() -> None:
    generator = np.random.default_rng(4)
    search = generator.normal(size=12)
    held_out = search + generator.normal(size=12)
    found = trust_in(search.tolist(), held_out.tolist(), seed=7)
    assert found is not None and found.policies == 12
    assert found.spearman == pytest.approx(spearmanr(search, held_out).statistic)
    other = np.random.default_rng(123)  # an independent bootstrap, of scipy's correlation
    draws = [other.integers(12, size=12) for _ in range(2000)]
    low, high = np.quantile([spearmanr(search[i], held_out[i]).statistic for i in draws], (0.025, 0.975))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.06)
    assert found.low < found.spearman < found.high
    assert found == trust_in(search.tolist(), held_out.tolist(), seed=7)


def test_policies_are_spread_from_best_to_worst_and_distinct() -> None:
    results = [trial(n, (n * 37) % 101) for n in range(60)]
    results += [trial(60, 1000.0, "failed"), trial(61, 1000.0, "infeasible"), trial(62, 0.0, kept=1)]  # kept=1 is known
    chosen = spread_over_scores(results, 12)
    found = [result.score.divergence for result in chosen if result.score]
    every = sorted((n * 37) % 101 for n in range(60))
    assert len(found) == 12 and found == sorted(found)
    assert (found[0], found[-1]) == (every[0], every[-1])
    assert np.diff([every.index(value) for value in found]).max() <= 6
    assert len({result.policy.digest for result in chosen}) == 12
    assert len(spread_over_scores(results[:5], 12)) == 5


class Workshop:
    """Stands in for trials and for the scorer on the selection split: a policy is its own file and engine."""

    def __init__(self) -> None:
        self.built: list[Policy] = []
        self.emitter = SimpleNamespace(compress=lambda policy: policy, emit=lambda compressed: compressed)
        self.backend = SimpleNamespace(build=self.build)

    @contextmanager
    def build(self, onnx: Any) -> Iterator[Policy]:
        self.built.append(onnx)
        yield onnx

    def score(self, engine: Policy) -> Score:
        return Score(100.0 - engine.kept["a"], None, 10)


def gauged(run: Run, workshop: Workshop, results: list[TrialResult], events: list[Event]) -> Trust | None:
    return gauge(workshop, results, workshop, run, 0, events.append)  # type: ignore[arg-type]


def test_a_gauge_is_bounded_journaled_and_not_repeated(tmp_path: Path) -> None:
    results = [trial(n, float(n)) for n in range(40)]
    events: list[Event] = []
    with Run.create(tmp_path / "run", MANIFEST) as run:
        first = Workshop()
        of_finalist = {"policy": results[0].policy.digest, "selection": Score(-5.0, None, 10).to_json()}
        run.record("finalists", role="search", finalists=[of_finalist])
        found = gauged(run, first, results, events)
        assert found is not None and found.policies == POLICIES
        assert len(first.built) == POLICIES == len(run.entries("trust"))
        assert found.spearman == pytest.approx(-1.0)  # the finalist's score is of another recipe, and takes no part
        again = Workshop()
        assert gauged(run, again, results, events) == found and again.built == []
    assert events[: POLICIES + 1] == [Phase("trust", POLICIES), *[Step()] * POLICIES]


def test_a_stopped_gauge_goes_on(tmp_path: Path) -> None:
    results = [trial(n, float(n)) for n in range(12)]

    class Dying(Workshop):
        def score(self, engine: Policy) -> Score:
            if len(self.built) == 5:
                raise KeyboardInterrupt
            return super().score(engine)

    with Run.create(tmp_path / "run", MANIFEST) as run, pytest.raises(KeyboardInterrupt):
        gauged(run, Dying(), results, [])
    with Run.open(tmp_path / "run") as run:
        rest = Workshop()
        found = gauged(run, rest, results, [])
        assert found is not None and found.spearman == pytest.approx(-1.0)
        assert len(rest.built) == 12 - 4


def test_a_policy_that_fails_is_left_out_and_told(tmp_path: Path) -> None:
    class Refusing(Workshop):
        def score(self, engine: Policy) -> Score:
            if engine.kept["a"] == 3:
                raise EngineError("refused")
            return super().score(engine)

    events: list[Event] = []
    with Run.create(tmp_path / "run", MANIFEST) as run:
        found = gauged(run, Refusing(), [trial(n, float(n)) for n in range(12)], events)
    assert found is not None and found.policies == 11
    assert [event.text for event in events if isinstance(event, Note)] == [
        "trust: trial 2 could not be scored again: refused"
    ]


def test_too_few_policies_cost_nothing(tmp_path: Path) -> None:
    workshop = Workshop()
    with Run.create(tmp_path / "run", MANIFEST) as run:
        assert gauged(run, workshop, [trial(n, float(n)) for n in range(FEWEST - 1)], []) is None
    assert workshop.built == []
