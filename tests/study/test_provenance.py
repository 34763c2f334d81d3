"""How a run's weights were made: the command that is named makes them again."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from autocomp import api
from autocomp.cli import main
from autocomp.config import SearchConfig
from autocomp.errors import RunError
from autocomp.report import render_card
from autocomp.study.provenance import trained_by
from autocomp.study.run import Manifest, Run
from autocomp.study.training import recipe_of

CONTEST = {"epochs": [1], "entrants": [{}, {}, {}]}


def made(folder: Path, config: SearchConfig, settings: dict[str, Any], contest: Any = None) -> dict[str, Any]:
    """A run that was trained so, as far as it matters here."""
    recipe = recipe_of(config, settings).to_json()
    with Run.create(folder, Manifest("0.1.0", config.to_json(), ["autocomp", "search"], {}, {}, {}, "verified")) as run:
        run.write("policy.json", json.dumps({"training": recipe}))
        run.record("finetune", recipe=recipe, reason="too slow", contest=CONTEST)
        run.record("finetune", recipe=recipe, reason=None, contest=contest)
    return recipe


def test_the_command_in_report_and_card_makes_the_same_weights(
    searched: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rising = iter((0.5, 0.6) * 2)
    monkeypatch.setattr("autocomp.study.finetune.accuracy_of", lambda bench, onnx: next(rising))
    settings = {"epochs": 1, "lr": 0.03, "quantization": "calibrated", "crop": 0, "weight_decay": 0.0, "batch": 32}
    assert api.finetune(run, settings, finalists=1).replaced
    card = api.export(run, ["onnx"], tmp_path / "shipped")
    assert card.training is not None and card.training["recipe"]["quantization"] == "calibrated"
    command = card.training["command"]
    assert f"$ {command}\n" in (run / "report.md").read_text() and "apply" not in (run / "report.md").read_text()
    text = render_card(card)
    assert f"$ {command}\n" in text and '"lr": 0.03' in text and "The second command trained the weights" in text
    first = Path(shutil.move(run, tmp_path / "first"))
    shutil.copytree(searched, run)
    with pytest.raises(SystemExit) as left:
        main(shlex.split(command)[1:])
    assert left.value.code == 0
    for name in ("model.onnx", "weights.safetensors"):
        assert (run / name).read_bytes() == (first / name).read_bytes() != (searched / name).read_bytes()


def test_a_search_that_trains_needs_no_second_command(tmp_path: Path) -> None:
    config = SearchConfig(finetune_epochs=3)
    recipe = made(tmp_path / "a", config, {"epochs": 3}, CONTEST)
    found = trained_by(tmp_path / "a", config)
    assert found is not None and found.command is None and found.recipe == recipe
    made(tmp_path / "b", config, {"epochs": 4, "mixup": 0.2}, CONTEST)
    found = trained_by(tmp_path / "b", config)
    assert found is not None and found.command is not None
    said = shlex.split(found.command)
    assert said[:3] == ["autocomp", "finetune", str(tmp_path / "b")]
    assert set(said[3:]) == {"--epochs=4", "--mixup=0.2", "--finalists=3"}


def test_what_has_no_flag_is_said_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "run", SearchConfig(), {"momentum": 0.8, "epochs": 2})
    found = trained_by(tmp_path / "run", SearchConfig())
    assert found is not None and found.command is not None
    calls: list[Any] = []
    monkeypatch.setattr(api, "finetune", lambda *given, **named: calls.append((given, named)))
    python, flag, code = shlex.split(found.command)
    exec(code, {})
    assert (python, flag) == ("python", "-c")
    assert calls == [((tmp_path / "run", {"epochs": 2, "momentum": 0.8}), {"finalists": 1})]


def test_untrained_and_damaged(tmp_path: Path) -> None:
    assert trained_by(tmp_path, SearchConfig()) is None
    (tmp_path / "policy.json").write_text('{"training": null}')
    assert trained_by(tmp_path, SearchConfig()) is None
    (tmp_path / "policy.json").write_text("[")
    with pytest.raises(RunError, match=r"policy\.json is damaged"):
        trained_by(tmp_path, SearchConfig())
