"""Layers of reduced rank: the pair's weights against brute force, files against torch, and what a space offers."""

from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from autocomp.capabilities import Capabilities
from autocomp.compress import collect, compress, energies, export_compressed, export_onnx, run, structure, trace
from autocomp.compress.low_rank import factors
from autocomp.compress.moments import Moments
from autocomp.compress.statistics import Statistics
from autocomp.compress.surgery import kept_positions
from autocomp.compress.tracing import Traced
from autocomp.engines import BackendSpec, emit, int8_layers, load_template, structure_digest, with_codes
from autocomp.engines.onnxruntime import OnnxRuntimeBackend
from autocomp.engines.template import Template
from autocomp.errors import ConfigError, InputError
from autocomp.hardware import kernels_of
from autocomp.policy import FP32, INT8, Policy, Precision, Recipe
from autocomp.quantization import place
from autocomp.space import SearchSpace
from tests.compress.nets import Mixed, images, trained

RECIPE = Recipe(images=64, importance="group_l2", rounding="nearest")


class Case:
    def __init__(self) -> None:
        self.images = images(64, 16)
        self.traced: Traced = trace(trained(Mixed()), self.images[:2])
        self.statistics: Statistics = collect(self.traced, self.images, RECIPE)
        self.template: Template = load_template(export_onnx(self.traced), self.traced.graph)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def moments(features: int, pooled: int = 1) -> Moments:
    rows = torch.randn(500, features, dtype=torch.float64) @ torch.randn(features, features, dtype=torch.float64)
    rows += torch.randn(features)
    return Moments(rows.mean(0), torch.cov(rows.T, correction=0).float(), pooled)


@pytest.mark.parametrize("known", [False, True], ids=["plain", "data"])
@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(5, 6, 3, stride=2, padding=1), nn.Conv2d(8, 6, 1), nn.Linear(9, 7)],
    ids=["3x3", "1x1", "linear"],
)
def test_at_full_rank_a_pair_is_the_layer(layer: nn.Conv2d | nn.Linear, known: bool) -> None:
    torch.manual_seed(0)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    found = factors(weight, bias, len(weight), moments(weight[0].numel()) if known else None)
    if isinstance(layer, nn.Linear):
        x = torch.randn(10, 9)
        y = nn.functional.linear(nn.functional.linear(x, *found[:2]), *found[2:])
    else:
        x = torch.randn(4, layer.in_channels, 8, 8)
        geometry = {"stride": layer.stride, "padding": layer.padding}
        y = nn.functional.conv2d(nn.functional.conv2d(x, *found[:2], **geometry), *found[2:])
    torch.testing.assert_close(y, layer(x).detach(), rtol=1e-5, atol=1e-5)


def test_a_pair_is_the_nearest_of_its_rank() -> None:
    """Against numpy's singular value decomposition, of W alone and of W G^(1/2)."""
    torch.manual_seed(0)
    weight, bias, known = torch.randn(6, 3, 2, 2), torch.randn(6), moments(12)
    flat = weight.flatten(1).double().numpy()
    u, s, v = np.linalg.svd(flat)
    first, _, second, _ = factors(weight, bias, 2, None)
    np.testing.assert_allclose(second.flatten(1) @ first.flatten(1), (u[:, :2] * s[:2]) @ v[:2], atol=1e-5)

    first, shift, second, left = factors(weight, bias, 2, known)
    gone = flat - (second.flatten(1) @ first.flatten(1)).double().numpy()
    variances, axes = np.linalg.eigh(known.gram.double().numpy())
    root = axes * np.sqrt(variances.clip(0))
    assert np.trace(gone @ known.gram.double().numpy() @ gone.T) == pytest.approx(
        (np.linalg.svd(flat @ root)[1][2:] ** 2).sum(), rel=1e-4
    )
    # At the inputs' mean nothing is lost, and between the layers channels have mean 0 and variance 1.
    between = first.flatten(1).double() @ known.mean + shift
    assert between.abs().max() < 1e-4
    torch.testing.assert_close(left, (weight.flatten(1).double() @ known.mean).float() + bias)
    spread = first.flatten(1) @ known.gram @ first.flatten(1).T
    torch.testing.assert_close(spread, torch.eye(2), rtol=1e-3, atol=1e-3)


