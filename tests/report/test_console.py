"""The live screen and the closing table, read back as text."""

import re
from collections.abc import Callable
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from autocomp.outcome import EpochDone, Fleet, Note, Phase, SearchResult, Stage, Step, TrialDone
from autocomp.policy import Policy
from autocomp.report import LiveScreen, print_estimate, print_result
from autocomp.results import Interval, LatencyEstimate, Score, TrialResult

Make = Callable[..., SearchResult]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def shown(result: SearchResult, width: int = 100) -> str:
    console = Console(file=StringIO(), width=width, highlight=False)
    print_result(result, console)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def trial(number: int, divergence: float, *, role: str = "search", over: float = -0.1) -> TrialResult:
    return TrialResult(
        number, role, Policy({"a": number + 1}), "ok", (over,), divergence, Score(divergence, 0.95, 100), 10.0, 20.0
    )


@pytest.mark.parametrize("width", [80, 100, 120])
def test_table_fits_and_nothing_is_cut_off(make_result: Make, width: int) -> None:
    text = shown(make_result(run="run"), width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    table = text.split("\n\n")[0]
    for part in ("10.10", "10.00 to 10.20", "0.481", "0.476 to 0.486", "97.41 %", "-0.52", "-1.31 to +0.27"):
        assert part in table
    for part in ("40.6 M", "20.1 M", "1.09 MB", "0.280 MB", "p50, ms"):
        assert part in table


def test_rows_stand_in_order_with_their_state(make_result: Make) -> None:
    lines = [line[:12].strip() for line in shown(make_result()).splitlines()]
    found = [line for line in lines if line in ("uncompressed", "best found", "uniform", "random")]
    assert found == ["uncompressed", "best found", "uniform", "random"]
    assert lines[lines.index("best found") + 1] == "verified"
    assert lines[lines.index("random") + 1] == "not verified"


@pytest.mark.parametrize("verified", [True, False])
def test_a_trained_row_is_told_from_untrained_ones(make_result: Make, verified: bool) -> None:
    result = make_result(run="run")
    best = replace(result.contenders["best"], fine_tuned=True, verified=verified)
    text = shown(replace(result, verified=verified, contenders={**result.contenders, "best": best}), 80)
    lines = [line.strip() for line in text.split("\n\n")[0].splitlines()]
    assert max(map(len, text.splitlines())) <= 80
    place = next(number for number, line in enumerate(lines) if line.startswith("best found"))
    assert lines[place + 1].startswith("verified," if verified else "not verified,")
    assert lines[place + 2] == "fine-tuned" and text.count("fine-tuned") == 1
    assert lines[-1] == "uniform and random: as searched, only best found was trained"
    assert "as searched" not in shown(result)
    alone = {role: row for role, row in result.contenders.items() if role == "reference"} | {"best": best}
    assert "as searched" not in shown(replace(result, contenders=alone))


def test_search_accuracy_never_stands_beside_test_accuracy(make_result: Make) -> None:
    text = shown(make_result())
    assert "98.76" not in text and "98.23" not in text


def test_notes_counts_and_folder_are_told(make_result: Make) -> None:
    text = shown(make_result(), 200)
    assert "note: search and selection images come from the training images" in text
    assert "random: its upper bound is 10.504 ms, over 10.5 ms" in text
    assert "134 evaluations (62 search, 12 uniform, 60 random) in 3:42" in text
    assert f"run folder: {make_result().run}" in text


def test_estimates_are_labelled(make_result: Make) -> None:
    text = shown(make_result(predicted=True, verified=False), 300)
    assert text.lstrip().startswith("predicted, an estimate")
    assert "nothing is verified" in text
    assert not re.search(r"^verified", text, re.MULTILINE)


def test_a_missing_best_is_said(make_result: Make) -> None:
    result = make_result(verified=False)
    text = shown(replace(result, contenders={"reference": result.reference}, layers=()))
    assert "Nothing verified: no policy was found that meets 0.5x." in text
    assert "best found" not in text


def test_unlabelled_data_has_no_accuracy(make_result: Make) -> None:
    result = make_result()
    rows = {
        role: replace(row, search_accuracy=None, selection_accuracy=None, test_accuracy=None, test_delta=None)
        for role, row in result.contenders.items()
    }
    text = shown(replace(result, contenders=rows))
    assert "%" not in text and "points)" not in text


def test_text_of_others_is_not_taken_for_markup(make_result: Make) -> None:
    assert "note: keep [bold]brackets[/bold] [0.1, 0.2]" in shown(
        make_result(notes=("keep [bold]brackets[/bold] [0.1, 0.2]",))
    )


def screen(*, terminal: bool, width: int = 100) -> tuple[LiveScreen, StringIO]:
    file = StringIO()
    return LiveScreen(Console(file=file, force_terminal=terminal, width=width, highlight=False)), file


def test_away_from_a_terminal_lines_are_plain_and_sparse() -> None:
    live, file = screen(terminal=False)
    with live:
        live(Phase("search", 60))
        for number in range(60):
            live(Stage(number, "search", "time"))
            live(TrialDone(trial(number, 1 / (number + 1))))
        live(Note("watch out"))
    text = file.getvalue()
    assert "\x1b" not in text
    lines = text.splitlines()
    assert 8 <= len(lines) <= 14
    assert lines[0].startswith("search 6/60, ")
    assert "best 0.500x, search accuracy 95.00 %, divergence 0.167" in lines[0]
    assert "note: watch out" in lines
    assert re.fullmatch(r"search: 60 trials in .*; best 0\.500x, .*divergence 0\.0167", lines[-1])


def test_on_a_terminal_one_line_is_redrawn_under_the_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("autocomp.report.console.monotonic", lambda: now[0])
    live, file = screen(terminal=True)
    with live:
        live(Phase("search", 10))
        now[0] = 30.0
        live(TrialDone(trial(0, 0.25)))
        live(Stage(1, "search", "score"))
        live(Note("look"))
    text = ESCAPE.sub("", file.getvalue())
    assert "note: look" in text
    assert "search 1/10, 4:30 left | best 0.500x, search accuracy 95.00 %, divergence 0.250 | trial 1: score" in text


def test_live_line_is_cut_to_one_line_of_a_narrow_terminal() -> None:
    live, file = screen(terminal=True, width=40)
    with live:
        live(Phase("search", 10))
        live(TrialDone(trial(0, 0.25)))
        live(Note("look"))
    drawn = [line for line in re.split(r"[\r\n]+", ESCAPE.sub("", file.getvalue())) if line.startswith("search 1/10")]
    assert drawn and all(len(line) <= 40 for line in drawn)


def test_best_is_the_feasible_one_with_the_lowest_objective() -> None:
    live, file = screen(terminal=False)
    with live:
        live(Phase("search", 3))
        live(TrialDone(trial(0, 0.3)))
        live(TrialDone(trial(1, 0.1, over=0.2)))
        live(TrialDone(trial(2, 0.2)))
    assert "divergence 0.200" in file.getvalue().splitlines()[-1]


def test_failed_trials_count_and_have_no_best() -> None:
    live, file = screen(terminal=False)
    with live:
        live(Phase("search", 2))
        live(TrialDone(TrialResult(0, "search", Policy(), "failed", error="broken")))
    assert re.fullmatch(r"search: 1 trial in \d+ s\n", file.getvalue().splitlines(keepends=True)[-1])


@pytest.mark.parametrize(("share", "said"), [(0.417, ", device timing 42% of the time"), (None, "")])
def test_a_clusters_counts_stand_in_the_line(share: float | None, said: str) -> None:
    live, file = screen(terminal=False)
    with live:
        live(Phase("search", 20))
        live(Fleet(7, 9, 1, 2, share))
        live(TrialDone(replace(trial(0, 0.5), status="failed")))
        for number in range(1, 4):
            live(TrialDone(trial(number, 0.5)))
    counts = rf"9 trials on 7 workers, \S+/min, 1 failed{said}, 1 workers lost, 2 trials sent again"
    assert re.search(counts, file.getvalue().splitlines()[0])


def test_epochs_of_training_tell_their_loss() -> None:
    live, file = screen(terminal=False)
    with live:
        live(Phase("finetune", 9))
        live(EpochDone(1, 0.51234))
    assert file.getvalue().startswith("epoch 1: loss 0.512\n")


def test_phases_without_trials_tell_their_time() -> None:
    live, file = screen(terminal=False)
    with live:
        live(Phase("statistics"))
        live(Phase("verify", 3))
    assert re.fullmatch(r"statistics: \d+ s\nverify: \d+ s\n", file.getvalue())


def test_an_error_ends_the_screen_without_a_summary() -> None:
    live, file = screen(terminal=True)
    with pytest.raises(KeyboardInterrupt), live:
        live(Phase("search", 3))
        raise KeyboardInterrupt
    assert "search: " not in ESCAPE.sub("", file.getvalue())


def test_a_measurement_shows_bounds_and_the_ratio_only_when_compared() -> None:
    found = LatencyEstimate(
        "p95", Interval(1234.5, 1200.25, 1300.0), Interval(2000, 1990, 2010), Interval(0.617, 0.6, 0.65), 220, 2
    )
    file = StringIO()
    print_estimate(found, Console(file=file, width=100), predicted=False, compared=True)
    assert file.getvalue().splitlines() == [
        "latency p95: 1234 (1200 to 1300) ms",
        "reference: 2000 (1990 to 2010) ms",
        "ratio: 0.617 (0.600 to 0.650)",
        "runs: 220, blocks rejected for drift: 2",
    ]
    file = StringIO()
    print_estimate(found, Console(file=file, width=100), predicted=True, compared=False)
    assert file.getvalue().splitlines()[0] == "latency p95 (predicted, an estimate): 1234 (1200 to 1300) ms"
    assert "ratio" not in file.getvalue()


def test_steps_that_are_no_trials_are_counted_as_such() -> None:
    console = Console(file=StringIO(), width=100, highlight=False)
    with LiveScreen(console) as screen:
        screen(Phase("sensitivity", 20))
        for _ in range(20):
            screen(Step())
    assert isinstance(console.file, StringIO)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 10 and lines[0].startswith("sensitivity 2/20") and lines[-1] == "sensitivity: 0 s"
