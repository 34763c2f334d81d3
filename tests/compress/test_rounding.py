"""AdaRound and bias correction against enumeration, formulas and the engine."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocomp.compress import Compressed, collect, compress, export_compressed, export_onnx, rounding, run
from autocomp.compress.recalibrate import divergence
from autocomp.compress.rounding import _up_or_down, _View
from autocomp.engines import BackendSpec, Template, emit, initializer_bytes, load_template, with_codes
from autocomp.engines.onnxruntime import OnnxRuntimeBackend
from autocomp.errors import InputError
from autocomp.policy import INT8, Policy, Precision, Recipe
from autocomp.quantization import quantize_weight, round_biases
from tests.compress.conftest import UNSIGNED, Case

W2, W3, W4 = (Precision(f"int{bits}", "int8") for bits in (2, 3, 4))
NEAREST = Recipe(rounding="nearest", bias_correction="never")
ADAROUND = Recipe(bias_correction="never")


def applied(case: Case, kinds: dict[str, Precision], recipe: Recipe, **kept: int) -> Compressed:
    return compress(case.traced, case.statistics, Policy(kept, precisions=kinds), recipe, UNSIGNED, case.images)


def everywhere(case: Case, kind: Precision) -> dict[str, Precision]:
    return {layer.name: kind for layer in case.traced.graph.layers}


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer steps: enough to see that the rounding is used and helps."""
    monkeypatch.setattr(rounding, "STEPS", 80)


def distance(case: Case, compressed: Compressed) -> float:
    return divergence(case.statistics.logits, run(compressed.module, case.images))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("activation", [nn.Identity(), nn.ReLU()])
