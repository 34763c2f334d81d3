"""Budgets as limits, and finalists: a fixed order, at most K, never asked twice."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autocomp.budget import parse_budgets
from autocomp.engines import BackendSpec, estimate, merge
from autocomp.outcome import Contender, Event, Note
from autocomp.policy import Policy
from autocomp.results import Block, Interval, LatencyEstimate, Score, Timing, TrialResult
from autocomp.study import finalists, verify
from autocomp.study.finalists import Finalist
from autocomp.study.run import Manifest, Run
from autocomp.study.steady import Patience
from autocomp.study.trial import Limits
from autocomp.study.verify import (
    Verdict,
    reference_latency,
    statistics_of,
    verification_protocol,
    verify_role,
    verify_roles,
)

BUDGETS = parse_budgets(["15ms", "p95:0.5x", "20MMACs", "0.25xMB"])


def ignore(event: Event) -> None:
    del event


def limits(goal: str = "accuracy") -> Limits:
    return Limits(BUDGETS, {"p50": 20.0, "p95": 30.0}, 40_000_000, 1_000_000, goal, accuracy=0.9)  # type: ignore[arg-type]


def test_violations_are_value_over_limit_minus_one() -> None:
    found = limits().violations(ratio=0.6, macs=30_000_000, size_bytes=200_000)
    assert found == pytest.approx((0.6 * 20 / 15 - 1, 0.6 / 0.5 - 1, 30 / 20 - 1, 0.2 / 0.25 - 1))


def test_speed_constrains_accuracy_to_one_point_and_minimises_latency() -> None:
    speed = limits("speed")
    assert speed.objective(Score(0.3, 0.8, 10), ratio=0.7) == 0.7
    assert limits().objective(Score(0.3, 0.8, 10), ratio=0.7) == 0.3
    within, beyond = speed.loss(Score(0.3, 0.895, 10)), speed.loss(Score(0.3, 0.88, 10))
    assert within == pytest.approx((-0.5,)) and beyond == pytest.approx((1.0,))
    assert limits().loss(Score(0.3, 0.1, 10)) == ()


@pytest.mark.parametrize(("statistic", "samples"), [("p50", 30), ("p95", 200), ("p99", 1000)])
def test_the_protocol_takes_the_samples_that_the_statistic_asks_for(statistic: str, samples: int) -> None:
    protocol = verification_protocol((statistic,))
    assert protocol.builds >= 3
    assert protocol.builds * protocol.blocks * protocol.min_repeats >= samples


def test_statistics_come_from_the_latency_budgets() -> None:
    assert statistics_of(BUDGETS) == ("p50", "p95")
    assert statistics_of(parse_budgets(["4MB"])) == ("p50",)


def test_the_tightest_latency_budget_bounds_the_ratio() -> None:
    def bound(*budgets: str, goal: Any = "accuracy") -> float | None:
        return Limits(parse_budgets(budgets), {"p50": 20.0, "p95": 30.0}, 1, 1, goal).ratio

    assert bound("0.5x") == 0.5 and bound("15ms", "p95:15ms", "4MB") == 0.5 and bound("0.9x", "5ms") == 0.25
    assert bound("4MB") is None  # there every latency will do
    assert bound("0.5x", goal="speed") is None  # the ratio itself is wanted


def test_the_reference_has_a_median_too_where_another_statistic_is_budgeted() -> None:
    blocks = tuple(Block(build, (0.5,) * 9 + (0.7,), (1.0,) * 9 + (3.0,)) for build in range(5) for _ in range(8))
    latency = reference_latency(estimate(Timing(blocks), "p95"))
    row = Contender("reference", Policy(), latency, 0.9, 0.9, 0.9, None, 5, 1000, False, 0)
    found = row.to_json()["latency_ms"]
    assert found["p50"] == 1.0 and found["p95"] == found["high"] == 3.0


def finalist(number: int) -> Finalist:
    policy = Policy({"g": number + 1})
    return Finalist(TrialResult(number, "search", policy, "ok", (-0.1,), 0.1, macs=5), Score(0.1, 0.9, 10))


def verdict(admitted: bool) -> Verdict:
    one = Interval(1.0, 0.9, 1.1)
    return Verdict(admitted, LatencyEstimate("p50", one, one, one, 100), 77, None if admitted else "too slow")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Run.create(tmp_path / "run", Manifest("0.1.0", {}, [], {}, {}, {})) as opened:
        yield opened


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, run: Run) -> Any:
    """Verify finalists against scripted measurements; returns the winner and who was measured."""

    def go(script: list[bool], attempts: int, count: int = 5) -> tuple[int | None, bool | None, list[int]]:
        measured: list[int] = []

        def admit(onnx: bytes, *_: object) -> Verdict:
            measured.append(int(onnx))
            return verdict(script[int(onnx)])

        monkeypatch.setattr(verify, "admit", admit)
        emitter = SimpleNamespace(finish=lambda policy: policy, emit=lambda p: str(p.kept["g"] - 1).encode())
        trials: Any = SimpleNamespace(emitter=emitter, backend=None, limits=limits(), current=limits)
        patience = Patience(ignore)
        several = [finalist(number) for number in range(count)]
        found = verify_role(run, trials, several, b"", BackendSpec(), attempts, patience, ignore)
        return (None, None, measured) if found is None else (found[0].trial.number, found[1].admitted, measured)

    return go


def test_the_first_admitted_finalist_wins_and_no_later_one_is_measured(ask: Any) -> None:
    assert ask([False, True, True, True, True], attempts=3) == (1, True, [0, 1])


def test_at_most_k_finalists_are_measured(ask: Any) -> None:
    assert ask([False, False, False, True, True], attempts=3) == (2, False, [0, 1, 2])


def test_a_finalist_that_failed_is_not_measured_again_until_it_passes(ask: Any) -> None:
    assert ask([False, False, False, False, False], attempts=2) == (1, False, [0, 1])
    assert ask([True, True, True, True, True], attempts=2) == (1, False, [])


def test_no_finalist_no_winner(ask: Any) -> None:
    assert ask([], attempts=3, count=0) == (None, None, [])


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Select among trials of given latency ratios, the best first, by exact timings, then one more; their numbers."""

    def go(ratios: list[float], count: int, slower: float = 1.0) -> list[list[int]]:
        results = [
            TrialResult(
                number, "search", Policy({"g": number + 1}), "ok", (ratio / 0.5 - 1,), objective=float(number),
                latency_ms=10 * ratio, reference_ms=10.0, macs=1, size_bytes=1,
            )
            for number, ratio in enumerate(ratios)
        ]  # fmt: skip
        bounds = Limits(parse_budgets(["0.5x"]), {"p50": 10.0}, 1, 1)
        numbered = {result.policy: result.number for result in results}
        emitter = SimpleNamespace(skeleton=numbered.get, finish=numbered.get, emit=lambda number: number)
        backend = SimpleNamespace(build=nullcontext)
        trials: Any = SimpleNamespace(emitter=emitter, backend=backend, limits=bounds, current=lambda: bounds)
        selection: Any = SimpleNamespace(score=lambda number: Score(float(number), 0.9, 10))
        patience: Any = SimpleNamespace(measure=lambda take, _: timing(10.0, 10 * slower * ratios[take.args[1]]))
        monkeypatch.setattr(finalists, "initializer_bytes", lambda _: 1)
        chosen = finalists.select(trials, results, selection, count, patience, ignore)
        more = finalists.reserve(trials, results, chosen, selection, patience, ignore)
        return [[found.trial.number for found in part] for part in (chosen, more)]

    return go


