"""A finished run fine-tuned: what changes in its folder, what does not, and what is refused."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.numpy import load, save

from autocomp import api
from autocomp.api import delivering, searching
from autocomp.config import SearchConfig
from autocomp.data.preprocess import IMAGENET
from autocomp.engines import structure_digest
from autocomp.engines.simulated import SimulatedBackend
from autocomp.errors import ConfigError, DataError, EngineError, InputError, RunError
from autocomp.outcome import Note, Observer, Phase, Step
from autocomp.study import front
from autocomp.study.conduct import Interrupted
from autocomp.study.run import Run
from autocomp.study.verify import Verdict
from autocomp.train import Training, TrainingRecipe, Tuned, finetune
from autocomp.train.maps import stages, tapped
from tests.study import tiny

GENTLE = {"epochs": 6, "lr": 0.05, "flip": 0.0, "crop": 0, "distillation": 0.1}


def contents(run: Path) -> dict[str, bytes]:
    """Of a run's files, but for its journal and the states of trainings."""
    own = [path for path in run.iterdir() if path.is_file() and path.suffix not in (".jsonl", ".pt")]
    return {path.name: path.read_bytes() for path in own}


def accuracy(run: Path) -> float:
    pixels, labels = tiny.images(400, 1)
    options = onnxruntime.SessionOptions()  # nothing fused: the described device's int8, whatever this processor's
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(run / "model.onnx", options, providers=["CPUExecutionProvider"])
    mean, std = np.float32(IMAGENET.mean), np.float32(IMAGENET.std)
    (logits,) = session.run(None, {"input": ((pixels / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)})
    return float((logits.argmax(axis=1) == labels).mean())


@pytest.mark.parametrize("quantization", ["learned", "calibrated"])
def test_a_better_model_takes_the_runs_place(run: Path, quantization: str) -> None:
    before, files = api.load_result(run), contents(run)
    events: list[Any] = []
    found = api.finetune(run, {**GENTLE, "quantization": quantization}, events.append)
    assert found.replaced and found.reason is None and len(found.losses) == 6 and found.losses[-1] < found.losses[0]
    (phase,) = [event for event in events if isinstance(event, Phase) and event.name == "finetune"]
    assert phase.total == sum(isinstance(event, Step) for event in events)
    now = api.load_result(run)
    assert now.best is not None and before.best is not None and now.best == found.result.best
    assert now.best.policy == before.best.policy and now.best.size_bytes == before.best.size_bytes
    assert now.best.test_accuracy is not None and before.best.test_accuracy is not None
    assert found.change is not None and found.change.value > 0
    assert now.best.test_accuracy - before.best.test_accuracy == pytest.approx(found.change.value)
    assert now.best.test_accuracy == pytest.approx(accuracy(run), abs=0.01)
    assert now.predicted and not now.verified  # the engine only estimates
    model, shipped = (run / "model.onnx").read_bytes(), json.loads((run / "policy.json").read_text())
    assert shipped["onnx_sha256"] == hashlib.sha256(model).hexdigest()
    assert shipped["training"]["epochs"] == 6 and shipped["training"]["quantization"] == quantization
    assert shipped["policy"]["precisions"]
    assert structure_digest(model) == structure_digest(files["model.onnx"]) and model != files["model.onnx"]
    old, new = load(files["weights.safetensors"]), load((run / "weights.safetensors").read_bytes())
    assert {n: a.shape for n, a in old.items()} == {n: a.shape for n, a in new.items()}
    for path in (run / "untuned").iterdir():
        assert path.read_bytes() == files[path.name]
    assert not any(run.glob("finetune*")) and "fine-tuned for 6 epochs" in (run / "report.md").read_text()
    with pytest.raises(InputError, match="fine-tuned model, which only training makes"):
        api.apply_policy(run / "policy.json", SearchConfig(), run / "applied")
    card = api.export(run, ["onnx", "policy"], run / "shipped")
    assert card.model.test_accuracy == now.best.test_accuracy


def test_hints_compare_the_channels_that_are_left(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Training] = []

    def train(training: Training, observer: Observer) -> Tuned:
        given.append(training)
        return finetune(training, observer)

    monkeypatch.setattr(delivering, "trainer", lambda config: train)
    best = api.load_result(run).best
    assert best is not None and best.policy.kept
    plain = api.finetune(run, {**GENTLE, "epochs": 1, "lr": 1e-6})
    hinted = api.finetune(run, {**GENTLE, "epochs": 1, "lr": 1e-6, "hints": 2.0})
    training = given[-1]
    assert training.teacher is not None
    pixels = torch.from_numpy(next(iter(training.images.batches(8)))[0])
    names = stages(training.module, training.teacher, pixels)
    own, theirs = (tapped(module, names)(pixels)[1] for module in (training.module, training.teacher))
    fewer = [len(training.channels[name]) < maps.shape[1] for name, maps in zip(names, theirs, strict=True)]
    assert [maps.shape[1] for maps in own] == [len(training.channels[name]) for name in names] and any(fewer)
    distance = 0.0
    for name, a, b in zip(names, own, theirs, strict=True):
        left = b[:, training.channels[name]]
        distance += float(((a - left).square().sum((1, 2, 3)) / left.square().sum((1, 2, 3))).mean())
    assert hinted.losses[0] - plain.losses[0] == pytest.approx(2 * distance, rel=0.3)


def test_a_worse_one_does_not(run: Path) -> None:
    before = contents(run)
    found = api.finetune(run, {**GENTLE, "epochs": 1, "lr": 20.0})
    assert not found.replaced and "on the selection split it reaches" in (found.reason or "") and found.change is None
    (entry,) = [entry for entry in Run.entries_of(run) if entry["kind"] == "finetune"]
    assert entry["reason"] == found.reason and entry["after"] < entry["before"]
    assert contents(run) == before


def test_a_verified_run_keeps_its_budgets_or_its_model(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = json.loads((run / "result.json").read_text())
    stored["best"]["verified"] = True
    (run / "result.json").write_text(json.dumps(stored))
    before, asked = contents(run), []
    best = api.load_result(run).best
    assert best is not None and best.latency is not None

    def admit(*arguments: Any) -> Verdict:
        asked.append(arguments[6])
        return Verdict(len(asked) > 1, replace(best.latency, samples=7), 4000, None if len(asked) > 1 else "too slow")

    monkeypatch.setattr("autocomp.study.finetune.admit_here", admit)
    found = api.finetune(run, GENTLE)
    assert not found.replaced and found.reason == "too slow"
    assert contents(run) == before
    events: list[Any] = []
    again = api.finetune(run, GENTLE, events.append)
    assert again.replaced and again.losses == found.losses and not any(isinstance(event, Step) for event in events)
    assert asked == pytest.approx([0.95, 0.975])
    assert again.result.best is not None and again.result.best.latency == replace(best.latency, samples=7)


def test_a_search_fine_tunes_its_best_as_the_command_does(run: Path, tmp_path: Path) -> None:
    stored = json.loads((run / "manifest.json").read_text())["config"]
    config = replace(SearchConfig.from_json(stored), finetune_epochs=2, out=str(tmp_path / "whole"))

    def stopped(event: Any) -> None:
        if isinstance(event, Phase) and event.name == "selection" and any((tmp_path / "whole").glob("finetune-*.pt")):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"go on with: autocomp resume .*whole$"):
        api.run_search(config, stopped)
    searched = contents(run)
    same = {"model.onnx", "weights.safetensors"}
    assert same <= contents(tmp_path / "whole").keys()
    assert all(contents(tmp_path / "whole")[name] == searched[name] for name in same)
    assert (tmp_path / "whole" / "report.md").exists()
    went_on = api.resume(tmp_path / "whole")
    apart = api.finetune(run, {"epochs": 2})
    assert went_on.best is not None and apart.result.best is not None
    assert went_on.best.test_accuracy == apart.result.best.test_accuracy
    ended = (tmp_path / "whole" / "journal.jsonl").read_bytes()
    assert api.resume(tmp_path / "whole").best == went_on.best  # nothing is left to do
    assert (tmp_path / "whole" / "journal.jsonl").read_bytes() == ended
    assert all(contents(tmp_path / "whole")[name] == contents(run)[name] for name in same)
    found = api.run_search(replace(config, out=str(tmp_path / "once")))
    assert all(contents(tmp_path / "once")[name] == contents(run)[name] for name in same)
    assert found.best is not None
    assert found.best.test_accuracy == apart.result.best.test_accuracy
    assert api.load_result(tmp_path / "once") == replace(found, front=api.load_result(tmp_path / "once").front)


def test_a_front_goes_on_with_the_training_that_was_stopped(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "FRONT", (0.9,))
    stored = SearchConfig.from_json(json.loads((run / "manifest.json").read_text())["config"])
    config = replace(stored, front=True, trials=2, finetune_epochs=1, out=str(tmp_path / "front"))

    def stopped(event: Any) -> None:
        if isinstance(event, Step) and any(tmp_path.glob("front/0.9x/result.json")):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="the same command with --out"):
        api.run_front(config, stopped)
    (point,) = api.run_front(config).points
    (entry,) = [entry for entry in Run.entries_of(tmp_path / "front" / "0.9x") if entry["kind"] == "finetune"]
    assert point.result is not None and ("fine-tuned" in " ".join(point.result.notes)) == (entry["reason"] is None)
    assert api.load_result(tmp_path / "front" / "0.9x").best == point.result.best