def test_energies_are_what_pairs_keep(case: Case) -> None:
    """Against the variance that the nearest pair leaves, by brute force; of the whole model and of half of it."""
    graph = case.traced.graph
    halves = Policy({group.name: group.channels // 2 for group in graph.groups})
    for policy in (Policy(), halves):
        numerics = Capabilities().numerics
        found = compress(case.traced, case.statistics, policy, RECIPE, numerics, case.images)
        names = ("block.conv2", "last", "hidden")
        kept = energies(case.traced, case.statistics, found.kept, found.tensors, names)
        assert kept.keys() == set(names)
        for name in names:
            layer, known = graph.layer_by_name[name], case.statistics.moments[name]
            weight, bias = (torch.from_numpy(found.tensors[each]) for each in (layer.weight, layer.bias))
            rows = kept_positions(graph, found.kept).get((layer.weight, 1))
            if rows is not None:
                places = (known.pooled == 1 and weight[0, 0].numel()) or 1  # a feature each
                features = (torch.from_numpy(rows)[:, None] * places + torch.arange(places)).flatten()
                known = Moments(known.mean[features], known.gram[features][:, features], known.pooled)
            gram = torch.kron(known.gram, torch.eye(known.pooled)).double().numpy()
            flat = weight.flatten(1).double().numpy()
            for rank in (1, 2, 4):
                first, _, second, _ = factors(weight, bias, rank, known)
                gone = flat - (second.flatten(1) @ first.flatten(1)).double().numpy()
                lost = np.trace(gone @ gram @ gone.T) / np.trace(flat @ gram @ flat.T)
                assert kept[name][rank - 1] == pytest.approx(1 - lost, abs=1e-4)
            assert kept[name][-1] == pytest.approx(1) and len(kept[name]) == len(flat)
            assert list(kept[name]) == sorted(kept[name])


def test_a_dead_layer_loses_nothing_with_its_ranks(case: Case) -> None:
    found = compress(case.traced, case.statistics, Policy(), RECIPE, Capabilities().numerics, case.images)
    dead = {**found.tensors, "last.weight": np.zeros_like(found.tensors["last.weight"])}
    assert energies(case.traced, case.statistics, {}, dead, ["last"])["last"].tolist() == [1.0] * 8


def test_ranges_are_those_behind_layers_that_lost_rank(case: Case) -> None:
    """Of a finalist, against the module's own values; those of the unpruned model are wider or narrower."""
    graph = case.traced.graph
    ranks = {layer.name: graph.most_rank(layer.name) // 2 for layer in graph.layers}
    policy = Policy(precisions={name: Precision("int8", "int8", rank=rank) for name, rank in ranks.items() if rank})
    recipe, numerics = replace(RECIPE, reconstruction="sequential"), Capabilities().numerics
    found = compress(case.traced, case.statistics, policy, recipe, numerics, case.images)
    plain = compress(case.traced, case.statistics, Policy(precisions={n: INT8 for n in ranks}), recipe, numerics,
                     case.images)  # fmt: skip
    common = found.params.keys() & plain.params.keys()
    assert sum(found.params[value].scale != plain.params[value].scale for value in common) > len(common) // 2


def test_pooled_moments_stand_for_every_kernel_position() -> None:
    torch.manual_seed(0)
    weight, bias, known = torch.randn(6, 3, 2, 2), torch.randn(6), moments(3, pooled=4)
    whole = Moments(known.mean.repeat_interleave(4), torch.kron(known.gram, torch.eye(4)), 1)
    for pooled, plain in zip(factors(weight, bias, 3, known), factors(weight, bias, 3, whole), strict=True):
        torch.testing.assert_close(pooled.abs(), plain.abs(), rtol=1e-3, atol=1e-4)  # axes have no sign


def ranked(case: Case, kind: Precision, share: float = 0.6) -> Policy:
    """Every second group at half, and every layer that can at a part of its largest rank."""
    graph = case.traced.graph
    kept = {group.name: group.channels // 2 for group in graph.groups[::2]}
    ranks = {layer.name: int(share * graph.most_rank(layer.name)) for layer in graph.layers}
    kinds = {name: Precision(kind.weight, kind.activation, rank=rank or None) for name, rank in ranks.items()}
    return graph.normalise(Policy(kept, frozenset(), kinds))


@pytest.mark.parametrize("kind", [FP32, INT8, Precision("int4", "int8")], ids=str)
def test_files_are_their_twins(case: Case, kind: Precision, tmp_path: Any) -> None:
    graph, policy = case.traced.graph, ranked(case, kind)
    assert sum(precision.rank is not None for precision in policy.precisions.values()) >= 5
    backend = OnnxRuntimeBackend(BackendSpec(batch=16))
    numerics = backend.capabilities().numerics
    found = compress(case.traced, case.statistics, policy, RECIPE, numerics, case.images)
    assert found.policy == policy
    file = emit(case.template, policy, found.tensors, found.weights, found.params, numerics)
    fresh = images(16, 16, seed=1)
    expected = run(found.module, fresh).numpy()
    with backend.build(file) as engine:
        outputs = engine.run(fresh.numpy())
    assert np.linalg.norm(outputs - expected) <= (1e-5 if kind == FP32 else 0.03) * np.linalg.norm(expected)
    # A skeleton for timing has the same structure, and the graph knows every tensor's shape.
    parts = structure(case.traced, policy, case.statistics, numerics, RECIPE)
    assert structure_digest(emit(case.template, policy, *parts, numerics)) == structure_digest(file)
    if kind == FP32:
        tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load_model_from_string(file).graph.initializer}
        shapes = graph.parameter_shapes(policy)
        wide = {layer.weight for layer in graph.layers if layer.op == "linear" and layer.positions > 1}
        held = {name: shape for name, shape in shapes.items() if name in tensors and name not in wide}
        assert held == {name: tensors[name].shape for name in held} and len(held) > 2 * len(graph.layers)
        macs = [prod(shapes[one.weight]) * one.positions for one in graph.paired(policy)[0].layers]
        assert graph.macs(policy) == sum(macs) < graph.macs(Policy(policy.kept))
    elif kind == INT8:
        pairs, plain = graph.paired(policy)
        optimized = backend.optimized(file, tmp_path / "optimized.onnx")
        assert int8_layers(optimized, pairs) == set(place(graph, policy).layers) == plain.precisions.keys()
    kernels = kernels_of(graph, policy, 8)
    first = kernels["stem.reduce"] if "stem.reduce" in kernels else kernels["last.reduce"]
    assert first.channels_out in {precision.rank for precision in policy.precisions.values()}


def test_an_exported_file_is_its_twin(case: Case) -> None:
    policy = ranked(case, INT8)
    backend = OnnxRuntimeBackend(BackendSpec(batch=16))
    found = compress(case.traced, case.statistics, policy, RECIPE, backend.capabilities().numerics, case.images)
    expected = run(found.module, case.images[:16]).numpy()
    with backend.build(with_codes(export_compressed(found), found.weights)) as engine:
        outputs = engine.run(case.images[:16].numpy())
    assert np.linalg.norm(outputs - expected) <= 0.03 * np.linalg.norm(expected)


def test_more_rank_loses_less(case: Case) -> None:
    reference = run(case.traced.module, case.images)
    losses = []
    for rank in (1, 2, 4, case.traced.graph.most_rank("last")):
        policy = Policy(precisions={"last": Precision(rank=rank)})
        numerics = Capabilities().numerics
        found = compress(case.traced, case.statistics, policy, RECIPE, numerics, case.images)
        losses.append(float((run(found.module, case.images) - reference).square().mean()))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.2 * losses[0]


def test_only_a_space_that_asks_for_ranks_has_them(case: Case) -> None:
    graph, runs = case.traced.graph, Capabilities((FP32, INT8), channel_multiple=2)
    plain = SearchSpace("s", precisions=(FP32, INT8))
    space = SearchSpace.from_toml(
        'precisions = ["int8", "fp32"]\nranks = [0.25, 0.5]\n[[rules]]\nmatch = "hidden"\nranks = []\n'
    )
    assert SearchSpace.from_toml(space.to_toml()) == space and space.digest != plain.digest
    assert not plain.restrict(graph, runs).ranks and "ranks" not in plain.to_toml()
    options = {decision.name: decision.options for decision in space.restrict(graph, runs).decisions}
    assert [str(option) for option in options["last"]] == ["fp32", "fp32@4", "fp32@2", "int8", "int8@4", "int8@2"]
    assert options["hidden"] == (FP32, INT8)  # by the rule
    depthwise = next(layer.name for layer in graph.layers if layer.depthwise)
    assert options[depthwise] == (FP32, INT8)
    found = space.restrict(graph, runs)
    taken = found.decode([len(decision.options) - 1 for decision in found.decisions])
    assert found.decode(found.encode(taken)) == taken and found.precisions == (FP32, INT8)
    assert all(policy.precision(name).rank is None for policy in found.uniform() for name in policy.precisions)
    lowest = found.narrowest(Policy(precisions={"last": INT8}))
    assert str(lowest.precision("last")) == "int8@2" and lowest.precision("hidden") == FP32 and found.contains(lowest)
    assert plain.restrict(graph, runs).narrowest(Policy(precisions={"last": INT8})) == Policy(precisions={"last": INT8})


def test_ranks_that_save_nothing_are_no_ranks(case: Case) -> None:
    graph = case.traced.graph
    with pytest.raises(InputError, match=r"gives last rank 8, at which it would not be smaller: give at most 7"):
        graph.validate(Policy(precisions={"last": Precision(rank=8)}))
    depthwise = next(layer.name for layer in graph.layers if layer.depthwise)
    with pytest.raises(InputError, match="give at most 0"):
        graph.validate(Policy(precisions={depthwise: Precision(rank=1)}))
    policy = Policy({"last": 2}, frozenset(), {"last": Precision("int8", "int8", rank=2)})
    assert graph.normalise(policy) == Policy({"last": 2}, frozenset(), {"last": INT8})
    for text, words in (("fp32@x", "has no rank"), ("int8@0", "leaves nothing"), ("fp7@3", "is unknown")):
        with pytest.raises(InputError, match=words):
            Precision.parse(text)
    assert Precision.parse("w4a8@16") == Precision("int4", "int8", rank=16) and str(Precision(rank=3)) == "fp32@3"
    assert Policy.from_json(policy.to_json()) == policy
    with pytest.raises(ConfigError, match="above 0 and below 1"):
        SearchSpace("s", ranks=(1.0,))
