"""Policies turned into weights: slicing, recalibration, int8, determinism, refusals."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from autocomp.capabilities import Numerics
from autocomp.compress import Compressed, collect, compress, run, structure, trace
from autocomp.compress.recalibrate import divergence, recalibrated
from autocomp.compress.surgery import tensors_of
from autocomp.errors import CompressError, DataError, InputError
from autocomp.fake_quant import fake_quantize
from autocomp.policy import INT8, Policy, Recipe
from autocomp.quantization import QuantParams, activation_params, place
from tests.compress.conftest import UNSIGNED, Case
from tests.compress.nets import Chain, images, trained

SIGNED = Numerics(signed_activations=True, symmetric_activations=True, weight_max=127)


def everywhere(case: Case, **kept: int) -> Policy:
    return Policy(kept, precisions={layer.name: INT8 for layer in case.traced.graph.layers})


def applied(case: Case, policy: Policy, numerics: Numerics = UNSIGNED, **recipe: object) -> Compressed:
    chosen = replace(Recipe(), **recipe)  # type: ignore[arg-type]
    return compress(case.traced, case.statistics, policy, chosen, numerics, case.images)


def test_the_empty_policy_changes_nothing(mixed: Case) -> None:
    compressed = applied(mixed, Policy())
    before = tensors_of(mixed.traced.module)
    assert compressed.tensors.keys() == before.keys()
    assert all(np.array_equal(compressed.tensors[name], before[name].numpy()) for name in before)
    assert (compressed.params, compressed.kept, compressed.recalibrated) == ({}, {}, False)


def test_shapes_are_those_the_graph_foretells(mixed: Case) -> None:
    graph = mixed.traced.graph
    policy = Policy({"stem": 3, "inverted.0": 5, "left": 2, "last": 3}, frozenset({"plain"}))
    compressed = applied(mixed, policy)
    shapes = {name: array.shape for name, array in compressed.tensors.items()}
    assert shapes == graph.parameter_shapes(policy)
    tensors, _, _ = structure(mixed.traced, policy, mixed.statistics, UNSIGNED, Recipe())
    assert {name: array.shape for name, array in tensors.items()} == {
        name: shape for name, shape in shapes.items() if not name.startswith("plain.")
    }
    assert run(compressed.module, mixed.images).shape == (64, 5)
    assert {name: len(channels) for name, channels in compressed.kept.items()} == dict(policy.kept)


def test_structure_names_what_compress_will_make(mixed: Case) -> None:
    policy = everywhere(mixed, stem=4, last=4)
    tensors, weights, params = structure(mixed.traced, policy, mixed.statistics, UNSIGNED, Recipe())
    compressed = applied(mixed, policy)
    assert params.keys() == compressed.params.keys() == place(mixed.traced.graph, policy).values.keys()
    assert {n: a.shape for n, a in tensors.items()} == {n: a.shape for n, a in compressed.tensors.items()}
    kinds = [{n: (w.codes.shape, w.bits) for n, w in found.items()} for found in (weights, compressed.weights)]
    assert kinds[0] == kinds[1] and len(kinds[0]) == len(policy.precisions)


def test_choices_inside_a_dropped_branch_do_not_count(mixed: Case) -> None:
    plain = applied(mixed, Policy(dropped=frozenset({"plain"})))
    more = applied(mixed, Policy({"plain.conv1": 3}, frozenset({"plain"}), {"plain.conv2": INT8}))
    assert plain.policy == more.policy
    assert torch.equal(run(plain.module, mixed.images), run(more.module, mixed.images))


def test_equal_inputs_give_equal_weights(mixed: Case) -> None:
    policy = replace(everywhere(mixed, stem=4, left=3), dropped=frozenset({"plain"}))
    statistics = collect(mixed.traced, mixed.images, Recipe())
    first, second = (
        compress(mixed.traced, found, policy, Recipe(), UNSIGNED, mixed.images)
        for found in (mixed.statistics, statistics)
    )
    assert first.params == second.params
    assert all(np.array_equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
    assert torch.equal(run(first.module, mixed.images), run(second.module, mixed.images))


def test_compressing_leaves_the_trace_alone(mixed: Case) -> None:
    before = {name: tensor.clone() for name, tensor in mixed.traced.module.state_dict().items()}
    code = mixed.traced.module.code
    applied(mixed, everywhere(mixed, stem=4), recalibration="always")
    assert mixed.traced.module.code == code
    after = mixed.traced.module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_recalibration_is_batch_norm_in_training_mode() -> None:
    model = trained(Chain())
    data = images(96, 8, seed=4) * 1.7 + 0.4  # other statistics than the running ones
    traced = trace(model, data[:2])
    fresh = recalibrated(traced.module, traced.graph, traced.norms, data, batch=32)
    module = copy.deepcopy(traced.module)
    for name, tensor in fresh.items():
        module.get_parameter(name).data.copy_(tensor)
    reference = copy.deepcopy(model)
    for part in reference.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
            part.momentum = None  # cumulative average
            part.train()
    with torch.no_grad():
        for part in data.split(32):  # type: ignore[no-untyped-call]
            reference(part)
        expected = reference.eval()(data)
    torch.testing.assert_close(run(module, data), expected, rtol=1e-3, atol=1e-4)
    assert float((run(traced.module, data) - expected).abs().max()) > 0.05  # it was not so before


def test_recalibration_is_kept_where_it_helps(chain: Case) -> None:
    policy = Policy({"conv1": 4, "conv2": 3})
    compressed = applied(chain, policy, reconstruction="none")
    before, after = compressed.divergence_before, compressed.divergence_after
    assert before is not None and after is not None
    assert compressed.recalibrated == (after <= before)
    never = applied(chain, policy, reconstruction="none", recalibration="never")
    always = applied(chain, policy, reconstruction="none", recalibration="always")
    assert (never.recalibrated, always.recalibrated) == (False, True)
    same = always if compressed.recalibrated else never
    assert torch.equal(run(compressed.module, chain.images), run(same.module, chain.images))
    for found, value in ((never, before), (always, after)):
        assert divergence(chain.statistics.logits, run(found.module, chain.images)) == pytest.approx(value, rel=1e-5)


def test_divergence_is_kullback_leibler() -> None:
    reference, other = torch.randn(20, 7), torch.randn(20, 7)
    p, q = reference.softmax(1).numpy(), other.softmax(1).numpy()
    assert divergence(reference, other) == pytest.approx(float((p * np.log(p / q)).sum(1).mean()), rel=1e-4)
    assert divergence(reference, reference + 3.0) == pytest.approx(0.0, abs=1e-6)


class _Formula(fx.Interpreter):
    """A float module with quantization written out: round to a code, clip it, scale it back."""

    def __init__(self, module: fx.GraphModule, params: dict[str, QuantParams], numerics: Numerics) -> None:
        super().__init__(module)
        self.params, self.numerics = params, numerics

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        chosen = self.params.get("input" if n.op == "placeholder" else n.name)
        if chosen is None:
            return value
        low, high = self.numerics.activation_range
        codes = torch.clamp(torch.round(value / chosen.scale) + chosen.zero_point, low, high)
        return (codes - chosen.zero_point) * chosen.scale


@pytest.mark.parametrize("numerics", [UNSIGNED, SIGNED, replace(UNSIGNED, weight_max=63)])
def test_int8_is_the_affine_formula(mixed: Case, numerics: Numerics) -> None:
    graph = mixed.traced.graph
    compressed = applied(mixed, everywhere(mixed), numerics)
    rounded = copy.deepcopy(mixed.traced.module)
    for layer in graph.layers:
        weight = rounded.get_parameter(layer.weight)
        scale = weight.abs().flatten(1).amax(1) / numerics.weight_max
        shaped = scale.reshape(-1, *[1] * (weight.ndim - 1))
        weight.data.copy_(torch.round(weight / shaped) * shaped)
        read = graph.node_by_name[layer.node].inputs[0]
        step, bias = scale * compressed.params[read].scale, rounded.get_parameter(layer.bias)
        bias.data.copy_(torch.round(bias / step) * step)
    formula = _Formula(rounded, dict(compressed.params), numerics)
    with torch.no_grad():
        expected = formula.run(mixed.images)
    found = run(compressed.module, mixed.images)
    spread = float(expected.std())
    assert float((found - expected).abs().max()) < 0.02 * spread  # a tie may round the other way
    assert float((found - run(mixed.traced.module, mixed.images)).abs().max()) > 0.02 * spread


def test_int8_parameters_cover_the_ranges_seen(chain: Case) -> None:
    compressed = applied(chain, everywhere(chain))
    with torch.no_grad():
        first = nn.functional.relu(chain.model.bn1(chain.model.conv1(chain.images)))  # type: ignore[operator]
    assert compressed.params["input"] == activation_params(
        float(chain.images.min()), float(chain.images.max()), UNSIGNED
    )
    assert compressed.params["relu"].scale == pytest.approx(float(first.max()) / 255, rel=1e-4)
    assert compressed.params["relu"].zero_point == 0


def test_percentile_ranges_leave_the_tails_out(chain: Case) -> None:
    recipe = Recipe(ranges="percentile", percentile=98.0)
    statistics = collect(chain.traced, chain.images, recipe)
    low, high = np.percentile(chain.images.numpy(), (1.0, 99.0))
    assert statistics.ranges["input"] == pytest.approx((low, high), rel=0.02)
    for reconstruction in ("closed_form", "none"):  # by the statistics, and by a pass of its own
        chosen = replace(recipe, reconstruction=reconstruction, recalibration="never")  # type: ignore[arg-type]
        policy = everywhere(chain, conv2=3)
        compressed = compress(chain.traced, statistics, policy, chosen, UNSIGNED, chain.images)
        assert compressed.params["input"].scale * 255 == pytest.approx(high - low, rel=0.02)


def test_tensors_are_the_weights_before_rounding(mixed: Case) -> None:
    rounded = applied(mixed, everywhere(mixed, stem=4))
    whole = applied(mixed, Policy({"stem": 4}))
    weights = [name for name in whole.tensors if name.endswith(".weight")]
    assert all(np.array_equal(rounded.tensors[name], whole.tensors[name]) for name in weights)
    name = "stem.weight"
    assert not np.array_equal(rounded.module.get_parameter(name).numpy(), whole.tensors[name])
    assert rounded.module.state_dict().keys() == whole.module.state_dict().keys()


def test_unfit_policies_and_images_are_refused(chain: Case) -> None:
    with pytest.raises(InputError, match="no prunable group"):
        applied(chain, Policy({"elsewhere": 1}))
    with pytest.raises(CompressError, match="do not fit statistics"):
        compress(chain.traced, chain.statistics, Policy(), Recipe(), UNSIGNED, chain.images[:5])
    for wrong in (chain.images[:, :2], chain.images[:0], chain.images.long()):
        with pytest.raises(DataError, match="float images of shape"):
            collect(chain.traced, wrong, Recipe())
    with pytest.raises(DataError, match="NaN"):
        collect(chain.traced, chain.images.clone().index_fill_(0, torch.tensor([3]), torch.nan), Recipe())


def test_a_layer_that_overflows_is_named(chain: Case) -> None:
    broken = copy.deepcopy(chain.traced)
    broken.module.get_parameter("conv2.bias").data[1] = float("nan")
    with pytest.raises(CompressError, match="conv2"):
        collect(broken, chain.images, Recipe())


numbers = st.floats(-50, 50, width=32)


@given(st.lists(numbers, min_size=1, max_size=30), st.floats(2**-10, 1.0, width=32), st.integers(0, 255))
def test_fake_quantization_is_torchs(values: list[float], scale: float, zero_point: int) -> None:
    """Up to ties, where torch multiplies by the reciprocal of the scale and engines divide."""
    value = torch.tensor(values)
    found = fake_quantize(value, scale, zero_point, 0, 255)
    expected = torch.fake_quantize_per_tensor_affine(value, scale, zero_point, 0, 255)
    tie = (value / scale - torch.floor(value / scale) - 0.5).abs() < 1e-3
    torch.testing.assert_close(found[~tie], expected[~tie])
    assert ((found - expected).abs() <= 1.001 * scale).all()


def test_a_model_that_travelled_compresses_to_the_same_bits(mixed: Case) -> None:
    travelled = pickle.loads(pickle.dumps(mixed.traced))
    assert [node.name for node in travelled.module.graph.nodes] == [n.name for n in mixed.traced.module.graph.nodes]
    policy = everywhere(mixed, stem=4, last=4)
    here, there = applied(mixed, policy), applied(replace(mixed, traced=travelled), policy)
    assert here.params == there.params and here.tensors.keys() == there.tensors.keys()
    assert all(np.array_equal(here.tensors[name], there.tensors[name]) for name in here.tensors)