def test_up_or_down_is_near_the_best_of_all_choices(groups: int, activation: nn.Module) -> None:
    """A row of nine weights has 512 roundings; correlated inputs make the nearest one bad."""
    out, limit = 12, 3
    generator = torch.Generator().manual_seed(groups)
    rows = torch.randn(600, groups, 4, generator=generator) @ torch.randn(4, 9, generator=generator)
    rows = (rows + 0.3 * torch.randn(rows.shape, generator=generator)).flatten(1)
    weight = torch.randn(groups, out // groups, 9, generator=generator)
    view = _View(weight, torch.randn(out, generator=generator), activation)
    target = view(rows, weight)
    nearest = quantize_weight(weight.reshape(out, 9).numpy(), UNSIGNED, 3)
    found = _up_or_down(view, rows, target, nearest, limit, torch.Generator().manual_seed(0))

    def errors(codes: NDArray[np.float32]) -> Tensor:  # (out,): no row's choice changes another's output
        scaled = torch.from_numpy(codes.astype(np.float32) * nearest.scale[:, None])
        return (view(rows, scaled.reshape(weight.shape)) - target).square().mean(0)

    floor = np.floor(weight.reshape(out, 9).numpy() / nearest.scale[:, None])
    ups = np.array(list(product((0, 1), repeat=9)), np.float32)
    best = torch.stack([errors(np.clip(floor + up, -limit, limit)) for up in ups]).amin(0).sum()
    plain, own = errors(nearest.codes).sum(), errors(found.codes).sum()
    assert best < 0.7 * plain  # there is something to gain
    assert own - best < 0.4 * (plain - best)
    assert (np.abs(found.codes) <= limit).all() and found.scale is nearest.scale
    assert np.isin(found.codes - np.clip(floor, -limit, limit), (0, 1)).all()


@pytest.mark.usefixtures("brief")
def test_adaround_beats_nearest(mixed: Case) -> None:
    """Behind ordinary, grouped, depthwise and linear layers."""
    kinds = everywhere(mixed, W3)
    plain, chosen = applied(mixed, kinds, NEAREST), applied(mixed, kinds, ADAROUND)
    assert distance(mixed, chosen) < 0.6 * distance(mixed, plain)
    for parameter, weight in chosen.weights.items():
        assert weight.bits == 3 and np.abs(weight.codes).max() <= 3
        assert np.array_equal(weight.scale, plain.weights[parameter].scale)
        assert np.abs(weight.codes - plain.weights[parameter].codes).max() <= 1
        shown = chosen.module.get_parameter(parameter).numpy()
        assert np.array_equal(shown, weight.real)


@pytest.mark.usefixtures("brief")
def test_only_what_was_asked_for_changes(chain: Case) -> None:
    kinds = {"conv1": INT8, "conv2": W4}
    plain, chosen, again = (applied(chain, kinds, recipe) for recipe in (NEAREST, ADAROUND, ADAROUND))
    assert np.array_equal(again.weights["conv2.weight"].codes, chosen.weights["conv2.weight"].codes)
    assert np.array_equal(plain.weights["conv1.weight"].codes, chosen.weights["conv1.weight"].codes)
    assert not np.array_equal(plain.weights["conv2.weight"].codes, chosen.weights["conv2.weight"].codes)
    for name, weight in plain.weights.items():
        expected = quantize_weight(plain.tensors[name], UNSIGNED, weight.bits)
        assert np.array_equal(weight.codes, expected.codes) and np.array_equal(weight.scale, expected.scale)
    nothing = applied(chain, {}, Recipe(bias_correction="always"))
    assert (nothing.weights, nothing.params, nothing.bias_corrected) == ({}, {}, False)
    assert "quantize" not in nothing.seconds


def test_correction_restores_every_mean(mixed: Case) -> None:
    """The mean output of each channel is that of the float model; without correction it is not."""
    kinds = everywhere(mixed, W3)
    differences = []
    for correction in ("never", "always"):
        found = applied(mixed, kinds, replace(NEAREST, bias_correction=correction))
        assert found.bias_corrected == (correction == "always")
        means = [torch.cat(channel_means(module, mixed)) for module in (mixed.traced.module, found.module)]
        differences.append(float((means[1] - means[0]).abs().max()))
    assert differences[1] < 0.02 < 0.1 < differences[0]  # biases are still rounded to the engine's grid


def channel_means(module: torch.fx.GraphModule, case: Case) -> list[Tensor]:
    nodes = {layer.node for layer in case.traced.graph.layers}
    found: list[Tensor] = []

    class Means(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            if n.name in nodes:
                found.append(value.transpose(0, 1).flatten(1).mean(1))
            return value

    with torch.no_grad():
        Means(module).run(case.images)
    return found


def test_correction_is_the_formula(chain: Case) -> None:
    """(W_q - W) E[x] over the patches that the layer really reads, its padding among them."""
    found = applied(chain, {"conv2": W2}, replace(NEAREST, bias_correction="always"))
    layer = chain.traced.graph.layer_by_name["conv2"]
    weight = chain.traced.module.get_parameter(layer.weight).detach()
    with torch.no_grad():
        read = nn.functional.relu(chain.model.bn1(chain.model.conv1(chain.images)))  # type: ignore[operator]
    entry = found.params["relu"]
    codes = torch.fake_quantize_per_tensor_affine(read, entry.scale, entry.zero_point, 0, 255)

    def mean(value: Tensor) -> Tensor:
        return nn.functional.unfold(value, 3, padding=1, stride=2).mean((0, 2))

    real = torch.from_numpy(found.weights[layer.weight].real)
    shift = (weight.flatten(1) @ mean(read) - real.flatten(1) @ mean(codes)).numpy()
    step = entry.scale * found.weights[layer.weight].scale
    moved = found.tensors[layer.bias] - chain.traced.module.get_parameter(layer.bias).detach().numpy()
    assert np.abs((moved - shift) / step).max() <= 0.55
    assert np.abs(shift / step).max() > 5


def test_auto_keeps_the_better_one_and_leaves_int8_alone(mixed: Case) -> None:
    for kind, compared in ((W2, True), (W4, True), (INT8, False)):
        recipe = replace(NEAREST, bias_correction="auto")
        found, never, always = (
            applied(mixed, everywhere(mixed, kind), replace(recipe, bias_correction=choice))
            for choice in ("auto", "never", "always")
        )
        better = compared and distance(mixed, always) < distance(mixed, never)
        assert found.bias_corrected == better
        same = always if better else never
        assert torch.equal(run(found.module, mixed.images), run(same.module, mixed.images))


@pytest.fixture(scope="module")
def template(mixed: Case) -> Template:
    return load_template(export_onnx(mixed.traced), mixed.traced.graph)


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("recipe", [NEAREST, replace(ADAROUND, bias_correction="always")])
def test_torch_and_engine_agree_on_the_codes(mixed: Case, template: Template, recipe: Recipe) -> None:
    kinds = everywhere(mixed, INT8) | {"stem": W4, "inverted.3": W3, "last": W4, "hidden": W2}
    found = applied(mixed, kinds, recipe, last=4)
    again = round_biases(mixed.traced.graph, found.policy, dict(found.tensors), found.weights, found.params)
    assert all(np.allclose(found.tensors[name], bias, rtol=1e-6) for name, bias in again.items())
    files = [emit(template, found.policy, found.tensors, found.weights, found.params, UNSIGNED)]
    if recipe is not NEAREST:
        exported = export_compressed(found)
        files.append(with_codes(exported, found.weights))
        assert initializer_bytes(files[1]) < initializer_bytes(exported) / 3
        assert abs(initializer_bytes(files[1]) / initializer_bytes(files[0]) - 1) < 0.02
    expected = run(found.module, mixed.images).numpy()
    for file in files:
        with OnnxRuntimeBackend(BackendSpec(batch=16)).build(file) as engine:
            difference = np.abs(engine.run(mixed.images.numpy()) - expected)
        assert difference.mean() < 0.01 * expected.std()


@pytest.mark.usefixtures("brief")
def test_dead_channels_and_layers_of_zeros(chain: Case) -> None:
    """All-zero rows stay zero, whatever rounds them, and give no NaN."""
    traced = replace(chain.traced)
    saved = {name: tensor.clone() for name, tensor in traced.module.state_dict().items()}
    try:
        traced.module.get_parameter("conv1.weight").data[2] = 0.0
        traced.module.get_parameter("conv3.weight").data.zero_()
        statistics = collect(traced, chain.images, Recipe())
        policy = Policy(precisions=dict.fromkeys(("conv1", "conv2", "conv3", "head"), W3))
        found = compress(traced, statistics, policy, Recipe(bias_correction="always"), UNSIGNED, chain.images)
    finally:
        traced.module.load_state_dict(saved)
    assert not found.weights["conv1.weight"].codes[2].any() and not found.weights["conv3.weight"].codes.any()
    assert torch.isfinite(run(found.module, chain.images)).all()


def test_bad_precisions_are_named(chain: Case) -> None:
    with pytest.raises(InputError, match="conv2 cannot run as int4"):
        applied(chain, {"conv2": Precision("int4", "int4")}, NEAREST)
    with pytest.raises(InputError, match="never_run, which is no layer"):
        applied(chain, {"never_run": W4}, NEAREST)
    with pytest.raises(InputError, match="int1/int8 is unknown"):
        Precision("int1", "int8")
