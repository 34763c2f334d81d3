"""Settings: precedence of flags over files over defaults, and every kind of wrong entry."""

from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from autocomp.config import SearchConfig, default_folder, load_config, read_config
from autocomp.errors import BudgetError, ConfigError, InputError

BUDGET = {"budget": ["15ms"]}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str, name: str = "autocomp.toml") -> Path:
    path = Path(name)
    path.write_text(text)
    return path


def test_defaults_hold_where_nothing_is_given() -> None:
    assert load_config(None, BUDGET) == SearchConfig(budget=("15ms",))


def test_a_flag_beats_the_file_and_the_file_beats_the_default() -> None:
    write('trials = 7\nseed = 3\nbudget = ["0.5x", "4MB"]\n')
    config = load_config(None, {"trials": 9, "seed": None, "budget": None})
    assert (config.trials, config.seed, config.threads) == (9, 3, 1)
    assert config.budget == ("0.5x", "4MB")


def test_empty_repeatable_flag_counts_as_absent() -> None:
    write('budget = "0.5x"\n')
    assert load_config(None, {"budget": []}).budget == ("0.5x",)


def test_zero_and_false_are_values_and_not_absent() -> None:
    write("seed = 5\njson = true\nbaseline_trials = 4\n")
    config = load_config(None, {**BUDGET, "seed": 0, "json": False, "baseline_trials": 0})
    assert (config.seed, config.json, config.baseline_trials) == (0, False, 0)


def test_keys_are_flag_names_with_either_dash() -> None:
    write('baseline-trials = 4\nsearch_images = 100\nmean = [0.5, 0, 1]\nstd = [1, 1, 0.5]\nbudget = "15ms"\n')
    config = load_config(None, {})
    assert (config.baseline_trials, config.search_images) == (4, 100)
    assert config.mean == (0.5, 0.0, 1.0)


def test_a_named_file_replaces_the_one_of_the_folder() -> None:
    write("trials = 7\nseed = 3\n")
    other = write("trials = 8\n", "other.toml")
    config = load_config(other, BUDGET)
    assert (config.trials, config.seed) == (8, 0)


def test_numbers_from_a_flag_are_split_at_commas() -> None:
    assert load_config(None, {**BUDGET, "mean": "0.5, 0.25,0"}).mean == (0.5, 0.25, 0.0)


def test_the_example_file_is_valid() -> None:
    example = Path(__file__).parents[1] / "examples" / "autocomp.toml"
    assert load_config(example, {}).budget == ("0.5x", "0.5MB")


def test_every_field_goes_through_json_and_back() -> None:
    values: dict[str, Any] = {
        "budget": ("15ms", "4MB"), "mean": (0.5,), "std": (0.5,), "batch": 4, "baseline_trials": 0, "out": "here",
        "weights": "w.pt", "hardware": "board", "size": 64, "json": True,
        "exclude": ("layer3.*", "fc"),
    }  # fmt: skip
    config = SearchConfig(**values)
    plain = config.to_json()
    assert set(plain) == {field.name for field in fields(SearchConfig)}
    assert SearchConfig.from_json(plain) == config
    assert SearchConfig.from_json(SearchConfig().to_json()) == SearchConfig()


@pytest.mark.parametrize(
    ("model", "data", "batch", "expected"),
    [
        ("zoo:resnet20", "digits", None, 32),
        ("zoo:resnet20", "digits", 4, 4),
        ("zoo:resnet56", "digits", None, 1),
        ("zoo:resnet20", "npz:x.npz", None, 1),
    ],
)
def test_batch_is_32_only_for_the_default_job(model: str, data: str, batch: int | None, expected: int) -> None:
    assert SearchConfig(model=model, data=data, batch=batch).resolved_batch() == expected


def test_only_the_default_job_is_fine_tuned_unasked() -> None:
    assert SearchConfig().resolved_finetune_epochs() == 5 and SearchConfig(data="d:f").resolved_finetune_epochs() == 0
    assert [SearchConfig(finetune_epochs=epochs).resolved_finetune_epochs() for epochs in (0, 3)] == [0, 3]


def test_baselines_get_as_many_trials_as_the_search() -> None:
    assert SearchConfig(trials=7).resolved_baseline_trials() == 7
    assert SearchConfig(trials=7, baseline_trials=2).resolved_baseline_trials() == 2


