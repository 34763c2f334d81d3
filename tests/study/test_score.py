"""Divergence and paired intervals against independent formulas."""

import numpy as np
import pytest
import torch

from autocomp.budget import parse_budgets
from autocomp.errors import ConfigError, EngineError
from autocomp.study.score import Predictions, Scorer, kl_divergence, load_metric, paired_interval
from autocomp.study.trial import Limits

RANDOM = np.random.default_rng(0)


def test_kl_agrees_with_torch() -> None:
    first, second = RANDOM.normal(size=(2, 50, 10)).astype(np.float32)
    expected = torch.nn.functional.kl_div(
        torch.log_softmax(torch.from_numpy(first).double(), 1),
        torch.softmax(torch.from_numpy(second).double(), 1),
        reduction="batchmean",
    )
    assert kl_divergence(first, second, np.zeros(50, np.int64)) == pytest.approx(float(expected), rel=1e-9)
    assert kl_divergence(second, second, np.zeros(50, np.int64)) == 0.0


def predictions(correct: np.ndarray) -> Predictions:
    logits = np.zeros((len(correct), 2), np.float32)
    logits[np.arange(len(correct)), np.where(correct, 0, 1)] = 1
    return Predictions(logits, np.zeros(len(correct), np.int64))


def test_paired_interval_covers_the_true_difference() -> None:
    covered = 0
    for _ in range(1000):
        cell = RANDOM.choice(4, p=[0.85, 0.05, 0.03, 0.07], size=400)  # both, reference only, found only, none
        interval = paired_interval(predictions((cell == 0) | (cell == 2)), predictions(cell <= 1))
        covered += interval.low <= -0.02 <= interval.high
    assert 930 <= covered <= 975


def test_paired_interval_has_a_width_when_nothing_differs() -> None:
    same = predictions(np.ones(500, bool))
    interval = paired_interval(same, same)
    assert interval.value == 0.0
    assert -0.01 < interval.low < 0 < interval.high < 0.01


def test_score_counts_accuracy_and_agreement() -> None:
    reference, found = predictions(np.array([1, 1, 1, 0], bool)), predictions(np.array([1, 0, 1, 0], bool))
    score = Scorer(split=None, reference=reference, labelled=True).of(found)  # type: ignore[arg-type]
    assert (score.accuracy, score.agreement, score.images) == (0.5, 0.75, 4)
    assert Scorer(split=None, reference=reference, labelled=False).of(found).accuracy is None  # type: ignore[arg-type]


def test_agreement_is_counted_where_outputs_are_logits_alone() -> None:
    """With a metric of the user's and no labels nothing says that the largest output means anything."""
    reference, found = predictions(np.array([1, 1], bool)), predictions(np.array([1, 0], bool))

    def distance(outputs: np.ndarray, uncompressed: np.ndarray, places: np.ndarray) -> float:
        return float(np.abs(outputs - uncompressed).sum() + places[0])

    own = Scorer(None, reference, False, distance).of(found)  # type: ignore[arg-type]
    assert (own.divergence, own.accuracy, own.agreement) == (2.0, None, None)
    labelled = Scorer(None, reference, True, distance).of(found)  # type: ignore[arg-type]
    assert (labelled.divergence, labelled.accuracy, labelled.agreement) == (2.0, 0.5, 0.5)


@pytest.mark.parametrize(
    ("budgets", "idle"),
    [(["11ms"], True), (["9ms"], False), (["0.5x"], False), (["11ms", "3MB"], True), (["11ms", "1MB"], False)],
)
def test_limits_that_the_uncompressed_engine_keeps_are_idle(budgets: list[str], idle: bool) -> None:
    assert Limits(parse_budgets(budgets), {"p50": 10.0}, 10**6, 2 * 10**6).idle == idle


def test_a_metric_that_is_not_finite_is_refused() -> None:
    same = predictions(np.ones(4, bool))
    scorer = Scorer(None, same, True, lambda outputs, reference, labels: float("nan"))  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="nan"):
        scorer.of(same)


@pytest.mark.parametrize("spec", ["no_such_module:f", "math:no_such", "math", "math:pi"])
def test_unknown_metrics_are_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="metric"):
        load_metric(spec)
