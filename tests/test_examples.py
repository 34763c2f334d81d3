"""Every example of a user's own code goes through a short search, as its first lines say but for sizes."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD

import autocomp
from autocomp import api
from autocomp.models import load_model
from examples import dict_outputs, own_metric, own_model, several_inputs
from examples.detection import ssdlite

FEW = {"engine": "simulated", "trials": 3, "baseline_trials": 0, "finalists": 1, "space": "prune"}


def test_own_model_data_and_metric_and_a_dict_of_outputs(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    weights = tmp_path / "own_model.safetensors"
    own_model.main(str(weights), epochs=1)
    found = autocomp.search(
        "examples.dict_outputs:model", "examples.own_model:data", "0.8x", weights=str(weights), output_key="logits",
        metric="examples.own_metric:worst_class", exclude="15", calibration_images=64, search_images=128,
        selection_images=128, out=str(tmp_path / "run"), **FEW,
    )  # fmt: skip
    assert found.best is not None and found.best.test_accuracy is not None
    assert found.best.policy.kept and "15" not in found.best.policy.precisions
    alone = json.loads((tmp_path / "run" / "sensitivity.json").read_text())
    assert alone["metric"] == "examples.own_metric:worst_class"
    assert max(row["divergence"] or 0.0 for row in alone["rows"]) > 0.01
    # The uncompressed model's file computes the logits, and the metric of the best trial is that of its outputs.
    module = load_model("examples.own_model:model", weights, 10, embedded=False).module
    images, labels = own_model.data()[1].tensors
    session = onnxruntime.InferenceSession(tmp_path / "run" / "reference.onnx", providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {"input": images.numpy()})
    with torch.inference_mode():
        np.testing.assert_allclose(outputs, module(images).numpy(), rtol=1e-3, atol=1e-4)
        losses = nn.functional.cross_entropy(module(images), labels, reduction="none")
    expected = max(float(losses[labels == name].mean()) for name in range(10))
    assert own_metric.worst_class(outputs, outputs, labels.numpy()) == pytest.approx(expected, rel=1e-4)
    assert all(trial.score is None or trial.score.divergence > 0.1 for trial in found.front)  # no divergence: a loss
    assert set(dict_outputs.model()(images[:1])) == {"features", "logits"}


def test_an_image_and_its_exposure_at_lower_rank_and_trained(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but lower ranks meets the budget."""
    monkeypatch.chdir(root)
    weights, space, run = tmp_path / "own_model.safetensors", tmp_path / "space.toml", tmp_path / "run"
    own_model.main(str(weights), epochs=1)
    space.write_text('precisions = ["int8"]\nranks = [0.5, 0.25]\n')
    few = {**FEW, "space": str(space), "trials": 6, "controller": "random"}
    found = autocomp.search(
        "examples.several_inputs:model", "examples.several_inputs:data", "0.7xMACs", weights=str(weights),
        calibration_images=64, search_images=128, selection_images=128, out=str(run), **few,
    )  # fmt: skip
    test = [inputs for inputs, _ in several_inputs.data()[2]]
    images, exposures = (torch.stack([inputs[name] for inputs in test]) for name in ("image", "exposure"))
    module = load_model("examples.own_model:model", weights, 10, embedded=False).module
    session = onnxruntime.InferenceSession(run / "reference.onnx", providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {"image": images.numpy(), "exposure": exposures.numpy()})
    with torch.inference_mode():
        np.testing.assert_allclose(outputs, module(images / exposures).numpy(), rtol=1e-3, atol=1e-3)
    assert found.best is not None and any(kind.rank for kind in found.best.policy.precisions.values())
    trained = api.finetune(run, {"epochs": 1, "lr": 1e-3})
    assert len(trained.losses) == 1 and (trained.recipe.crop, trained.recipe.flip) == (0, 0.0)


class Maps(nn.Module):
    """A backbone of two maps, for images of 64x64."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU())
        self.out_channels = [16, 16]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        first = self.first(images)
        return {"0": first, "1": self.second(first)}


def test_a_detector_of_images_without_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's wrapper, data, metric and detection, around a smaller detector of torchvision's."""
    torch.manual_seed(0)
    boxes = DefaultBoxGenerator([[2], [2]])
    detector = SSD(Maps(), boxes, (64, 64), 91, score_thresh=0.012, image_mean=[0.5] * 3, image_std=[0.5] * 3).eval()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    draw = np.random.default_rng(0)
    for number in range(200):
        pixels = draw.integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number:03}.jpg")
    train, test = (ssdlite.Photographs(part.files, 64) for part in ssdlite.data())
    assert (len(train), len(test)) == (160, 40)

    found = autocomp.search(
        ssdlite.Raw(detector), (train, test), "0.8xMACs", calibration_images=64, search_images=40, selection_images=40,
        metric="examples.detection.ssdlite:divergence", out=str(tmp_path / "run"), **FEW,
    )  # fmt: skip
    best, reference = found.best, found.reference
    assert best is not None and best.policy.kept
    assert {best.test_accuracy, best.search_accuracy, reference.test_accuracy, best.test_delta} == {None}
    assert all(trial.score is None or trial.score.agreement is None for trial in found.front)
    assert "%" not in (tmp_path / "run" / "report.md").read_text().split("## ")[0]
    # Post-processing of the uncompressed file is the detector's own, and the pruned file's outputs have their shape.
    pixels = torch.stack([test[index] for index in range(3)])
    with torch.inference_mode():
        expected = detector(list(pixels * 0.5 + 0.5))
    for name in ("reference.onnx", "model.onnx"):
        session = onnxruntime.InferenceSession(tmp_path / "run" / name, providers=["CPUExecutionProvider"])
        objects = ssdlite.detect(detector, session, pixels)
        assert all(set(entry) == {"boxes", "scores", "labels"} for entry in objects)
        if name == "reference.onnx":
            for entry, own in zip(objects, expected, strict=True):
                assert len(own["boxes"]) and torch.equal(entry["labels"], own["labels"])
                torch.testing.assert_close(entry["boxes"], own["boxes"], rtol=1e-3, atol=1e-2)
