"""How a policy's model comes to be trained."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from autocomp.compress import logits_of
from autocomp.config import SearchConfig
from autocomp.errors import ConfigError, ModelError
from autocomp.models.zoo import build_zoo
from autocomp.outcome import Event, Observer
from autocomp.policy import INT8, Policy, Precision
from autocomp.study.score import predict
from autocomp.study.training import Course, trained, training_images
from autocomp.study.workbench import Workbench, prepare
from autocomp.train import Training, TrainingRecipe, Tuned, finetune
from tests.study import tiny


def ignore(event: Event) -> None:
    del event


def prepared(model: str, folder: Path, weights: Path | None = None) -> Workbench:
    data = tiny.saved(folder / "images.npz", 500, 200)
    config = SearchConfig(
        model=model, weights=str(weights) if weights else None, data=f"npz:{data}", engine="simulated", batch=50,
        calibration_images=50, search_images=50, selection_images=50,
    )  # fmt: skip
    return prepare(config, ignore)


@pytest.mark.parametrize("precisions", [{}, {"0": INT8, "3": INT8, "7": INT8}], ids=["fp32", "int8"])
def test_norms_that_were_folded_are_live_in_training(precisions: dict[str, Precision], tmp_path: Path) -> None:
    bench = prepared("tests.study.tiny:normed", tmp_path)
    given: list[tuple[Training, Tuned]] = []

    def trainer(training: Training, observer: Observer) -> Tuned:
        given.append((training, finetune(training, observer)))
        return given[-1][1]

    recipe = TrainingRecipe(epochs=8, lr=0.1, batch=32, crop=0, flip=0.0, distillation=0.0, norms="batch")
    course = Course(bench, training_images(bench.splits), recipe, ignore, tmp_path, trainer)
    policy = Policy({"0": 12}, frozenset(), precisions)
    compressed, _ = trained(course, policy)
    ((training, tuned),) = given
    assert sorted(layer.name for layer in training.norms) == ["0", "3"]
    assert tuned.tensors.keys() == dict(training.module.named_parameters()).keys()
    with bench.backend.build(bench.emitter.emit(compressed)) as engine:
        after = predict(engine, bench.splits.test).accuracy
    with bench.backend.build(bench.emitter.emit(bench.emitter.finish(policy))) as engine:
        before = predict(engine, bench.splits.test).accuracy
    assert before < 0.4 and after > 0.6


@pytest.mark.parametrize("integer", [(), ("conv1", "layer2.0.conv1", "layer2.0.conv2")], ids=["fp32", "int8"])
def test_norms_of_a_dropped_branch_are_gone(integer: tuple[str, ...], tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(build_zoo("resnet8", 4).state_dict(), tmp_path / "weights.safetensors")
    bench = prepared("zoo:resnet8", tmp_path, tmp_path / "weights.safetensors")
    recipe = TrainingRecipe(epochs=1, batch=64, lr=1e-6, crop=0, flip=0.0, norms="batch")
    course = Course(bench, training_images(bench.splits), recipe, ignore, tmp_path)
    policy = Policy({"layer2.0.conv1": 24}, frozenset({"layer1.0"}), dict.fromkeys(integer, INT8))
    compressed, _ = trained(course, policy)
    before = bench.emitter.finish(compressed.policy)
    pixels = next(iter(bench.splits.test.batches(100)))[0]
    found, wanted = (logits_of(one.module, pixels) for one in (compressed, before))
    assert np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()  # nothing was learned, nothing is lost


def test_norms_that_are_not_there_cannot_be_live(tmp_path: Path) -> None:
    bench = prepared("tests.study.tiny:model", tmp_path)
    recipe = TrainingRecipe(epochs=1, norms="batch")
    with pytest.raises(ModelError, match=r"no batch norms were folded .* leave --norms out"):
        trained(Course(bench, training_images(bench.splits), recipe, ignore, tmp_path), Policy())
    with pytest.raises(ConfigError, match="need two images"):
        TrainingRecipe(batch=1, norms="batch")