@pytest.mark.parametrize(
    ("ratios", "count", "expected"),
    [
        ([0.49, 0.48, 0.47, 0.40], 2, [[0, 1], [3]]),  # the reserve has a tenth to spare
        ([0.49, 0.40, 0.48, 0.39], 2, [[0, 1], [3]]),  # another than those tried
        ([0.49, 0.47, 0.48, 0.46], 2, [[0, 1], [3]]),  # half of it
        ([0.49, 0.495, 0.498, 0.496], 2, [[0, 1], [2]]),  # none has any
        ([0.55, 0.49, 0.40], 1, [[1], [2]]),  # what is over the budget leaves its place
        ([0.49], 1, [[0], []]),
    ],
)
def test_the_reserve_has_room_for_a_slower_device(
    choose: Any, ratios: list[float], count: int, expected: list[list[int]]
) -> None:
    assert choose(ratios, count) == expected


def test_where_trials_at_the_limit_are_over_it_those_with_as_much_room_come_next(choose: Any) -> None:
    """A device that runs 2 % slower than in the trials would fail the hundred best of them one after another."""
    ratios = [0.499] * 100 + [0.48, 0.495, 0.485]
    assert choose(ratios, 2, slower=1.02) == [[100, 102], []]


def test_the_reserve_is_tried_when_none_is_admitted_and_a_resumed_run_chooses_nothing_anew(
    monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    everyone = [finalist(number) for number in range(4)]
    measured: list[int] = []

    def select(trials: Any, results: Any, selection: Any, count: int, *_: object) -> list[Finalist]:
        return everyone[: count if results else 0]

    def reserve(trials: Any, results: Any, tried: list[Finalist], *_: object) -> list[Finalist]:
        return everyone[len(tried) :][:1] if results else []

    def admit(onnx: bytes, *_: object) -> Verdict:
        measured.append(int(onnx))
        return verdict(onnx == b"2")

    for name, stand_in in (("select", select), ("reserve", reserve), ("admit", admit)):
        monkeypatch.setattr(verify, name, stand_in)
    emitter = SimpleNamespace(finish=lambda policy: policy, emit=lambda p: str(p.kept["g"] - 1).encode())
    trials: Any = SimpleNamespace(emitter=emitter, backend=None, limits=limits(), current=limits)
    study: Any = SimpleNamespace(of=lambda role: [f.trial for f in everyone] if role == "search" else [])
    bench: Any = SimpleNamespace(config=SimpleNamespace(finalists=3), reference=b"", spec=BackendSpec())
    for _ in range(2):
        found = verify_roles(bench, trials, study, None, run, ignore)  # type: ignore[arg-type]
        assert [(role, f.trial.number, v.admitted) for role, (f, v) in found.items()] == [("best", 2, True)]
        assert measured == [0, 1, 2]
    kept = [len(entry["finalists"]) for entry in run.entries("finalists") if entry["role"] == "search"]
    assert kept == [2, 1]


def timing(reference_ms: float, candidate_ms: float = 5.0) -> Timing:
    return Timing(tuple(Block(0, (candidate_ms,) * 3, (reference_ms,) * 3) for _ in range(4)))


def test_a_busy_device_is_waited_for_and_what_it_measured_is_thrown_away() -> None:
    found, pauses, told = iter([13.0, 18.0, 10.5, 99.0]), [], []
    patience = Patience(told.append, (1.0, 2.0, 4.0), pauses.append)
    kept = patience.measure(lambda: timing(next(found)), usual_ms=10.0)
    assert kept == timing(10.5)
    assert pauses == [1.0, 2.0]
    assert all(isinstance(event, Note) and "instead of 10.0 ms" in event.text for event in told)


def test_a_faster_device_is_not_waited_for() -> None:
    assert Patience(ignore, (1.0,), pytest.fail).measure(lambda: timing(7.0), usual_ms=10.0) == timing(7.0)


def test_waiting_ends_and_the_last_measurement_counts() -> None:
    pauses: list[float] = []
    patience = Patience(ignore, (1.0, 2.0), pauses.append)
    assert patience.measure(lambda: timing(20.0), usual_ms=10.0) == timing(20.0)
    assert patience.measure(lambda: timing(20.0), usual_ms=10.0) == timing(20.0)
    assert pauses == [1.0, 2.0]


@pytest.mark.parametrize(
    ("references_ms", "budget", "reason"),
    [((10.0, 12.0, 14.0), "0.9x", "only 1 fresh builds of 5"), ((10.0,) * 5, "p95:0.9x", "not enough samples")],
)
def test_a_finalist_is_not_judged_on_too_little(
    monkeypatch: pytest.MonkeyPatch, references_ms: tuple[float, ...], budget: str, reason: str
) -> None:
    builds = [
        Timing(tuple(Block(build, (5.0,) * 3, (reference,) * 3) for _ in range(12)))
        for build, reference in enumerate(references_ms)
    ]
    monkeypatch.setattr(verify, "measure_fresh", lambda *_: merge(builds, 0.1))
    monkeypatch.setattr(verify, "initializer_bytes", len)
    bounds = Limits(parse_budgets([budget]), {"p50": 10.0, "p95": 10.0}, 1, 1)
    backend: Any = SimpleNamespace(measures=True)
    found = verify.admit(
        b"", b"", BackendSpec(), backend, bounds, 1, 0.98, verification_protocol(("p50",)), Patience(ignore, ())
    )
    assert not found.admitted and reason in (found.reason or "")
