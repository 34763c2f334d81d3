"""Rows against compressing by hand, the cache, the stored forms, and the command from end to end."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from rich.console import Console

from autocomp import resources
from autocomp.cli import main
from autocomp.compress import compress, run, to_tensor
from autocomp.compress.recalibrate import divergence
from autocomp.config import SearchConfig
from autocomp.data import DataOptions, splits_from_objects
from autocomp.engines import initializer_bytes
from autocomp.errors import CompressError, InputError
from autocomp.models import wrap_model
from autocomp.outcome import Event, Note, Phase, Step
from autocomp.policy import FP32, INT8, Policy
from autocomp.report import print_sensitivity, write_sensitivity
from autocomp.study import starts, sweep
from autocomp.study.run import Manifest, Run
from autocomp.study.sensitivity import Sensitivity, SensitivityRow, read
from autocomp.study.sweep import QUICK, THOROUGH, measure, obtain
from autocomp.study.trial import Limits
from autocomp.study.workbench import Workbench, prepare
from tests.compress.nets import Mixed, images, trained

FEW = replace(THOROUGH, images=48)


def ignore(event: Event) -> None:
    del event


@pytest.fixture(scope="module")
def bench() -> Workbench:
    pixels = images(320, 16)
    dataset = torch.utils.data.TensorDataset(pixels, torch.arange(320) % 5)
    config = SearchConfig(calibration_images=64, batch=8)
    splits = splits_from_objects((dataset, dataset), DataOptions(calibration=64, search=64, selection=64), classes=5)
    return prepare(config, ignore, wrap_model(trained(Mixed())), splits)


@pytest.fixture(scope="module")
def found(bench: Workbench) -> Sensitivity:
    return measure(bench, FEW, ignore)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(resources, "user_cache_path", lambda name: tmp_path / "cache" / name)
    return tmp_path / "cache"


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every time that divergences are measured."""
    calls: list[int] = []
    original = sweep.divergences

    def counting(*parts: Any) -> Iterator[float]:
        calls.append(1)
        return original(*parts)

    monkeypatch.setattr(sweep, "divergences", counting)
    return calls


def policy_of(row: SensitivityRow) -> Policy:
    if row.kind == "channels":
        return Policy({row.name: row.count})
    return Policy(dropped=frozenset([row.name])) if row.kind == "branch" else Policy(precisions={row.name: INT8})


def test_there_is_one_row_for_every_choice(bench: Workbench, found: Sensitivity) -> None:
    expected = [
        (decision.kind, decision.name, option)
        for kind in ("channels", "branch", "precision")
        for decision in bench.space.decisions
        for option in decision.options
        if decision.kind == kind
        and option not in (False, FP32)
        and option != (kind == "channels" and bench.traced.graph.group_by_name[decision.name].channels)
    ]
    assert [(row.kind, row.name, row.choice) for row in found.rows] == expected
    assert {row.kind for row in found.rows} == {"channels", "branch", "precision"}


def test_rows_are_what_compressing_by_hand_gives(bench: Workbench, found: Sensitivity) -> None:
    graph, numerics = bench.traced.graph, bench.backend.capabilities().numerics
    recipe = replace(bench.recipe, recalibration="never", bias_correction="never", rounding="nearest")
    held_out = to_tensor(np.concatenate([batch for batch, _ in bench.splits.search.batches(64)])[:48])
    calibration = to_tensor(bench.images)
    assert found.images == 48
    for row in found.rows[::3]:
        policy = policy_of(row)
        module = compress(bench.traced, bench.statistics, policy, recipe, numerics, calibration).module
        expected = divergence(run(bench.traced.module, held_out), run(module, held_out))
        assert row.divergence == pytest.approx(expected, rel=1e-4, abs=1e-7)
        assert row.macs_saved == graph.macs(Policy()) - graph.macs(policy)


def test_bytes_saved_are_those_of_the_file(bench: Workbench, found: Sensitivity) -> None:
    whole = initializer_bytes(bench.reference)
    for row in found.rows[::4]:
        saved = whole - initializer_bytes(bench.emitter.skeleton(policy_of(row)))
        if row.kind == "precision":  # scales and zero points are not counted
            channels = bench.traced.graph.layer_by_name[row.name].weight_shape[0]
            assert 0 <= row.bytes_saved - saved <= 16 * channels + 64
        else:
            assert row.bytes_saved == saved


def test_a_quick_look_measures_less_and_knows_the_rest_by_the_surrogate(bench: Workbench) -> None:
    quick = measure(bench, QUICK, ignore)
    assert {row.kind for row in quick.rows} == {"channels", "branch"}
    for rows in quick.of("channels").values():
        measured = [row.count for row in rows if row.divergence is not None]
        assert rows[-1].count in measured and len(measured) <= 2  # the smallest one among them
        assert all(row.lost_output is not None for row in rows)
    assert all(row.divergence is not None for rows in quick.of("branch").values() for row in rows)


def test_the_work_bounds_the_images(bench: Workbench) -> None:
    assert measure(bench, replace(QUICK, macs=1.0), ignore).images == 32
    assert measure(bench, replace(QUICK, images=40), ignore).images == 40
    assert measure(bench, QUICK, ignore).images == 64 == len(bench.splits.search)


def test_progress_counts_the_choices(bench: Workbench) -> None:
    events: list[Event] = []
    measured = measure(bench, replace(FEW, images=32), events.append)
    assert events == [Phase("sensitivity", len(measured.rows)), *[Step()] * len(measured.rows)]


