"""What `export` writes, and what `verify` says of it: claims that hold, claims that do not, files changed by hand."""

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from rich.console import Console
from safetensors.numpy import load

import autocomp
from autocomp.api import export, verify, verify_shipped
from autocomp.data import DataOptions, load_data
from autocomp.errors import ConfigError, DataError, InputError, RunError
from autocomp.report import print_shipped
from autocomp.study.card import Card
from tests.engines.conftest import Case
from tests.study.conftest import HERE, Make

ALL = ("onnx", "torch", "policy")
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


@dataclass(frozen=True)
class Images:
    """A file of 16x16 images, with its digest and the run's model's accuracy on its test part, by hand."""

    spec: str
    digest: str
    accuracy: float


@pytest.fixture
def images(tmp_path: Path, make: Make) -> Images:
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (400, 16, 16, 3), np.uint8)
    labels = draw.integers(0, 10, 400)
    folder = make(predicted=False)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    ready = ((pixels[200:] / np.float32(255) - MEAN) / STD).transpose(0, 3, 1, 2)
    (logits,) = session.run(None, {"input": ready})
    labels[200:] = np.where(np.arange(200) < 150, logits.argmax(axis=1), labels[200:])
    for file in sorted(folder.iterdir()):
        file.unlink()
    path = tmp_path / "images.npz"
    np.savez(path, x_train=pixels[:200], y_train=labels[:200] % 10, x_test=pixels[200:], y_test=labels[200:])
    spec = f"npz:{path}"
    digest = load_data(spec, DataOptions(calibration=40, search=40, selection=40)).digest
    return Images(spec, digest, float((logits.argmax(axis=1) == labels[200:]).mean()))


@pytest.fixture
def shipped(make: Make, images: Images, tmp_path: Path) -> Path:
    run = make(predicted=False, data=images.spec, data_digest=images.digest, accuracy=images.accuracy)
    export(run, ["onnx", "policy"], tmp_path / "shipped")
    return tmp_path / "shipped"


