import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocomp.budget import Budget, parse_budgets
from autocomp.errors import BudgetError

limits = st.floats(1e-6, 1e12)
fractions = st.floats(1e-6, 1.0)
budgets = st.one_of(
    st.builds(Budget, st.just("latency"), limits, st.just(False), st.sampled_from(["p50", "p95", "p99"])),
    st.builds(Budget, st.just("latency"), fractions, st.just(True), st.sampled_from(["p50", "p95", "p99"])),
    st.builds(Budget, st.sampled_from(["size", "macs"]), limits, st.just(False)),
    st.builds(Budget, st.sampled_from(["size", "macs"]), fractions, st.just(True)),
)


@given(budgets)
def test_text_and_json_round_trip(budget: Budget) -> None:
    assert Budget.parse(str(budget)) == budget
    assert Budget.from_json(budget.to_json()) == budget


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("15ms", Budget("latency", 15.0, False, "p50")),
        ("900us", Budget("latency", 0.9, False, "p50")),
        ("900µs", Budget("latency", 0.9, False, "p50")),
        ("900μs", Budget("latency", 0.9, False, "p50")),
        ("0.015s", Budget("latency", 15.0, False, "p50")),
        (" .5 x ", Budget("latency", 0.5, True, "p50")),
        ("50%", Budget("latency", 0.5, True, "p50")),
        ("p95<15ms", Budget("latency", 15.0, False, "p95")),
        ("P99<=15MS", Budget("latency", 15.0, False, "p99")),
        ("p95:0.5x", Budget("latency", 0.5, True, "p95")),
        ("4MB", Budget("size", 4e6)),
        ("4e6B", Budget("size", 4e6)),
        ("20MMACs", Budget("macs", 20e6)),
        ("0.5xMACs", Budget("macs", 0.5, True)),
        ("0.5xmb", Budget("size", 0.5, True)),
        ("1x", Budget("latency", 1.0, True, "p50")),
    ],
)
def test_what_can_be_written(text: str, expected: Budget) -> None:
    assert Budget.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("2x", "0.5x"),
        ("150%", "at most 1x"),
        ("0ms", "positive"),
        ("1e999ms", "positive"),
        ("-3ms", "cannot read"),
        ("nanms", "cannot read"),
        ("15", "no unit"),
        ("15parsec", "unknown unit 'parsec'"),
        ("p42<15ms", "p42"),
        ("p95<4MB", "only latency"),
        ("", "cannot read"),
        ("fast", "cannot read"),
        ("15ms 4MB", "cannot read"),
    ],
)
def test_what_cannot(text: str, complaint: str) -> None:
    with pytest.raises(BudgetError, match=complaint) as caught:
        Budget.parse(text)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=12))
def test_no_text_brings_another_error(text: str) -> None:
    try:
        Budget.parse(text)
    except BudgetError as error:
        assert "\n" not in str(error).replace(text, "")


@given(budgets, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_a_violation_is_positive_exactly_beyond_the_limit(budget: Budget, value: float, reference: float) -> None:
    limit = budget.limit * reference if budget.relative else budget.limit
    violation = budget.violation(value, reference)
    assert violation == pytest.approx((value - limit) / limit, rel=1e-9, abs=1e-9)
    assert budget.violation(limit, reference) == 0


@pytest.mark.parametrize(
    "data",
    [
        {"metric": "joules", "limit": 1.0},
        {"metric": "latency", "limit": 1.0, "statistic": "p42"},
        {"metric": "latency", "limit": 1.0},
        {"metric": "size", "limit": 1.0, "statistic": "p50"},
        {"metric": "size"},
        {"metric": "size", "limit": "4MB"},
        {"metric": "size", "limit": 1.0, "unit": "MB"},
        {"metric": "size", "limit": float("nan")},
    ],
)
def test_wrong_data_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(BudgetError):
        Budget.from_json(data)


def test_several_budgets() -> None:
    assert [str(budget) for budget in parse_budgets(["15ms", "0.5x", "p95:15ms", "4MB"])] == [
        "15ms",
        "0.5x",
        "p95:15ms",
        "4MB",
    ]
    with pytest.raises(BudgetError, match="same thing"):
        parse_budgets(["15ms", "0.02s"])
    with pytest.raises(BudgetError, match="no budget"):
        parse_budgets([])