def test_a_hit_measures_nothing_and_a_torn_or_foreign_file_is_measured_again(
    bench: Workbench, cache: Path, tmp_path: Path, measuring: list[int]
) -> None:
    beside = tmp_path / "sensitivity.json"
    first = obtain(bench, QUICK, ignore, beside)
    assert len(measuring) == 1
    (cached,) = cache.rglob("*.json")
    assert obtain(bench, QUICK, ignore) == obtain(bench, QUICK, ignore, beside) == first
    cached.unlink()
    assert obtain(bench, QUICK, ignore, beside) == first and len(measuring) == 1
    for text in (cached.read_text()[:-40] if cached.exists() else "{", "[]", "{}", '{"format": 1}'):
        cached.parent.mkdir(parents=True, exist_ok=True)
        for path in (cached, beside):
            path.write_text(text)
        before = len(measuring)
        assert obtain(bench, QUICK, ignore, beside) == first and len(measuring) == before + 1
    obtain(replace(bench, recipe=replace(bench.recipe, ridge=0.1)), QUICK, ignore, beside)
    assert len(list(cache.rglob("*.json"))) == 2 and len(measuring) == 6
    assert read(beside, first.key) is None


def test_a_cache_that_cannot_be_written_is_done_without(bench: Workbench, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    assert obtain(bench, replace(QUICK, images=32), ignore).images == 32


def test_a_search_begins_without_it_when_a_choice_fails(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*parts: Any) -> Iterator[float]:
        raise CompressError("NaN in conv1")
        yield 0.0

    monkeypatch.setattr(sweep, "divergences", failing)
    events: list[Event] = []
    limits = Limits((), {}, bench.traced.graph.macs(Policy()), 1)
    with Run.create(tmp_path / "run", Manifest("0.1.0", {}, [], {}, {}, {})) as opened:
        sensitivity = starts.quick_sensitivity(bench, opened, events.append)
    policies = starts.initial_policies(bench, limits, sensitivity, ignore, 10)
    assert len(policies) == 10 and policies[0] == Policy()
    assert any(isinstance(event, Note) and "NaN in conv1" in event.text for event in events)


def test_json_and_csv_come_back(found: Sensitivity, tmp_path: Path) -> None:
    write_sensitivity(found, tmp_path)
    assert Sensitivity.from_json(json.loads((tmp_path / "sensitivity.json").read_text())) == found
    table = pd.read_csv(tmp_path / "sensitivity.csv")
    assert list(table.divergence) == pytest.approx([row.divergence for row in found.rows])
    assert list(table.columns) == list(SensitivityRow.__dataclass_fields__)
    with Image.open(tmp_path / "sensitivity.png") as picture:
        assert min(picture.size) > 300 and len(set(picture.convert("L").getdata())) > 20


@pytest.mark.parametrize("data", [[], {}, {"format": 99, "rows": []}, {"format": 1, "rows": [{"kind": "x"}]}, "text"])
def test_other_data_is_refused(data: Any) -> None:
    with pytest.raises(InputError, match="autocomp sensitivity"):
        Sensitivity.from_json(data)


def test_the_table_has_every_measured_number_and_fits(found: Sensitivity, capsys: pytest.CaptureFixture[str]) -> None:
    print_sensitivity(found, Console(width=80, highlight=False))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    for title in ("channels kept", "branch removed", "precision of the layer"):
        assert title in text
    for name, rows in found.of("channels").items():
        line = next(line for line in text.splitlines() if line.split()[:1] == [name])
        numbers = [float(cell) for cell in line.split()[1:-2]]
        assert numbers == pytest.approx([1000 * (row.divergence or 0) for row in rows], rel=0.01, abs=0.006)
    assert found.correlation is not None and f"Spearman {found.correlation:.2f}" in text


def test_nothing_to_choose_but_precision_is_drawn_too(found: Sensitivity, tmp_path: Path) -> None:
    for kind in ("branch", "precision"):
        rows = tuple(replace(row, divergence=0.0) for row in found.rows if row.kind == kind)
        write_sensitivity(replace(found, rows=rows), tmp_path)
    write_sensitivity(replace(found, rows=()), tmp_path)


def test_the_command_on_the_default_model_and_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.toml").write_text("format = 1\nkept = [0.5]\ndrop_branches = true\n")
    flags = "sensitivity zoo:resnet20 --calibration-images 64 --search-images 32 --space few.toml --json --out here"
    with pytest.raises(SystemExit) as left:
        main(flags.split())
    assert left.value.code == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed.pop("folder") == "here"
    assert json.loads((tmp_path / "here" / "sensitivity.json").read_text()) == printed
    assert {path.name for path in (tmp_path / "here").iterdir()} == {
        f"sensitivity.{end}" for end in ("csv", "json", "png")
    }
    measured = Sensitivity.from_json(printed)
    assert measured.images == 32 and len(measured.of("branch")) == 9 and measured.macs == 40_551_040
    assert all(row.divergence is not None and row.divergence >= 0 for row in measured.rows)
    documented = (Path(__file__).parents[2] / "docs" / "json.md").read_text().split("## `sensitivity`")[1]
    for name in [*printed, "folder", *printed["rows"][0]]:
        assert f"`{name}`" in documented
    with pytest.raises(SystemExit) as left:  # the folder is taken, and that is found out at once
        main(flags.split())
    assert left.value.code == 2 and "choose another --out" in capfd.readouterr().err