def test_the_files_are_the_runs_and_the_card_says_so(make: Make, images: Images, model: Case, tmp_path: Path) -> None:
    run = make(predicted=False, data=images.spec, data_digest=images.digest, accuracy=images.accuracy)
    shipped = tmp_path / "shipped"
    export(run, ALL, shipped)
    card = json.loads((shipped / "card.json").read_text())
    names = {
        "model.onnx", "reference.onnx", "model.pt2", "weights.safetensors", "policy.json", "scales.json", "card.md"
    }  # fmt: skip
    assert card["files"].keys() == names == {path.name for path in shipped.iterdir()} - {"card.json"}
    for name, digest in card["files"].items():
        assert hashlib.sha256((shipped / name).read_bytes()).hexdigest() == digest, name
    assert (shipped / "model.onnx").read_bytes() == (run / "model.onnx").read_bytes()
    kinds = {t.name: (t.data_type, list(t.dims)) for t in onnx.load(shipped / "model.onnx").graph.initializer}
    (stem,) = [layer for layer in model.net.graph.layers if layer.name == "conv1"]
    assert (onnx.TensorProto.INT8, list(stem.weight_shape)) in kinds.values()
    (group, *_) = model.net.graph.groups
    weights = load((shipped / "weights.safetensors").read_bytes())
    assert all(weights[m.parameter].shape[m.axis] == group.channels // 2 for m in group.members)
    assert json.loads((shipped / "scales.json").read_text()) == json.loads((run / "policy.json").read_text())["scales"]
    assert card["data"] == {
        "source": images.spec, "digest": images.digest, "test_images": 200, "size": None,
        "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    assert card["model"]["accuracy"]["test"] == images.accuracy and card["device"] == HERE
    text = (shipped / "card.md").read_text()
    claims = ("0.9x", "Not verified", f"{100 * images.accuracy:.2f} %", "1.000 (0.900 to 1.100)")
    for said in (*claims, HERE["name"], "threads 1, batch 4"):
        assert said in text, said
    assert "autocomp search" in text and "torch 2" in text and card["files"]["model.pt2"] in text
    program = torch.export.load(io.BytesIO((shipped / "model.pt2").read_bytes()))
    assert str(Path(autocomp.__file__).parent).encode() not in (shipped / "model.pt2").read_bytes()
    assert any(tensor.dtype == torch.int8 for tensor in program.state_dict.values())
    session = onnxruntime.InferenceSession(shipped / "model.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 5):
        batch = np.random.default_rng(count).standard_normal((count, 3, 16, 16), np.float32)
        (expected,) = session.run(None, {"input": batch})
        found = program.module()(torch.from_numpy(batch)).detach().numpy()
        assert np.abs(found - expected).max() < 0.03 * expected.std()  # a rounding tie may fall to either side


def test_claims_that_hold(shipped: Path, images: Images, measured: Any) -> None:
    measured(0.5)
    found = verify_shipped(shipped)
    assert found.holds and found.broken == () and found.accuracy == pytest.approx(images.accuracy)
    assert found.verdict is not None and found.verdict.admitted and found.device == HERE
    assert {path.name for path in shipped.iterdir()} == {*found.card.files, "card.json"}  # nothing was written


def test_a_slower_engine_and_a_lost_accuracy_break_their_claims(
    make: Make, images: Images, measured: Any, tmp_path: Path
) -> None:
    lost = {"data": images.spec, "data_digest": images.digest, "accuracy": images.accuracy + 0.01}
    run = make(predicted=False, verified=True, **lost)
    export(run, ["onnx"], tmp_path / "shipped")
    measured(0.95)
    speed, accuracy = verify_shipped(tmp_path / "shipped").broken
    assert "is over 0.9x" in speed
    assert accuracy == (
        f"the accuracy is {100 * images.accuracy:.2f} %, the card says {100 * images.accuracy + 1:.2f} %"
    )


def claiming(run: Path, ratio: float, latency_ms: float, reference_ms: float = 1.0) -> Path:
    """The run with exact numbers in the row of its model."""
    result = json.loads((run / "result.json").read_text())
    exact = {"ratio": ratio, "latency_ms": latency_ms, "reference_ms": reference_ms}
    result["best"]["timing"] |= {name: {"value": at, "low": at, "high": at} for name, at in exact.items()}
    (run / "result.json").write_text(json.dumps(result))
    return run


@pytest.mark.parametrize(
    ("claim", "device", "broken"),
    [
        ((0.5, 0.5), HERE, ["the ratio is 0.600 (", "the latency (p50) is 0.600 ms ("]),
        ((0.58, 0.58), HERE, []),  # within 5 %
        ((0.7, 0.7), HERE, []),  # faster than it was
        ((0.5, 0.5), {**HERE, "name": "elsewhere"}, ["the ratio is 0.600 ("]),
        ((0.5, 0.5, 1.2), HERE, ["the ratio is 0.600 ("]),  # the device ran at another speed
    ],
)
def test_a_slower_model_than_the_cards_is_named(
    make: Make, images: Images, measured: Any, tmp_path: Path, claim: tuple[float, ...], device: Any, broken: list[str]
) -> None:
    given = {"data": images.spec, "data_digest": images.digest, "accuracy": images.accuracy}
    export(
        claiming(make(predicted=False, verified=True, device=device, **given), *claim), ["onnx"], tmp_path / "shipped"
    )
    measured(0.6)
    found = verify_shipped(tmp_path / "shipped")
    assert len(found.broken) == len(broken) and found.verdict is not None and found.verdict.admitted
    assert all(
        line.startswith(start) and "the card says 0.500" in line
        for line, start in zip(found.broken, broken, strict=True)
    )


@pytest.mark.parametrize("verified", [True, False])
def test_a_card_that_was_not_verified_claims_no_budget(
    make: Make, images: Images, measured: Any, tmp_path: Path, verified: bool
) -> None:
    given = {"data": images.spec, "data_digest": images.digest, "accuracy": images.accuracy}
    export(claiming(make(predicted=False, verified=verified, **given), 0.95, 0.95), ["onnx"], tmp_path / "shipped")
    measured(0.95)
    found = verify_shipped(tmp_path / "shipped")
    assert found.verdict is not None and not found.verdict.admitted and found.holds is not verified
    console = Console(file=io.StringIO(), width=200)
    print_shipped(found, console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert ("no longer true: p50 0.950x" in said) is verified
    assert ("not on the card, which claims no budget: p50 0.950x" in said) is not verified


def test_a_file_changed_by_hand_is_named_and_nothing_is_run(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autocomp.study.shipped.make_backend", None)  # would fail
    for name in [*Card.read(shipped)[0].files, "card.json"]:
        path = shipped / name
        whole = path.read_bytes()
        path.write_bytes(whole.replace(b"0.9x", b"0.8x") if name == "card.json" else whole + b"\n")
        found = verify_shipped(shipped)
        assert found.broken == (f"{name} was changed after it was shipped",) and found.verdict is None
        path.write_bytes(whole)
    (shipped / "scales.json").unlink()
    assert verify_shipped(shipped).broken == ("scales.json is missing",)


def test_the_data_may_have_moved_but_must_be_the_cards(
    shipped: Path, images: Images, measured: Any, tmp_path: Path
) -> None:
    measured(0.5)
    here = tmp_path / "images.npz"
    there = here.rename(tmp_path / "moved.npz")
    with pytest.raises(DataError, match=r"cannot be checked .*images\.npz.* with --data"):
        verify_shipped(shipped)
    assert verify_shipped(shipped, f"npz:{there}").holds
    with pytest.raises(DataError, match="digits is not the data of the card"):
        verify_shipped(shipped, "digits")


def test_without_its_data_a_run_ships_and_its_card_says_less(make: Make, tmp_path: Path) -> None:
    export(make(predicted=True), ["onnx"], tmp_path / "shipped")
    card, untouched = Card.read(tmp_path / "shipped")
    assert untouched and card.data.test_images is None and card.data.mean is None and card.predicted
    assert "Predicted, an estimate" in (tmp_path / "shipped" / "card.md").read_text()


ENGINES = "Accuracy is the engine's, over all test images."
NUMERICS = (
    "Accuracy is that of the engine's numerics under ONNX Runtime on the machine that searched, not the engine's, "
    "over all test images."
)


@pytest.mark.parametrize(
    ("predicted", "accuracy", "said"),
    [(False, 0.9, ENGINES), (True, 0.9, NUMERICS), (False, None, "No accuracy is claimed: the data has no labels.")],
)
def test_a_card_says_whose_accuracy_it_is(
    make: Make, tmp_path: Path, predicted: bool, accuracy: float | None, said: str
) -> None:
    export(make(predicted=predicted, accuracy=accuracy), ["onnx"], tmp_path / "shipped")
    text = (tmp_path / "shipped" / "card.md").read_text()
    assert f"\n\n{said}\n\n" in text and sum(text.count(other) for other in (ENGINES, NUMERICS)) == (accuracy == 0.9)


def test_a_run_measured_without_its_images_claims_no_accuracy_of_the_engine(
    make: Make, measured: Any, tmp_path: Path
) -> None:
    measured(0.5)
    run = make(predicted=True)
    assert verify(run).changed
    export(run, ["onnx"], tmp_path / "shipped")
    text = (tmp_path / "shipped" / "card.md").read_text()
    assert NUMERICS in text and ENGINES not in text and "Predicted" not in text


READY, UNKNOWN = "Images go in as the dataset gives them.", "not at hand at export"
GIVEN = "Images go in as (pixel / 255 - mean) / std, 24 pixels a side; mean 0.4, 0.5, 0.6; std 0.2, 0.3, 0.25."


@pytest.mark.parametrize(
    ("data", "settings", "said", "unsaid"),
    [
        ("npz:gone.npz", {}, UNKNOWN, READY),
        ("imagefolder:gone", {"mean": (0.4,)}, UNKNOWN, READY),
        ("cifar10:gone", {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "size": 24}, GIVEN, UNKNOWN),
        ("gone.module:images", {}, READY, UNKNOWN),
    ],
)
def test_a_card_tells_ready_images_from_unknown_ones(
    make: Make, tmp_path: Path, data: str, settings: dict[str, Any], said: str, unsaid: str
) -> None:
    export(make(predicted=False, data=data, **settings), ["onnx"], tmp_path / "shipped")
    text = (tmp_path / "shipped" / "card.md").read_text()
    assert said in text and unsaid not in text
    found = json.loads((tmp_path / "shipped" / "card.json").read_text())["data"]
    given = {name: settings.get(name) for name in ("mean", "std", "size")}
    assert {name: found[name] for name in given} == json.loads(json.dumps(given)) and found["test_images"] is None


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_engine_without_files_ships_the_others_and_says_so(make: Make, tmp_path: Path, engine: str) -> None:
    pytest.importorskip(engine)
    told: list[Any] = []
    card = export(make(predicted=True, engine=engine), ["onnx", "engine", "policy"], tmp_path / "shipped", told.append)
    names = {"model.onnx", "reference.onnx", "policy.json", "scales.json", "card.md"}
    assert card.files.keys() == names == {path.name for path in (tmp_path / "shipped").iterdir()} - {"card.json"}
    said = f"the engine {engine} keeps no engine files, it reads model.onnx"
    assert [event.text for event in told] == [said] and card.notes[-1] == said and len(card.notes) == 3
    assert f"- {said}\n" in (tmp_path / "shipped" / "card.md").read_text()


def test_an_engine_with_files_ships_them(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Keeping:
        def save(self, onnx: bytes, path: Path) -> None:
            path.write_bytes(b"engine of " + onnx)

    monkeypatch.setattr("autocomp.study.ship.make_backend", lambda spec: Keeping())
    card = export(make(predicted=False), ["engine"], tmp_path / "shipped")
    made = (tmp_path / "shipped" / "model.engine").read_bytes()
    assert made == b"engine of " + (tmp_path / "run" / "model.onnx").read_bytes() and len(card.notes) == 2
    assert card.files.keys() == {"model.engine", "card.md"}


@pytest.mark.parametrize(
    ("kinds", "kind", "said"),
    [
        (["onnx", "tflite"], InputError, "unknown kind tflite in --to: use onnx, torch, policy, engine"),
        ([], InputError, "unknown kind"),
        (["engine"], ConfigError, "onnxruntime keeps no engine files, it reads model.onnx: give onnx in --to"),
    ],
)
def test_what_cannot_be_shipped_leaves_no_folder(
    make: Make, tmp_path: Path, kinds: list[str], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        export(make(predicted=False), kinds, tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()


def test_a_run_that_is_not_whole_and_a_taken_folder_are_refused(make: Make, tmp_path: Path) -> None:
    run = make(predicted=False)
    with pytest.raises(InputError, match="not empty"):
        export(run, ALL, run)
    (run / "model.onnx").write_bytes(b"other")
    with pytest.raises(RunError, match="not the file that the run shipped"):
        export(run, ALL, tmp_path / "shipped")
    with pytest.raises(RunError, match="no run folder"):
        export(tmp_path, ALL, tmp_path / "shipped")


def test_a_folder_that_cannot_be_verified_is_refused(make: Make, tmp_path: Path) -> None:
    export(make(predicted=True, engine="simulated"), ["policy"], tmp_path / "shipped")
    with pytest.raises(RunError, match="without ONNX"):
        verify_shipped(tmp_path / "shipped")
    (tmp_path / "shipped" / "card.json").write_text("{")
    with pytest.raises(RunError, match=r"card\.json is damaged"):
        verify_shipped(tmp_path / "shipped")
    with pytest.raises(RunError, match="was not shipped"):
        verify_shipped(tmp_path)
    export(tmp_path / "run", ["onnx"], tmp_path / "estimated")
    with pytest.raises(ConfigError, match="only estimates"):
        verify_shipped(tmp_path / "estimated")
