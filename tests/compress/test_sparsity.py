"""2:4 sparsity: the pattern against brute force, the files that carry it, and engines from the builder."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor

from autocomp.capabilities import Capabilities
from autocomp.compress import Statistics, Traced, collect, compress, export_onnx, logits_of, structure, trace
from autocomp.compress.sparsity import halved
from autocomp.engines import BackendSpec, Template, emit, load_template, make_backend, structure_digest
from autocomp.engines.onnxruntime import exact_engine
from autocomp.engines.structure import has_sparse_weights
from autocomp.engines.tensorrt.backend import NUMERICS
from autocomp.errors import CompressError, InputError
from autocomp.policy import FP32, INT8, Policy, Precision, Recipe
from autocomp.space import SearchSpace
from autocomp.study.finetune import finetune_run
from tests import tiny

RECIPE = Recipe(images=32)
Parts = tuple[Traced, Template, Statistics, Tensor]
SPARSE8, SPARSE16 = Precision.parse("int8-2:4"), Precision.parse("fp16-2:4")
KINDS = {"blocks.0.conv1": SPARSE8, "blocks.0.conv2": SPARSE16, "blocks.1.conv1": INT8, "head": SPARSE8}


@given(
    st.one_of(st.just((2, 8, 3, 1)), st.just((3, 4)), st.just((1, 12, 2))).flatmap(
        lambda shape: hnp.arrays(np.float32, shape, elements=st.floats(-9, 9, width=32))
    )
)
def test_of_every_four_the_two_largest_stay(weight: NDArray[np.float32]) -> None:
    found = halved(weight)
    flat, kept = (array.reshape(*array.shape[:2], -1) for array in (weight, found))
    for row in range(flat.shape[0]):
        for first in range(0, flat.shape[1], 4):
            for place in range(flat.shape[2]):
                four, left = flat[row, first : first + 4, place], kept[row, first : first + 4, place]
                pairs = [[four[i] if i in pair else 0 for i in range(4)] for pair in combinations(range(4), 2)]
                assert any(np.array_equal(left, pair) for pair in pairs)
                assert np.abs(left).sum() == pytest.approx(max(np.abs(pair).sum() for pair in pairs))


@pytest.fixture(scope="module")
def parts() -> Parts:
    model, images = tiny.model(), tiny.images(32, 5)
    traced = trace(model, images[:2])
    return traced, load_template(export_onnx(traced), traced.graph), collect(traced, images, RECIPE), images


def files(parts: Parts, policy: Policy) -> tuple[bytes, bytes, float]:
    """The file, the skeleton, and how far ONNX Runtime is from torch."""
    traced, template, statistics, images = parts
    policy = traced.graph.normalise(policy)
    found = compress(traced, statistics, policy, RECIPE, NUMERICS, images)
    file = emit(template, policy, found.tensors, found.weights, found.params, NUMERICS)
    skeleton = emit(template, policy, *structure(traced, policy, statistics, NUMERICS, RECIPE), NUMERICS)
    expected = logits_of(found.module, images.numpy())
    with exact_engine(file, len(expected)) as engine:
        error = np.linalg.norm(engine.run(images.numpy()) - expected)
    return file, skeleton, float(error / np.linalg.norm(expected))


def zeros(file: bytes, name: str) -> NDArray[np.int64]:
    """How many of every four weights along the input channels are zero."""
    tensors = {tensor.name: tensor for tensor in onnx.load_model_from_string(file).graph.initializer}
    tensor = next(
        tensors[key] for key in (f"{name}.weight_codes", f"{name}.weight_fp16", f"{name}.weight") if key in tensors
    )
    weight = numpy_helper.to_array(tensor)
    weight = weight.T if name == "head" else weight  # a product's is stored with the inputs first
    return np.asarray((weight.reshape(len(weight), -1, 4, *weight.shape[2:]) == 0).sum(axis=2))


def test_the_chosen_layers_carry_the_pattern_and_the_others_do_not(parts: Parts) -> None:
    file, skeleton, error = files(parts, Policy({"conv1": 8}, precisions=KINDS))
    for data in (file, skeleton):
        assert all((zeros(data, name) >= 2).all() for name, kind in KINDS.items() if kind.sparse)
        assert (zeros(data, "blocks.1.conv1") < 2).any() and (zeros(data, "blocks.1.conv2") < 2).any()
    assert error < 0.01
    dense, _, _ = files(
        parts, Policy({"conv1": 8}, precisions={n: Precision(k.weight, k.activation) for n, k in KINDS.items()})
    )
    assert structure_digest(file) == structure_digest(skeleton) != structure_digest(dense)
    assert has_sparse_weights(file) and not has_sparse_weights(dense)


def test_ranges_are_those_behind_the_pruned_weights(parts: Parts) -> None:
    """Against the user's model with the pattern written into its own weights."""
    traced, _, _, images = parts
    last, minmax = "blocks.1.conv2", replace(RECIPE, ranges="minmax")
    kinds = {name: SPARSE16 for name in ("blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1")} | {last: INT8}
    policy = traced.graph.normalise(Policy(precisions=kinds))
    found = compress(traced, collect(traced, images, minmax), policy, minmax, NUMERICS, images)
    model, seen = tiny.model(), []
    layers = dict(model.named_modules())
    layers[last].register_forward_pre_hook(lambda _, given: seen.append(given[0].abs().max().item()))
    with torch.no_grad():
        model(images)
        for name in kinds.keys() - {last}:
            weight = layers[name].weight
            weight.copy_(torch.from_numpy(halved(weight.numpy())))
        model(images)
    graph = traced.graph
    scale = found.params[graph.node_by_name[graph.layer_by_name[last].node].inputs[0]].scale
    assert 127 * scale == pytest.approx(seen[1], rel=1e-4) and abs(seen[1] / seen[0] - 1) > 0.01


