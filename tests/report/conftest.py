"""Results made up for the tests of the report; nothing in them was measured."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from autocomp.budget import Budget
from autocomp.outcome import Contender, LayerChoice, SearchResult, Trust
from autocomp.policy import INT8, Policy
from autocomp.results import Interval, LatencyEstimate, Score, TrialResult


def estimate(latency_ms: float, reference_ms: float = 21.0, statistic: str = "p50") -> LatencyEstimate:
    def around(value: float) -> Interval:
        return Interval(value, 0.99 * value, 1.01 * value)

    ratio = around(latency_ms / reference_ms)
    return LatencyEstimate(statistic, around(latency_ms), around(reference_ms), ratio, samples=120, rejected=1)


def contender(role: str, policy: Policy, latency_ms: float | None, **changes: Any) -> Contender:
    fields: dict[str, Any] = {
        "role": role,
        "policy": policy,
        "latency": None if latency_ms is None else estimate(latency_ms),
        "search_accuracy": 0.9876,
        "selection_accuracy": 0.9823,
        "test_accuracy": 0.9741,
        "test_delta": None if role == "reference" else Interval(-0.0052, -0.0131, 0.0027),
        "macs": 40_600_000 if role == "reference" else 20_100_000,
        "size_bytes": 1_090_000 if role == "reference" else 280_000,
        "verified": role != "reference",
        "evaluations": 1 if role == "reference" else 60,
    }
    return Contender(**{**fields, **changes})


def trial(number: int, role: str, draw: Random, status: str = "ok") -> TrialResult:
    ratio = 0.3 + 0.6 * draw.random()
    over = ratio / 0.5 - 1
    divergence = 0.002 / ratio**5 * (0.5 + draw.random())
    scored = status == "ok"
    return TrialResult(
        number=number,
        role=role,
        policy=Policy({"layer1.0.conv1": number + 1}),
        status="infeasible" if scored and over > 0.3 else status,
        violations=() if status == "failed" else (over,),
        objective=divergence if scored else None,
        score=Score(divergence, 1 - divergence / 10, 300) if scored and over <= 0.3 else None,
        latency_ms=21.0 * ratio,
        reference_ms=21.0,
        macs=int(40_600_000 * ratio),
        size_bytes=int(1_090_000 * ratio),
        stage="build" if status == "failed" else "done",
        error="the engine refused node conv2d_7 | and said so" if status == "failed" else None,
        seconds={"time": 0.2, "score": 0.5},
    )


@pytest.fixture
def make_result(tmp_path: Path) -> Callable[..., SearchResult]:
    """A finished search of 60 trials a role under 0.5x; keyword arguments replace fields."""
    draw = Random(7)
    front = [trial(n, role, draw) for n, role in enumerate(["search"] * 60 + ["uniform"] * 12 + ["random"] * 60)]
    front.append(trial(132, "search", draw, status="failed"))
    found = {}
    for role in ("search", "uniform", "random"):
        feasible = [t for t in front if t.role == role and t.feasible]
        found[role] = min(feasible, key=lambda t: t.objective or 0)
    best = Policy(dict(found["search"].policy.kept), frozenset({"layer3.2"}), {"conv1": INT8, "layer1.0.conv1": INT8})
    front = [*front, TrialResult(**{**_fields(found["search"]), "policy": best, "number": 133})]
    contenders = {
        "reference": contender("reference", Policy(), 21.0),
        "best": contender("best", best, 10.1),
        "uniform": contender("uniform", found["uniform"].policy, 9.8, test_accuracy=0.9511),
        "random": contender(
            "random", found["random"].policy, 10.4, verified=False, note="its upper bound is 10.504 ms, over 10.5 ms"
        ),
    }
    fields: dict[str, Any] = {
        "verified": True,
        "budgets": (Budget.parse("0.5x"),),
        "contenders": contenders,
        "trials": {"search": 62, "uniform": 12, "random": 60},
        "front": tuple(front),
        "seconds": 221.7,
        "run": tmp_path / "run",
        "notes": ("search and selection images come from the training images",),
        "device": {"name": "some-cpu-2c", "engine": "onnxruntime 1.31.1", "threads": 1, "details": {"simd": "avx2"}},
        "layers": (
            LayerChoice("conv1", 16, 16, "int8", 442_368, 442_368),
            LayerChoice("layer1.0.conv1", 16, 8, "int8", 2_359_296, 1_179_648),
            LayerChoice("layer3.2.conv1", 64, 0, "fp32", 2_359_296, 0),
        ),
        "trust": Trust(0.93, 0.78, 0.99, 12),
    }
    return lambda **changes: SearchResult(**{**fields, **changes})


def _fields(result: TrialResult) -> dict[str, Any]:
    return {name: getattr(result, name) for name in TrialResult.__dataclass_fields__}
