"""report.md and pareto.png, read back; and the numbers in them against the result they came from."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from autocomp.budget import Budget
from autocomp.errors import RunError
from autocomp.outcome import ChoiceEffect, SearchResult
from autocomp.policy import Policy
from autocomp.report import write_front_report, write_report
from autocomp.report.markdown import render
from autocomp.report.pareto import HEIGHT_PX, WIDTH_PX, draw, non_dominated
from autocomp.report.tables import budget_rows, duration, macs, markdown_table, megabytes, significant, verdict
from autocomp.results import Interval, TrialResult
from autocomp.study.front import Front, FrontPoint

Make = Callable[..., SearchResult]


def tables(text: str) -> dict[str, list[dict[str, str]]]:
    """Heading of the section -> rows of the first table in it, by column."""
    found = {}
    for section in re.split(r"^#+ ", text, flags=re.MULTILINE)[1:]:
        title, *lines = section.splitlines()
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]
        block = [[cell.strip() for cell in row] for row in rows]
        if block:
            assert set("".join(block[1])) <= set("-:")
            end = next((n for n, row in enumerate(block[2:], 2) if row and row[0] == "---"), len(block) + 1) - 1
            assert all(len(row) == len(block[0]) for row in block[:end])
            found[title] = [dict(zip(block[0], row, strict=True)) for row in block[2:end]]
    return found


def test_report_holds_verdict_budget_and_every_contender(make_result: Make) -> None:
    result = make_result()
    text = render(result, {})
    assert text.startswith("# Compression under 0.5x\n\nVerified: within 0.5x, the best found reaches 10.10 ms (p50)")
    found = tables(text)
    (budget,) = found["Budgets"]
    assert budget == {
        "budget": "0.5x", "limit": "10.50 ms", "uncompressed fp32": "21.00 ms", "best found (upper bound)": "10.20 ms",
        "holds": "yes",
    }  # fmt: skip
    rows = {row[""]: row for row in found["Result"]}
    assert list(rows) == ["uncompressed fp32", "best found", "uniform", "random"]
    for role, label in (("best", "best found"), ("uniform", "uniform"), ("random", "random")):
        row, contender = rows[label], result.contenders[role]
        assert contender.latency is not None and contender.test_accuracy is not None
        numbers = [float(number) for number in re.findall(r"[\d.]+", row["latency p50, ms"])]
        latency = contender.latency.latency_ms
        assert numbers == pytest.approx([latency.value, latency.low, latency.high], rel=1e-3)
        assert float(row["accuracy (test)"].removesuffix(" %")) == pytest.approx(100 * contender.test_accuracy)
        assert row["status"] == ("verified" if contender.verified else "not verified")
    assert "- random: its upper bound is 10.504 ms, over 10.5 ms" in text


def test_a_trained_row_is_told_from_untrained_ones(make_result: Make) -> None:
    result = make_result()
    best = replace(result.contenders["best"], fine_tuned=True)
    trained = replace(result, contenders={**result.contenders, "best": best})
    text = render(SearchResult.from_json(json.loads(json.dumps(trained.to_json())), result.front), {})
    states = [row["status"] for row in tables(text)["Result"]]
    assert states == ["-", "verified, fine-tuned", "verified", "not verified"]
    assert "\n\nUniform and random: as searched, only best found was trained.\n\n" in text
    assert "as searched" not in render(result, {})


@pytest.mark.parametrize("fine_tuned", [True, False])
def test_a_front_says_that_its_baselines_are_not_trained(make_result: Make, tmp_path: Path, fine_tuned: bool) -> None:
    result = make_result()
    best = replace(result.contenders["best"], fine_tuned=fine_tuned)
    trained = replace(result, contenders={**result.contenders, "best": best})
    write_front_report(Front((FrontPoint("0.5x", trained), FrontPoint("0.9x", result)), tmp_path))
    text = (tmp_path / "front.md").read_text()
    assert ("at equal cost, as searched and not trained;" in text) is fine_tuned
    assert text.count("verified, fine-tuned") == fine_tuned


def test_search_accuracy_has_a_table_of_its_own(make_result: Make) -> None:
    text = render(make_result(), {})
    before, after = text.split("not to be compared with the test split's")
    assert "98.76 %" not in before and "98.76 %" in after


def test_report_tells_what_was_chosen_for_each_layer(make_result: Make) -> None:
    text = render(make_result(), {})
    rows = tables(text)["What was chosen"]
    assert [list(row.values()) for row in rows] == [
        ["`conv1`", "16 of 16", "int8", "442 k", "1.00x"],
        ["`layer1.0.conv1`", "8 of 16", "int8", "1.18 M", "0.50x"],
        ["`layer3.2.conv1`", "removed (of 64)", "-", "0", "0.00x"],
    ]
    assert "Residual branches removed: `layer3.2`." in text


def test_without_layers_the_policy_is_listed(make_result: Make) -> None:
    result = make_result(layers=())
    rows = tables(render(result, {}))["What was chosen"]
    assert {row["layer"] for row in rows} == {"`layer1.0.conv1`", "`conv1`"}
    best = result.best
    assert best is not None
    untouched = replace(best, policy=Policy())
    text = render(replace(result, contenders={**result.contenders, "best": untouched}), {})
    assert "No channel was removed, and every layer runs in fp32." in text


def test_trust_is_told_and_comes_back(make_result: Make) -> None:
    result = make_result()
    assert "## Trust\n\nThe search score ranks 12 policies as held-out images do with Spearman 0.93" in render(
        result, {}
    )
    assert SearchResult.from_json(json.loads(json.dumps(result.to_json())), result.front).trust == result.trust
    assert "Too few policies were scored" in render(make_result(trust=None), {})
    old = {key: value for key, value in result.to_json().items() if key != "trust"}  # of a run before there was one
    assert SearchResult.from_json(old, result.front).trust is None


def test_trials_are_counted_by_role_and_fate(make_result: Make) -> None:
    result = make_result()
    rows = {row["asked by"]: row for row in tables(render(result, {}))["Trials"]}
    for role, total in result.trials.items():
        own = [trial for trial in result.front if trial.role == role]
        assert int(rows[role]["evaluated"]) == total
        assert int(rows[role]["feasible"]) == sum(trial.feasible for trial in own)
        assert int(rows[role]["failed"]) == sum(trial.status == "failed" for trial in own)
        counted = [int(rows[role][key]) for key in ("feasible", "infeasible", "failed")]
        assert sum(counted) == total


def test_trials_missing_from_the_front_are_owned_up_to(make_result: Make) -> None:
    result = make_result(trials={"search": 65, "uniform": 12, "random": 60})
    rows = {row["asked by"]: row for row in tables(render(result, {}))["Trials"]}
    assert [row["not listed"] for row in rows.values()] == ["3", "0", "0"]


def test_failures_are_listed_with_stage_and_error_and_cut_at_ten(make_result: Make) -> None:
    text = render(make_result(), {})
    assert "- trial 132 (search), build: the engine refused node conv2d_7 | and said so" in text
    failed = [
        TrialResult(n, "search", Policy(), "failed", stage="time", error=f"reason {n}", log=f"failures/{n}.txt")
        for n in range(14)
    ]
    text = render(make_result(front=tuple(failed)), {})
    assert "reason 9 (`failures/9.txt`)" in text and "reason 10" not in text and "- and 4 more" in text


def test_device_versions_and_command_come_from_the_run_folder(make_result: Make, tmp_path: Path) -> None:
    result = make_result()
    manifest = {
        "command": ["/usr/bin/autocomp", "search", "--budget", "'p95<15ms'"],
        "config": {"model": "zoo:resnet20", "weights": "my weights.pt", "data": "digits"},
        "versions": {"torch": "9.9.9"},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    write_report(result, tmp_path)
    text = (tmp_path / "report.md").read_text()
    facts = {row["property"]: row["value"] for row in tables(text)["Device"]}
    assert facts == {
        "name": "some-cpu-2c", "engine": "onnxruntime 1.31.1", "threads": "1", "simd": "avx2", "torch": "9.9.9",
    }  # fmt: skip
    assert "$ autocomp search --budget 'p95<15ms'\n" in text
    assert "policy.json --model=zoo:resnet20 '--weights=my weights.pt' --data=digits\n" in text
    assert re.findall(r"!\[[^]]*\]\(([^)]*)\)", text) == ["pareto.png"]


def test_estimates_are_labelled_in_title_table_and_verdict(make_result: Make) -> None:
    text = render(make_result(predicted=True, verified=False), {})
    assert text.startswith("# Compression under 0.5x (predicted, an estimate)\n\nPredicted, an estimate")
    assert "best found (predicted)" in text
    assert {row["status"] for row in tables(text)["Result"]} == {"-", "predicted"}


def test_unverified_best_says_why(make_result: Make) -> None:
    result = make_result(verified=False)
    best = result.best
    assert best is not None
    rows = {**result.contenders, "best": replace(best, verified=False, note="p50 is over 10 ms")}
    assert verdict(replace(result, contenders=rows)).startswith("Not verified (p50 is over 10 ms): for 0.5x")


@pytest.mark.parametrize(
    ("budget", "limit", "reference", "judged", "holds"),
    [
        ("10.15ms", "10.15 ms", "21.00 ms", "10.20 ms", "no"),  # 10.1 keeps it, its upper bound does not
        ("10.25ms", "10.25 ms", "21.00 ms", "10.20 ms", "yes"),
        ("50%", "10.50 ms", "21.00 ms", "10.20 ms", "yes"),
        ("p95:15ms", "p95:15ms", "-", "-", "-"),
        ("0.3MB", "0.300 MB", "1.09 MB", "0.280 MB", "yes"),
        ("0.2xMB", "0.218 MB", "1.09 MB", "0.280 MB", "no"),
        ("20MMACs", "20.0 M", "40.6 M", "20.1 M", "no"),
        ("0.5xMACs", "20.3 M", "40.6 M", "20.1 M", "yes"),
    ],
)
def test_budgets_are_judged_by_their_bound(
    make_result: Make, budget: str, limit: str, reference: str, judged: str, holds: str
) -> None:
    (row,) = budget_rows(make_result(budgets=(Budget.parse(budget),)))
    assert (row.limit, row.reference, row.judged, row.holds) == (limit, reference, judged, holds)


@pytest.mark.parametrize("budgets", [("0.5x",), ("10ms", "4MB"), ("0.5xMB",), ("20MMACs",), ("p95:15ms",)])
def test_picture_is_a_png_of_the_stated_size_with_something_in_it(
    make_result: Make, tmp_path: Path, budgets: tuple[str, ...]
) -> None:
    path = tmp_path / "p.png"
    draw(make_result(budgets=tuple(map(Budget.parse, budgets))), path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (WIDTH_PX, HEIGHT_PX)
        colours = image.convert("RGB").getcolors(WIDTH_PX * HEIGHT_PX)
    assert colours is not None
    drawn = {colour for _, colour in colours}
    assert {(0xD5, 0x5E, 0x00), (0, 0, 0)} <= drawn  # the best found's star, the reference's mark


def test_picture_of_a_search_without_anything_scored(make_result: Make, tmp_path: Path) -> None:
    result = make_result(verified=False)
    failed = TrialResult(0, "search", Policy(), "failed", error="broken")
    only_reference = replace(result, contenders={"reference": result.reference}, front=(failed,), layers=())
    write_report(only_reference, tmp_path)
    with Image.open(tmp_path / "pareto.png") as image:
        assert image.size == (WIDTH_PX, HEIGHT_PX)
    assert "Nothing: no policy met the budget." in (tmp_path / "report.md").read_text()


def test_a_folder_that_cannot_be_written_gives_one_line(make_result: Make, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot write the report into"):
        write_report(make_result(), tmp_path / "gone")


def test_non_dominated_points_against_brute_force() -> None:
    draw_from = Random(3)
    for _ in range(50):
        points = [(draw_from.randrange(8), draw_from.randrange(8)) for _ in range(draw_from.randrange(1, 15))]
        expected = {
            p for p in points
            if not any((q[0] <= p[0] and q[1] <= p[1]) and q != p for q in points)
        }  # fmt: skip
        front = non_dominated(points)
        assert set(front) == expected
        assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(front))


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [(12.3456, 4, "12.35"), (0.0123456, 3, "0.0123"), (123456.7, 4, "123457"), (0, 4, "0"), (9.9996, 4, "10.000")],
)
def test_significant_digits_never_use_an_exponent(value: float, digits: int, expected: str) -> None:
    assert significant(value, digits) == expected


def test_units_and_durations() -> None:
    assert [macs(n) for n in (999, 442_368, 40_600_000, 4_110_000_000)] == ["999", "442 k", "40.6 M", "4.11 G"]
    assert [megabytes(n) for n in (42_000, 280_000, 1_090_000, 97_800_000)] == [
        "42.0 kB", "0.280 MB", "1.09 MB", "97.8 MB",
    ]  # fmt: skip
    assert [duration(s) for s in (0.4, 59.4, 59.6, 222, 3723)] == ["0 s", "59 s", "1:00", "3:42", "1:02:03"]


def test_cells_cannot_break_a_table() -> None:
    assert markdown_table(("a", "b"), [("x|y", "two\nlines")]).splitlines()[-1] == r"| x\|y | two lines |"


def test_every_field_of_the_json_object_is_documented(make_result: Make) -> None:
    documented = (Path(__file__).parents[2] / "docs" / "json.md").read_text()
    result = make_result()
    plain = json.loads(json.dumps(result.to_json(), allow_nan=False))
    names = set(plain) | set(plain["best"]) | set(plain["layers"][0]) | set(plain["best"]["timing"])
    names |= {f"accuracy.{key}" for key in plain["best"]["accuracy"]} | set(plain["best"]["latency_ms"])
    names |= set(plain["best"]["policy"]) | set(plain["best"]["ratio"])
    names.remove("accuracy")  # its parts are documented
    missing = {name for name in names if f"`{name}`" not in documented}
    assert not missing


EFFECTS = (
    ChoiceEffect("channels", "layer1.0.conv1", "8 of 16", Interval(0.42, 0.4, 0.44), 0.0123, True, 1_179_648),
    ChoiceEffect("precision", "fc", "int8", Interval(-0.03, -0.04, -0.02), None, False, 0),
    ChoiceEffect("branch", "layer3.2", "removed", None, 0.5, False, 4_718_592),
)


def test_choices_are_explained_in_table_picture_and_json(make_result: Make, tmp_path: Path) -> None:
    result = make_result(effects=EFFECTS)
    write_report(result, tmp_path)
    text = (tmp_path / "report.md").read_text()
    rows = tables(text)["What each choice saves and costs"]
    assert [row["saves, ms (predicted)"] for row in rows] == ["+0.420", "-0.030", "-"]
    assert [row["costs alone, divergence / 1000"] for row in rows] == ["12.3", "-", "~ 500"]
    assert "fc: int8 here costs +0.030 ms" in text and "choices.png" in text
    with Image.open(tmp_path / "choices.png") as picture:
        assert picture.format == "PNG" and len(set(picture.convert("RGB").getdata())) > 10
    again = SearchResult.from_json(json.loads(json.dumps(result.to_json())), result.front)
    assert again.effects == EFFECTS
    old = {key: value for key, value in result.to_json().items() if key != "choices"}
    assert SearchResult.from_json(old, result.front).effects == ()
    assert "What each choice saves" not in render(make_result(), {})
