"""Models of several inputs: pruned and quantized files against torch, on engines and as programs."""

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from autocomp.capabilities import Numerics
from autocomp.compress import collect, compress, export_compressed, export_onnx, run, trace
from autocomp.data import DataOptions, splits_from_objects
from autocomp.engines import BackendSpec, emit, load_template, make_backend
from autocomp.engines.simulated import DESCRIPTIONS, roofline_ms
from autocomp.engines.torch_cuda import exported_program
from autocomp.engines.torch_cuda.backend import input_shape
from autocomp.errors import DataError, EngineError, ModelError
from autocomp.models import check_logits, wrap_model
from autocomp.policy import INT8, Policy, Recipe
from autocomp.train.augment import augmented
from tests.compress.nets import trained

RECIPE = Recipe(images=32, importance="group_l2", recalibration="never")
UNSIGNED = Numerics(signed_activations=False, symmetric_activations=False, weight_max=63)
OPTIONS = DataOptions(calibration=32, search=32, selection=32)


class Placed(nn.Module):
    """Logits of an image (3, 8, 8) and of where it was taken (2, 3); ``input`` is a name that torch.fx keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 16, 3, 2)
        self.place, self.joint, self.head = nn.Linear(6, 16), nn.Linear(32, 24), nn.Linear(24, 4)

    def forward(self, input: Tensor, place: Tensor, scale: float = 1.0) -> Tensor:
        seen = torch.relu(self.second(torch.relu(self.first(input)))).mean((2, 3))
        known = torch.relu(self.place(place.flatten(1)))
        return scale * self.head(torch.relu(self.joint(torch.cat([seen, known], 1))))


def given(count: int) -> dict[str, Tensor]:
    """In another order than that of forward(), and of ranges far apart."""
    draw = torch.Generator().manual_seed(0)
    return {
        "place": 100 * torch.rand(count, 2, 3, generator=draw), "input": torch.randn(count, 3, 8, 8, generator=draw)
    }  # fmt: skip


def rows(inputs: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten(1) for value in inputs.values()], 1)


@pytest.fixture(scope="module")
def traced() -> Any:
    return trace(trained(Placed()), given(2))


def test_the_traced_model_reads_rows(traced: Any) -> None:
    model, inputs = trained(Placed()), given(5)
    assert traced.graph.input_shape == (198,) and [*traced.graph.inputs.values()] == [(2, 3), (3, 8, 8)]
    torch.testing.assert_close(traced.module(rows(inputs)), model(**inputs), rtol=1e-5, atol=1e-5)
    assert {group.name for group in traced.graph.groups} == {"first", "second", "place", "joint"}


@pytest.mark.parametrize(("precision", "whole"), [(None, False), (INT8, False), (INT8, True)])
def test_pruned_files_have_the_inputs_and_give_what_torch_gives(traced: Any, precision: Any, whole: bool) -> None:
    calibration = rows(given(32))
    statistics = collect(traced, calibration, RECIPE)
    kinds = {layer.name: precision for layer in traced.graph.layers} if precision else {}
    policy = Policy({group.name: group.channels // 2 for group in traced.graph.groups}, frozenset(), kinds)
    found = compress(traced, statistics, policy, RECIPE, UNSIGNED, calibration)
    if whole:
        file = export_compressed(found)
    else:
        template = load_template(export_onnx(traced), traced.graph)
        file = emit(template, policy, found.tensors, found.weights, found.params, UNSIGNED)
    names = [value.name for value in onnx.load_model_from_string(file).graph.input]
    assert names == ["place", "input_1"]
    expected = run(found.module, calibration).numpy()
    for name in ("simulated", "onnxruntime", "openvino"):
        with make_backend(BackendSpec(name, batch=3)).build(file) as engine:
            outputs, times = engine.run(calibration.numpy()), engine.time(2)
        assert np.linalg.norm(outputs - expected) <= (1e-4 if precision is None else 0.05) * np.linalg.norm(expected)
        assert times.shape == (2,) and (times > 0).all()
    if precision is None and not whole:
        program = torch.export.load(io.BytesIO(exported_program(file))).module()
        torch.testing.assert_close(program(*given(7).values()), run(found.module, rows(given(7))), rtol=1e-4, atol=1e-4)
        with pytest.raises(EngineError, match="torch-cuda reads one input, and the model has place, input_1: use"):
            input_shape(file, 3)
    elif not whole:  # each input has a scale of its own
        read = {layer.name: traced.graph.node_by_name[layer.node].inputs[0] for layer in traced.graph.layers}
        assert found.params[read["place"]].scale > 10 * found.params[read["first"]].scale
    assert roofline_ms(file, DESCRIPTIONS["simulated"], 3, 1) > 0


class Items:
    def __init__(self, make: Callable[[int], object], count: int = 160) -> None:
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> object:
        return self.make(index)


def pair(index: int) -> tuple[dict[str, Tensor], int]:
    return {"place": torch.full((2,), float(index)), "image": torch.full((1, 2, 2), index + 0.5)}, index % 3


def test_items_of_several_inputs_become_rows() -> None:
    splits = splits_from_objects((Items(pair), Items(pair, 20)), OPTIONS)
    assert (splits.input_shape, splits.classes) == ((6,), 3)
    assert dict(splits.inputs) == {"place": (2,), "image": (1, 2, 2)}
    images, labels = next(iter(splits.test.batches(20)))
    assert images[7].tolist() == [7.0, 7.0, 7.5, 7.5, 7.5, 7.5] and labels[7] == 1
    other = splits_from_objects((Items(lambda index: (pair(index)[0], index % 2)), Items(pair, 20)), OPTIONS)
    assert other.digest != splits.digest
    with pytest.raises(DataError, match=r"rows of shape \(6,\) do not hold inputs"):
        replace(splits, inputs={"place": (2,), "image": (1, 2, 3)})
    assert splits_from_objects((Items(lambda i: {"a": torch.ones(2), "b": torch.ones(2)}),) * 2, OPTIONS).inputs


INTEGERS, MISSING = torch.ones(2, dtype=torch.int64), torch.full((2,), torch.nan)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (lambda i: {"a": torch.ones(2), "b": INTEGERS}, r"input b is torch\.int64 \(2,\): yield float tensors"),
        (lambda i: {"a": torch.ones(2), "b": 1.0}, r"input b is torch\.float64 \(\): yield float tensors with an axis"),
        (lambda i: {"a": torch.ones(2), "b": MISSING}, "hold NaN"),
        (lambda i: (torch.ones(1, 2, 2), torch.ones(2)), r"for a model of several inputs .*name of forward's argument"),
        (lambda i: {"a": torch.ones(2), ("b", "c")[i > 9]: torch.ones(2)}, r"cannot read items|make names, order and"),
        (lambda i: {"a": torch.ones(2), "b": torch.ones(2 + (i > 150))}, r"make names, order and shapes|cannot read"),
    ],
    ids=["integers", "scalars", "nan", "tuples", "names", "shapes"],
)
def test_items_that_are_no_rows_are_refused(item: Callable[[int], object], words: str) -> None:
    with pytest.raises(DataError, match=words) as error:
        data = splits_from_objects((Items(lambda i: (item(i), 0)), Items(lambda i: (item(i), 0))), OPTIONS)
        [list(part.batches(20)) for part in (data.calibration, data.test)]
    assert "\n" not in str(error.value)


def test_a_model_and_data_of_other_inputs_are_refused() -> None:
    model = wrap_model(Placed(), 4)
    check_logits(model, (198,), {"place": (2, 3), "input": (3, 8, 8)})
    with pytest.raises(ModelError, match="takes input, place, but the data yields image, place: give them"):
        check_logits(model, (198,), {"image": (3, 8, 8), "place": (2, 3)})
    with pytest.raises(ModelError, match="takes input, but the data yields input, other: give"):
        check_logits(wrap_model(nn.Linear(4, 4), 4), (8,), {"input": (4,), "other": (4,)})

    class Idle(Placed):
        def forward(self, input: Tensor, place: Tensor, spare: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(input, place)

    with pytest.raises(ModelError, match="does not use its input spare: leave it out of the data"):
        trace(Idle(), {**given(2), "spare": torch.ones(2, 1)})
    with pytest.raises(ModelError, match="or several by name"):
        trace(Placed(), {**given(2), "input": torch.ones(3, 3, 8, 8)})


def test_rows_are_trained_on_as_they_are() -> None:
    assert torch.equal(augmented(rows(given(3)), 0, 0.0, torch.Generator()), rows(given(3)))
