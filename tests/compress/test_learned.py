"""A quantized model trained with its codes: where it starts, what it learns, and that the engine computes it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from autocomp.capabilities import Numerics
from autocomp.compress import (
    Compressed,
    collect,
    compress,
    export_onnx,
    logits_of,
    quantize_learned,
    quantize_tuned,
    run,
    trace,
)
from autocomp.compress.recalibrate import divergence
from autocomp.data.arrays import ArraySplit
from autocomp.data.preprocess import IMAGENET
from autocomp.engines import BackendSpec, emit, load_template, make_backend
from autocomp.policy import INT8, Policy, Precision, Recipe
from autocomp.quantization import code_max
from autocomp.train import Training, TrainingRecipe, finetune, learnable, learned
from autocomp.train.norms import folded, normalised
from tests.compress.conftest import UNSIGNED, Case
from tests.study import tiny

RECIPE = Recipe(reconstruction="sequential", rounding="nearest", images=64)
SIGNED = Numerics(signed_activations=True, symmetric_activations=True, weight_max=127)


def policies(case: Case, bits: str = "int8", floats: tuple[str, ...] = ()) -> tuple[Policy, Policy]:
    """Three quarters of the channels, in float and quantized."""
    kept = {group.name: -(-3 * group.channels // 4) for group in case.traced.graph.groups}
    kinds = {layer.name: Precision.parse(bits) for layer in case.traced.graph.layers if layer.name not in floats}
    return Policy(kept), Policy(kept, frozenset(), kinds)


def started(
    case: Case, policy: tuple[Policy, Policy], numerics: Numerics = UNSIGNED, recipe: Recipe = RECIPE
) -> tuple[Compressed, Compressed]:
    float_, whole = (compress(case.traced, case.statistics, one, recipe, numerics, case.images) for one in policy)
    return float_, whole


def noise(count: int, size: int) -> ArraySplit:
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    return ArraySplit(pixels, np.zeros(count, np.int64), np.arange(count), IMAGENET, "noise")


@pytest.mark.parametrize(
    ("net", "bits", "numerics", "rounding"),
    [
        ("mixed", "int8", UNSIGNED, "nearest"),
        ("mixed", "w3a8", SIGNED, "nearest"),
        ("chain", "w3a8", UNSIGNED, "adaround"),
    ],
)
def test_training_starts_from_the_calibrated_model(
    net: str, bits: str, numerics: Numerics, rounding: Any, request: pytest.FixtureRequest
) -> None:
    case: Case = request.getfixturevalue(net)
    pruned, start = started(
        case, policies(case, bits, ("block.conv2", "left")), numerics, replace(RECIPE, rounding=rounding)
    )
    student = learnable(start)
    assert torch.equal(run(student, case.images), run(start.module, case.images))
    tensors, weights, params = learned(start, {name: p.detach().numpy() for name, p in student.named_parameters()})
    again = quantize_learned(pruned, tensors, start.policy, weights, params, numerics)
    assert again.params == start.params and again.plan == start.plan and again.weights.keys() == start.weights.keys()
    for name, codes in start.weights.items():
        assert np.array_equal(again.weights[name].codes, codes.codes) and again.weights[name].bits == codes.bits
        assert np.array_equal(again.weights[name].scale, codes.scale)
    assert torch.equal(run(again.module, case.images), run(start.module, case.images))


def test_weights_scales_and_ranges_learn_and_moved_values_share(mixed: Case) -> None:
    _, start = started(mixed, policies(mixed))
    student = learnable(start)
    for name, weight in student.named_parameters():
        weight.requires_grad_("running" not in name)  # of the norm behind a concatenation
    student(mixed.images[:8]).square().sum().backward()
    learning = {name for name, weight in student.named_parameters() if weight.grad is not None and weight.grad.any()}
    steps = {f"{owner}_step" for owner in (*start.weights, *start.plan.observed)}
    assert learning >= {*start.weights, *steps}
    assert any(value != source for value, source in start.plan.values.items())
    assert {name for name in learning if name.endswith("_step")} == steps


@pytest.mark.parametrize("kind", ["folded", "batch"])
def test_norms_that_were_not_folded_keep_their_statistics(kind: Any, mixed: Case) -> None:
    pruned, start = started(mixed, policies(mixed))
    norms = [name for name in pruned.tensors if name.rpartition(".")[2] in ("running_mean", "running_var")]
    assert norms
    recipe = TrainingRecipe(epochs=1, batch=16, crop=0, flip=0.0, norms=kind)
    layers = [layer for layer in pruned.graph.layers if layer.normalised]
    for module in (pruned.module, learnable(start)):
        tuned = finetune(Training(module, None, noise(32, 16), recipe, norms=layers), lambda event: None)
        assert not tuned.tensors.keys() & set(norms)
        assert not np.array_equal(tuned.tensors["joint_bn.weight"], pruned.tensors["joint_bn.weight"])
    tensors, weights, params = learned(start, tuned.tensors)
    found = quantize_learned(pruned, tensors, start.policy, weights, params, UNSIGNED)
    assert all(np.array_equal(found.tensors[name], pruned.tensors[name]) for name in norms)


def test_the_engine_computes_what_was_trained(chain: Case) -> None:
    pruned, start = started(chain, policies(chain))
    student, recipe = learnable(start), TrainingRecipe(epochs=1, batch=32, lr=0.05, ema=0.0, crop=0, flip=0.0)
    tuned = finetune(Training(student, chain.traced.module, noise(128, 8), recipe), lambda event: None)
    tensors, weights, params = learned(start, tuned.tensors)
    found = quantize_learned(pruned, tensors, start.policy, weights, params, start.numerics)
    student.load_state_dict({name: torch.from_numpy(np.asarray(value)) for name, value in tuned.tensors.items()})
    expected = run(student, chain.images)
    assert found.params != start.params
    assert {value: entry.zero_point for value, entry in found.params.items()} == {
        value: entry.zero_point for value, entry in start.params.items()
    }
    limit = code_max(UNSIGNED, 8)
    assert max(abs(int(weight.codes.min())) for weight in found.weights.values()) <= limit
    template = load_template(export_onnx(chain.traced), chain.traced.graph)
    onnx = emit(template, found.policy, found.tensors, found.weights, found.params, UNSIGNED)
    images = chain.images.numpy()
    ours = logits_of(found.module, images)
    size = np.abs(ours).max()
    np.testing.assert_allclose(ours, expected.numpy(), atol=0.02 * size)  # but for biases on the engine's grid
    with make_backend(BackendSpec(batch=len(images))).build(onnx) as engine:
        np.testing.assert_allclose(engine.run(images), ours, atol=0.02 * size)


def test_factors_of_live_norms_go_into_steps_and_leave_codes_alone(mixed: Case) -> None:
    pruned, start = started(mixed, policies(mixed))
    layers = [layer for layer in pruned.graph.layers if layer.normalised]
    assert layers
    live = normalised(learnable(start), layers, iter([mixed.images]))
    draw = torch.Generator().manual_seed(0)
    factors = {name: weight for name, weight in live.named_parameters() if name.endswith("norm_factor")}
    assert factors.keys() == {f"{layer.name}.norm_factor" for layer in layers}
    with torch.no_grad():
        for factor in factors.values():
            factor.mul_(0.7 + 0.6 * torch.rand(factor.shape, generator=draw))
        factors["stem.norm_factor"][0] *= -1
    tensors, weights, params = learned(start, folded(live, layers, iter([mixed.images])))
    for name, before in start.weights.items():
        sign = np.ones_like(before.codes)
        sign[0] = -1 if name == "stem.weight" else 1
        assert np.array_equal(weights[name].codes, sign * before.codes)
    found = quantize_learned(pruned, tensors, start.policy, weights, params, start.numerics)
    expected = run(live, mixed.images)
    size = float(expected.abs().max())
    torch.testing.assert_close(run(found.module, mixed.images), expected, rtol=0, atol=0.02 * size)


def test_few_bits_need_training_with_the_codes() -> None:
    draws = [ArraySplit(*tiny.images(600, seed), np.arange(600), IMAGENET, str(seed)) for seed in range(2)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = tiny.model().eval()
    recipe = TrainingRecipe(epochs=4, lr=0.05, batch=64, crop=0, flip=0.0, distillation=1.0)
    tensors = finetune(Training(network, None, draws[0], recipe), lambda event: None).tensors
    network.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})
    ((pixels, _),) = draws[1].batches(600)
    images = torch.from_numpy(pixels)
    calibration, held_out = images[:64], images[64:]
    traced = trace(network, images[:2])
    case = Case(network, traced, calibration, collect(traced, calibration, RECIPE))
    whole = Policy(precisions={layer.name: Precision.parse("w2a8") for layer in traced.graph.layers})
    pruned, start = started(case, (Policy(), whole))
    wanted = run(traced.module, held_out)

    def lost(compressed: Compressed) -> float:
        return divergence(wanted, run(compressed.module, held_out))

    def trained(module: nn.Module) -> Mapping[str, NDArray[np.float32]]:
        return finetune(Training(module, traced.module, draws[0], recipe), lambda event: None).tensors

    tuned, weights, params = learned(start, trained(learnable(start)))
    with_codes = quantize_learned(pruned, tuned, whole, weights, params, UNSIGNED)
    afterwards = quantize_tuned(
        pruned, trained(pruned.module), whole, RECIPE, UNSIGNED, calibration, case.statistics.logits
    )
    assert lost(with_codes) < 0.3 * min(lost(start), lost(afterwards))
    assert {np.abs(weight.codes).max() for weight in with_codes.weights.values()} == {1}


def test_precisions_may_be_mixed(chain: Case) -> None:
    _, start = started(chain, policies(chain, "int8", ("conv2",)))
    student = learnable(start)
    names = dict(student.named_parameters())
    assert "conv2.weight" in names and "conv2.weight_step" not in names and "conv1.weight_step" in names
    assert start.policy.precision("conv1") == INT8