def test_unknown_key_names_key_file_and_nearest() -> None:
    path = write("trails = 7\n", "mine.toml")
    with pytest.raises(ConfigError, match=r"'trails' in mine\.toml: did you mean 'trials'"):
        load_config(path, BUDGET)


def test_unknown_key_far_from_all_lists_the_keys() -> None:
    write("zzz = 7\n")
    with pytest.raises(ConfigError, match="the keys are model, weights"):
        load_config(None, BUDGET)


def test_a_key_written_both_ways_is_refused() -> None:
    write("baseline-trials = 4\nbaseline_trials = 5\n")
    with pytest.raises(ConfigError, match="given twice"):
        load_config(None, BUDGET)


@pytest.mark.parametrize(
    "line",
    [
        'trials = "7"', "trials = 7.0", "trials = true", "model = 3", "budget = 15", "budget = [1]", "mean = true",
        'mean = ["a"]', "mean = []", "mean = [nan]", "weights = false", "json = 1", "[model]\nname = 1",
    ],
)  # fmt: skip
def test_wrong_type_is_refused_and_named(line: str) -> None:
    write(line + "\n")
    key = line.strip("[").split()[0].rstrip("]")
    with pytest.raises(ConfigError, match=rf"{key} in autocomp\.toml must be "):
        load_config(None, {"budget": None} if "budget" in line else BUDGET)


@pytest.mark.parametrize(
    "flag",
    ["trials", "threads", "batch", "finalists", "wave", "size", "calibration_images", "search_images"],
)
def test_counts_below_one_are_refused(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag.replace('_', '-')} must be at least 1, not 0"):
        load_config(None, {**BUDGET, flag: 0})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"seed": -1}, "seed must be at least 0"),
        ({"finetune_epochs": -1}, "finetune-epochs must be at least 0"),
        ({"mean": "0.5,0.5", "std": "1,1,1"}, "one of each per channel"),
        ({"std": "1,0,1"}, "std must be positive"),
    ],
)
def test_values_that_make_no_sense_are_refused(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, {**BUDGET, **flags})


@pytest.mark.parametrize("budgets", [[], ["15"], ["2x"], ["15ms", "12ms"]])
def test_budgets_are_checked(budgets: list[str]) -> None:
    with pytest.raises(BudgetError):
        load_config(None, {"budget": budgets})


def test_a_command_without_budget_reads_the_same_settings() -> None:
    write("seed = 4\n")
    assert read_config(None, {"trials": 3}) == SearchConfig(seed=4, trials=3)


@pytest.mark.parametrize("content", [b"trials = ", b"\xff\xfe", b"a = 1\na = 2"])
def test_files_that_are_no_toml_are_refused(content: bytes) -> None:
    Path("autocomp.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"autocomp\.toml is not valid TOML"):
        load_config(None, BUDGET)


def test_a_named_file_must_exist() -> None:
    with pytest.raises(ConfigError, match=r"cannot read gone\.toml"):
        load_config(Path("gone.toml"), BUDGET)
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(Path(), BUDGET)


def test_every_message_is_one_line() -> None:
    for flags in ({"trials": 0}, {"nope": 1}, {"trials": "x"}, {"budget": ["?"]}):
        with pytest.raises(InputError) as raised:
            load_config(None, {**BUDGET, **flags})
        assert "\n" not in str(raised.value)


def test_default_folder_is_plain_and_free() -> None:
    config = SearchConfig(model="my.models:net", budget=("p95<15ms", "0.5xMACs"))
    now = datetime(2031, 2, 3, 4, 5, 6)
    first = default_folder(config, now)
    assert first == Path("runs/20310203-040506-net-p95-15ms-0.5xMACs")
    first.mkdir(parents=True)
    assert default_folder(config, now) == first.with_name(first.name + "-2")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"address": "auto"}, "address is for a cluster: give --executor ray"),
        ({"workers": 4}, "workers is for a cluster"),
        ({"executor": "ray", "workers": 0}, "workers must be at least 1"),
        ({"executor": "ray", "gpus_per_worker": -0.5}, "gpus-per-worker must be at least 0"),
        ({"executor": "ray", "gpus_per_worker": 1.5}, "gpus-per-worker above 1 must be a whole number"),
        ({"executor": "ray", "gpus_per_worker": "half"}, "gpus_per_worker in the flags must be a number"),
    ],
)
def test_settings_of_a_cluster_are_checked(flags: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_config(None, flags)