def test_layers_whose_channels_come_in_no_fours_stay_dense(parts: Parts) -> None:
    with pytest.raises(InputError, match=r"conv1 reads 3 channels, and 2:4 sparsity wants fours"):
        files(parts, Policy(precisions={"conv1": SPARSE8}))
    space = SearchSpace.from_toml('kept = [1.0]\nprecisions = ["int8", "int8-2:4", "fp32"]', "own")
    graph = parts[0].graph
    found = space.restrict(graph, Capabilities((FP32, INT8, SPARSE8)))
    options = {decision.name: decision.options for decision in found.decisions if decision.kind == "precision"}
    assert options["conv1"] == (FP32, INT8) and options["blocks.0.conv1"] == (FP32, INT8, SPARSE8)
    assert space.digest == SearchSpace.from_toml(space.to_toml(), "own").digest


@pytest.mark.parametrize("text", ["int8-2:4", "fp16-2:4", "w4a8-2:4", "int8", "fp8"])
def test_its_name_is_read_back(text: str) -> None:
    precision = Precision.parse(text)
    assert str(precision) == text and precision.sparse == text.endswith("2:4")
    policy = Policy(precisions={"conv1": precision})
    assert Policy.from_json(policy.to_json()) == policy


def test_training_would_undo_it() -> None:
    result: Any = SimpleNamespace(best=SimpleNamespace(policy=Policy(precisions={"head": SPARSE8})))
    course: Any = SimpleNamespace(bench=None, observer=None)
    with pytest.raises(CompressError, match="would fill up the 2:4 sparse weights of head"):
        finetune_run(course, course, result, 1)


def test_engines_for_gpus_that_have_it(parts: Parts, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="not installed: pip install 'autocomp[tensorrt-rtx]'")
    policy = Policy(precisions=KINDS)
    backend = make_backend(BackendSpec("tensorrt-rtx", 2, hardware="sm80,sm89", fresh=True))
    backend.capabilities().validate(policy)
    file, _, _ = files(parts, policy)
    assert backend.save(file, tmp_path / "net.engine").targets == ("SM80", "SM89")
    for spec in (BackendSpec("tensorrt-rtx", hardware="sm75"), BackendSpec("onnxruntime")):
        with pytest.raises(InputError, match=r"blocks\.0\.conv1 cannot run as int8-2:4 on this engine"):
            make_backend(spec).capabilities().validate(policy)