def test_a_search_whose_training_diverges_stays_whole(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["config"]["finetune_epochs"] = 1
    (run / "manifest.json").write_text(json.dumps(manifest))
    before = contents(run)
    monkeypatch.setattr(searching, "recipe_of", lambda config, settings: TrainingRecipe(epochs=1, lr=1e38))
    events: list[Any] = []
    assert api.resume(run, events.append) == api.load_result(run)
    (said,) = [event.text for event in events if isinstance(event, Note)]
    assert "not fine-tuned: training diverged" in said and "at step 2 of 5: try a lower --lr" in said
    (entry,) = [entry for entry in Run.entries_of(run) if entry["kind"] == "finetune"]
    assert entry["reason"] in said and contents(run) == before
    api.resume(run, events.append)  # is not tried again
    assert len([event for event in events if isinstance(event, Note)]) == 1


def test_an_engine_that_fails_after_a_search_leaves_it_finished(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["config"]["finetune_epochs"] = 1
    (run / "manifest.json").write_text(json.dumps(manifest))
    before, events = contents(run), list[Any]()

    def fails(bench: Any, onnx: bytes) -> float:
        raise EngineError("the engine gave up")

    with monkeypatch.context() as failing:
        failing.setattr("autocomp.study.finetune.accuracy_of", fails)
        assert api.resume(run, events.append) == api.load_result(run)
    said = [event.text for event in events if isinstance(event, Note)]
    assert said == [f"not fine-tuned: the engine gave up; 'autocomp resume {run}' tries again"]
    assert contents(run) == before and not trainings(run)
    api.resume(run, events.append)
    assert len(trainings(run)) == 1


def trainings(run: Path) -> list[Any]:
    return [entry for entry in Run.entries_of(run) if entry["kind"] == "finetune"]


def test_a_kill_while_the_model_is_replaced_is_made_good(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["config"]["finetune_epochs"] = 6
    (run / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(searching, "recipe_of", lambda config, settings: TrainingRecipe(**GENTLE))
    before = api.load_result(run).best

    def stopped(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed, pytest.raises(Interrupted):
        killed.setattr("autocomp.study.replacement._move", stopped)
        api.resume(run)
    assert not trainings(run)
    for name in ("model.onnx", "result.json"):  # as if the kill had come in the middle
        (run / "tuned.ready" / name).replace(run / name)
    other = Path(shutil.copytree(run, tmp_path / "other"))
    card = api.export(other, ["onnx", "policy"], tmp_path / "shipped")
    assert before is not None and before.test_accuracy is not None and card.model.test_accuracy is not None
    assert card.model.test_accuracy > before.test_accuracy and "fine-tuned for 6 epochs" in " ".join(card.notes)
    assert "fine-tuned for 6 epochs" in (other / "report.md").read_text()
    events: list[Any] = []
    result = api.resume(run, events.append)  # has nothing left to train
    assert result.best == card.model and not events
    (entry,) = trainings(run)
    assert entry["reason"] is None and entry["after"] > entry["before"] and len(entry["losses"]) == 6
    found = api.finetune(run, GENTLE, events.append)
    assert not found.replaced and found.reason == "it is what this training makes already"
    assert [entry["reason"] for entry in trainings(run)] == [None, found.reason]
    assert not any(isinstance(event, Step) for event in events)
    left = {path.name for path in run.iterdir() if path.suffix in (".pt", ".ready", ".part")}
    assert api.load_result(run).best == card.model and not left


class Launch:
    """What a backend says of a file's engine."""

    def __init__(self, onnx: bytes) -> None:
        self.onnx = onnx

    def to_json(self) -> dict[str, Any]:
        name = hashlib.sha256(self.onnx).hexdigest()
        empty: dict[str, Any] = {key: [] for key in ("operators", "layers", "reads", "writes", "feeds")}
        return {"name": name, "kind": "Convolution", "weights": "int8", "sparse": False, **empty}


def test_trained_again_the_searchs_model_is_kept_and_layers_are_of_the_model(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = contents(run)
    rising = iter((0.5, 0.6, 0.6, 0.7))
    monkeypatch.setattr("autocomp.study.finetune.accuracy_of", lambda bench, onnx: next(rising))
    described = lambda self, onnx: [Launch(onnx)]  # noqa: E731
    with monkeypatch.context() as describing:
        describing.setattr(SimulatedBackend, "layers", described, raising=False)
        assert api.finetune(run, {**GENTLE, "epochs": 1}).replaced
    (layer,) = json.loads((run / "layers.json").read_text())
    once = hashlib.sha256((run / "model.onnx").read_bytes()).hexdigest()
    assert layer["name"] == once and once in (run / "report.md").read_text()
    found = api.finetune(run, {**GENTLE, "epochs": 2})
    assert found.replaced and not (run / "layers.json").exists()
    said = [note for note in found.result.notes if note.startswith("fine-tuned")]
    assert len(said) == 2 and all(note.endswith("; the search's model lies in untuned") for note in said)
    assert all((run / "untuned" / name).read_bytes() == searched[name] for name in ("model.onnx", "policy.json"))
    assert hashlib.sha256((run / "model.onnx").read_bytes()).hexdigest() != once


def test_what_is_right_everywhere_is_not_trained(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autocomp.study.finetune.accuracy_of", lambda bench, onnx: 1.0)
    before, events = contents(run), list[Any]()
    found = api.finetune(run, GENTLE, events.append, finalists=3)
    assert not found.replaced and "right on every image" in (found.reason or "") and found.losses == ()
    assert contents(run) == before and not any(isinstance(event, Step) for event in events)


def without_training(prepare: Any) -> Any:
    def prepared(*arguments: Any) -> Any:
        bench = prepare(*arguments)
        return replace(bench, splits=replace(bench.splits, train=None))

    return prepared


def test_a_search_without_training_images_says_so(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "prepare", without_training(searching.prepare))
    stored = json.loads((run / "manifest.json").read_text())["config"]
    config = replace(SearchConfig.from_json(stored), finetune_epochs=2, out=str(tmp_path / "plain"))
    events: list[Any] = []
    found = api.run_search(config, events.append)
    assert any("no training images" in note and "quantized after training alone" in note for note in found.notes)
    assert not any(isinstance(event, Phase) and event.name == "finetune" for event in events)
    assert (tmp_path / "plain" / "model.onnx").read_bytes() == (run / "model.onnx").read_bytes()


def test_without_training_images_the_run_stays(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivering, "prepare", without_training(delivering.prepare))
    before = contents(run)
    with pytest.raises(DataError, match="no training images: the run stays as it is, quantized after training alone"):
        api.finetune(run, GENTLE)
    assert contents(run) == before


def test_what_cannot_be_fine_tuned_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lr must be a positive number"):
        api.finetune(run, {"lr": -1.0})
    weights = Path(json.loads((run / "manifest.json").read_text())["config"]["weights"])
    manifest = (run / "manifest.json").read_text()
    other = tmp_path / "other.safetensors"
    other.write_bytes(save({name: 2 * array for name, array in load(weights.read_bytes()).items()}))
    (run / "manifest.json").write_text(manifest.replace(str(weights), str(other)))
    with pytest.raises(RunError, match="the weights changed"):
        api.finetune(run, GENTLE)
    (run / "manifest.json").write_text(manifest.replace("tests.study.tiny:model", "object:Net"))
    with pytest.raises(RunError, match="live objects"):
        api.finetune(run, GENTLE)
