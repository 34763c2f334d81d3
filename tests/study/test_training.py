"""How a policy's model comes to be trained."""

from pathlib import Path

import numpy as np
import pytest

from autocomp.config import SearchConfig
from autocomp.outcome import Event, Observer
from autocomp.policy import INT8, Policy, Precision
from autocomp.study.score import predict
from autocomp.study.training import Course, trained, training_images
from autocomp.study.workbench import prepare
from autocomp.train import Training, TrainingRecipe, Tuned, finetune
from tests.study import tiny


def ignore(event: Event) -> None:
    del event


def saved(folder: Path) -> Path:
    train, test = tiny.images(500, 0), tiny.images(200, 1)
    np.savez(folder / "images.npz", x_train=train[0], y_train=train[1], x_test=test[0], y_test=test[1])
    return folder / "images.npz"


@pytest.mark.parametrize("precisions", [{}, {"0": INT8, "3": INT8, "7": INT8}], ids=["fp32", "int8"])
def test_norms_that_were_folded_are_live_in_training(precisions: dict[str, Precision], tmp_path: Path) -> None:
    config = SearchConfig(
        model="tests.study.tiny:normed", data=f"npz:{saved(tmp_path)}", engine="simulated", batch=50,
        calibration_images=50, search_images=50, selection_images=50,
    )  # fmt: skip
    bench = prepare(config, ignore)
    given: list[tuple[Training, Tuned]] = []

    def trainer(training: Training, observer: Observer) -> Tuned:
        given.append((training, finetune(training, observer)))
        return given[-1][1]

    recipe = TrainingRecipe(epochs=8, lr=0.1, batch=32, crop=0, flip=0.0, distillation=0.0, norms="batch")
    course = Course(bench, training_images(bench.splits), recipe, ignore, tmp_path, trainer)
    policy = Policy({"0": 12}, frozenset(), precisions)
    compressed, _ = trained(course, policy)
    ((training, tuned),) = given
    assert sorted(training.norms.values()) == ["0", "3"]
    assert tuned.tensors.keys() == dict(training.module.named_parameters()).keys()
    with bench.backend.build(bench.emitter.emit(compressed)) as engine:
        after = predict(engine, bench.splits.test).accuracy
    with bench.backend.build(bench.emitter.emit(bench.emitter.finish(policy))) as engine:
        before = predict(engine, bench.splits.test).accuracy
    assert before < 0.4 and after > 0.6
