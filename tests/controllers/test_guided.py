"""The guided controller on problems whose answer is known."""

from dataclasses import replace

import numpy as np
import pytest

from autocomp import controllers
from autocomp.controllers import Knowledge, make_controller
from autocomp.controllers.guided import DOUBT, NOISE, Beliefs
from autocomp.policy import Policy
from autocomp.protocols import Controller
from autocomp.results import Score, TrialResult
from tests.controllers.problem import Problem, best, policy_space


def guided(problem: Problem, knowledge: Knowledge, seed: int = 0) -> Controller:
    return make_controller("guided", problem.space, seed, (), knowledge)


def misled(problem: Problem, seed: int) -> Knowledge:
    """Losses that are off by a factor of their own for every decision: 2.7 up or down in a third of the cases."""
    rng = np.random.default_rng(seed)
    known = problem.knowledge()
    wrong = tuple(row * np.exp(rng.normal()) for row in known.problem.losses)
    return replace(known, problem=controllers.Problem(wrong, known.problem.costs, known.problem.tied))


@pytest.mark.parametrize("seed", range(3))
def test_the_first_proposal_is_the_optimum_where_all_is_known(seed: int) -> None:
    problem = Problem.drawn(policy_space(blocks=2, kept=(1.0, 0.75, 0.5)), seed, limit=0.6)
    (policy,) = guided(problem, problem.knowledge()).ask(1)
    divergence, ratio = problem.judge(policy)
    assert ratio <= 0.6 and divergence == pytest.approx(problem.optimum(), rel=2e-3)


def test_it_learns_which_losses_it_was_told_wrong() -> None:
    space = policy_space(blocks=4)
    gained, behind = [], []
    for seed in range(5):
        problem = Problem.drawn(space, seed, limit=0.5)
        found = problem.search(guided(problem, misled(problem, seed), seed), 40)
        known = best(problem.search(guided(problem, problem.knowledge(), seed), 1))
        gained.append(best(found) / best(found[:1]))
        behind.append(best(found) / known)
    assert np.median(gained) < 0.9
    assert np.median(behind) < 1.15


def test_it_corrects_a_latency_that_is_predicted_wrong() -> None:
    """Predictions 15 % too low: the first proposals miss the budget, later ones hold it and use it."""
    problem = Problem.drawn(policy_space(blocks=4), seed=1, limit=0.6)
    known = problem.knowledge()
    factors = tuple(controllers.Factor(f.decisions, 0.85 * f.costs) for f in known.problem.costs[0])
    wrong = replace(
        known,
        problem=controllers.Problem(known.problem.losses, (factors,), known.problem.tied),
        costs=lambda policy: (0.85 * problem.judge(policy)[1],),
    )
    results = problem.search(guided(problem, wrong), 24, wave=4)
    assert sum(result.feasible for result in results[:4]) <= 1
    assert sum(result.feasible for result in results[4:]) >= 15
    assert max(result.ratio or 0 for result in results if result.feasible) > 0.57


def test_where_the_budget_holds_already_it_looks_for_the_fastest_that_keeps_the_accuracy() -> None:
    problem = Problem.drawn(policy_space(blocks=3), seed=2, limit=1.0)
    controller = guided(problem, replace(problem.knowledge(), speed=True))
    allowed = 0.05

    def judged(number: int, policy: Policy) -> TrialResult:
        divergence, ratio = problem.judge(policy)
        return TrialResult(
            number, "search", policy, "ok", (ratio - 1, divergence / allowed - 1), objective=ratio,
            score=Score(divergence, 1 - divergence, 100), latency_ms=ratio, reference_ms=1.0,
        )  # fmt: skip

    results: list[TrialResult] = []
    for _ in range(6):
        wave = [judged(len(results) + place, policy) for place, policy in enumerate(controller.ask(4))]
        controller.tell(wave)
        results += wave
    fastest = min(result.ratio or 1.0 for result in results if result.feasible)
    faster = guided(problem, replace(problem.knowledge(), limits=(fastest - 0.03,))).ask(1)
    assert problem.judge(faster[0])[0] > allowed, "a policy 3 points faster would have kept the accuracy"


def test_divergences_of_very_different_size_leave_beliefs_that_can_be_drawn_from() -> None:
    """A network of random weights loses almost nothing by some choices and everything by others."""
    losses = tuple(np.array([0.0, 10.0**-k]) for k in range(12))
    scored = [(tuple(int(k == j) for k in range(12)), 10.0 ** (-14 + j)) for j in range(12)]
    beliefs = Beliefs(losses, scored)
    draw = beliefs.draw(np.random.default_rng(0))
    assert np.isfinite(draw).all() and (draw > 0).all()


def test_beliefs_are_those_of_a_bayesian_linear_regression() -> None:
    """Against the textbook's closed form (Bishop 2006, equations 3.53 and 3.54)."""
    rng = np.random.default_rng(0)
    losses = tuple(np.array([0.0, value]) for value in rng.uniform(0.5, 2, 5))
    chosen = [tuple(row) for row in rng.integers(0, 2, (20, 5)).tolist() if any(row)]
    scored = [(row, float(np.exp(rng.normal(0, 0.3)) * sum(losses[d][c] for d, c in enumerate(row)))) for row in chosen]
    rows = np.array([[losses[d][c] for d, c in enumerate(row)] for row, _ in scored])
    found = np.array([value for _, value in scored])
    features = rows * np.exp(np.median(np.log(found / rows.sum(1)))) / found[:, None]
    covariance = np.linalg.inv(features.T @ features / NOISE**2 + np.eye(5) / DOUBT**2)
    mean = covariance @ (features.sum(0) / NOISE**2 + np.ones(5) / DOUBT**2)
    beliefs = Beliefs(losses, scored)
    np.testing.assert_allclose(beliefs.mean, np.maximum(mean, 0.05), rtol=1e-6)
    np.testing.assert_allclose(beliefs._factor @ beliefs._factor.T, covariance, rtol=1e-6, atol=1e-12)
