"""``autocomp debug-accuracy``: files broken by hand at one layer, which is found by its name."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import StringIO
from math import ceil, log2
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from rich.console import Console

from autocomp.cli import main
from autocomp.config import SearchConfig
from autocomp.errors import InputError
from autocomp.outcome import Note
from autocomp.policy import INT8, Policy, Precision
from autocomp.report import print_accuracy_gap
from autocomp.results import Score
from autocomp.study.artefacts import ShippedPolicy, write_model
from autocomp.study.debug import LIMIT, AccuracyGap, Culprit, Partial, debug, narrow
from autocomp.study.workbench import Workbench, prepare

LAYERS = (
    "conv1",
    "blocks.0.conv1",
    "blocks.0.conv2",
    "blocks.1.conv1",
    "blocks.1.conv2",
    "blocks.1.shortcut.0",
    "head",
)


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main([*arguments])
    return int(left.value.code or 0)


@dataclass(frozen=True)
class Applied:
    """A folder with a policy and its file, the flags that name its model, and all made ready."""

    folder: Path
    words: list[str]
    bench: Workbench

    @property
    def shipped(self) -> ShippedPolicy:
        return ShippedPolicy.read(self.folder / "policy.json")


@pytest.fixture(scope="module")
def applied(tmp_path_factory: pytest.TempPathFactory) -> Applied:
    """Of int8 layers, one of float and one of 4-bit weights."""
    folder = tmp_path_factory.mktemp("applied")
    kinds = dict.fromkeys(LAYERS, INT8) | {"blocks.1.conv1": Precision("int4", "int8")}
    del kinds["blocks.0.conv2"]
    few = {"calibration_images": 64, "search_images": 400, "selection_images": 100}
    (folder / "few.toml").write_text("".join(f"{name} = {count}\n" for name, count in few.items()))
    bench = prepare(SearchConfig(model="tests.tiny:model", data="tests.tiny:data", batch=32, **few), lambda event: None)
    write_model(bench, bench.emitter.finish(bench.traced.graph.normalise(Policy(precisions=kinds))), folder)
    words = ["--model", "tests.tiny:model", "--data", "tests.tiny:data", "--batch", "32"]
    return Applied(folder, [*words, "--config", str(folder / "few.toml")], bench)


def scaled(name: str) -> Callable[[onnx.ModelProto], None]:
    """Makes a tensor of the file eight times as large."""

    def edit(model: onnx.ModelProto) -> None:
        (tensor,) = (entry for entry in model.graph.initializer if entry.name == name)
        tensor.CopyFrom(numpy_helper.from_array(8 * numpy_helper.to_array(tensor), name))

    return edit


def behind(layer: str) -> Callable[[onnx.ModelProto], None]:
    """Makes the scale of what a layer writes eight times as large; '' for what the model reads."""

    def edit(model: onnx.ModelProto) -> None:
        graph = model.graph
        readers = {value: node for node in reversed(graph.node) for value in node.input}
        value = graph.input[0].name
        if layer:
            value = next(node.output[0] for node in graph.node if f"{layer}.weight_dq" in node.input)
        while readers[value].op_type != "QuantizeLinear":
            value = readers[value].output[0]
        own = numpy_helper.to_array(next(t for t in graph.initializer if t.name == readers[value].input[1]))
        graph.initializer.append(numpy_helper.from_array(8 * own, "broken"))
        for node in (readers[value], readers[readers[value].output[0]]):
            node.input[1] = "broken"

    return edit


def broken(applied: Applied, edit: Callable[[onnx.ModelProto], None]) -> bytes:
    model = onnx.load(applied.folder / "model.onnx")
    edit(model)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("edit", "layer"),
    [
        (scaled("blocks.0.conv1.weight_scale"), "blocks.0.conv1"),
        (scaled("blocks.0.conv2.weight"), "blocks.0.conv2"),
        (scaled("blocks.1.conv1.weight_scale"), "blocks.1.conv1"),
        (scaled("head.weight_scale"), "head"),
        (behind("blocks.0.conv1"), "blocks.0.conv1"),
        (behind(""), None),
    ],
    ids=["weights", "float", "four bits", "last", "activations", "input"],
)
def test_a_layer_broken_by_hand_is_found(
    applied: Applied, edit: Callable[[onnx.ModelProto], None], layer: str | None
) -> None:
    events: list[object] = []
    found = debug(applied.bench, applied.shipped, broken(applied, edit), events.append)
    assert found.culprit is not None and found.culprit.layer == layer and not found.agrees
    assert found.torch.accuracy is not None and found.engine.accuracy is not None
    assert found.torch.accuracy - found.engine.accuracy == pytest.approx(found.lost)
    assert abs(found.lost) > LIMIT and abs(found.culprit.before) < abs(found.lost) / 2 < abs(found.culprit.after)
    assert any(isinstance(event, Note) and "it was changed or copied" in event.text for event in events)
    assert len(found.partials) <= 3  # of seven places


def test_the_command_says_which_layer_it_is(
    applied: Applied, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.onnx").write_bytes(broken(applied, scaled("blocks.0.conv2.weight")))
    words = ("debug-accuracy", str(applied.folder), *applied.words, "--onnx", str(tmp_path / "broken.onnx"))
    assert call(*words, "--json") == 1
    found = json.loads(capfd.readouterr().out)
    assert found["culprit"]["layer"] == "blocks.0.conv2" and found["culprit"]["precision"] == "fp32"
    assert found["reason"] is None and not found["agrees"] and found["torch"]["images"] == 400


def test_a_good_file_agrees_with_the_torch_model(applied: Applied, capfd: pytest.CaptureFixture[str]) -> None:
    assert call("debug-accuracy", str(applied.folder), *applied.words) == 0
    shown = capfd.readouterr().out
    assert (
        "torch model" in shown and "onnxruntime" in shown and "the engine computes what the torch model does" in shown
    )


def test_the_table_names_the_place() -> None:
    score = Score(0.0, 0.9, 100, 1.0)
    culprit = Culprit("conv2", "fc", "int8", 0.01, 0.3)
    found = AccuracyGap({"engine": "trt 11"}, score, score, 0.3, culprit, (Partial("conv2", 0.01), Partial("fc", 0.3)))
    screen = StringIO()
    print_accuracy_gap(found, Console(file=screen, width=120))
    assert "it goes wrong at conv2 (int8), or between it and fc: 1.00 points lost before it, 30.00" in screen.getvalue()
    print_accuracy_gap(replace(found, culprit=None, reason="no operator X"), Console(file=screen, width=120))
    assert "no layer could be named: no operator X" in screen.getvalue()


def test_files_that_cannot_be_compared_are_refused(
    applied: Applied, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trained = replace(applied.shipped, training={"epochs": 1})
    with pytest.raises(InputError, match="known by its own model"):
        debug(applied.bench, trained, broken(applied, behind("")), lambda event: None)
    found = debug(applied.bench, trained, (applied.folder / "model.onnx").read_bytes(), lambda event: None)
    assert found.agrees  # the file itself in torch is then the torch model
    other = onnx.load(applied.folder / "model.onnx")
    other.graph.node[-1].output[0] = other.graph.output[0].name = "renamed"
    scaled("head.weight_scale")(other)
    for node in other.graph.node:
        node.input[:] = [name.replace("relu", "other") for name in node.input]
        node.output[:] = [name.replace("relu", "other") for name in node.output]
    found = debug(applied.bench, applied.shipped, other.SerializeToString(), lambda event: None)
    assert found.culprit is None and found.reason is not None and "the file has no value" in found.reason
    for words, message in (
        ([str(applied.folder), "--onnx", str(tmp_path / "none.onnx")], "cannot read"),
        ([str(tmp_path / "none")], "no policy file"),
    ):
        assert call("debug-accuracy", *applied.words, *words) == 2
        assert message in capfd.readouterr().err


@given(st.lists(st.floats(-1, 1), max_size=40), st.floats(0.01, 1), st.booleans())
def test_bisection_ends_between_two_neighbours_that_differ(losses: list[float], total: float, gained: bool) -> None:
    """For any losses at all, with no more questions than a bisection needs."""
    total = -total if gained else total
    asked: list[int] = []

    def at(place: int) -> float:
        asked.append(place)
        return losses[place]

    known, low, high = narrow(at, len(losses), total)
    of = dict(enumerate(losses)) | {-1: 0.0, len(losses): total}
    assert high == low + 1 and known == {place: of[place] for place in {-1, len(losses), *asked}}
    assert (of[low] / total <= 0.5) and (of[high] / total > 0.5)
    assert len(asked) == len(set(asked)) <= ceil(log2(len(losses) + 1))
