from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from autocomp.capabilities import Numerics
from autocomp.errors import InputError
from autocomp.graph import Branch, Layer, LayerGraph, Node
from autocomp.policy import FP32, INT8, Policy, Precision
from autocomp.quantization import (
    QuantParams,
    QuantWeight,
    activation_params,
    code_max,
    place,
    quantize_weight,
    quantize_weights,
)
from tests.graphs import concat_net, parameters_of, residual_net

SCHEMES = [
    Numerics(signed, symmetric, weight_max)
    for signed in (False, True)
    for symmetric in (False, True)
    for weight_max in (63, 127)
]
floats = st.floats(-(2.0**99), 2.0**99, width=32)
weights = arrays.arrays(
    np.float32,
    st.one_of(
        st.tuples(st.integers(1, 5), st.integers(1, 4), st.just(3), st.just(3)),
        st.tuples(st.integers(1, 5), st.integers(1, 6)),
    ),
    elements=st.floats(-100, 100, width=32),
)


class TestActivations:
    @given(st.sampled_from(SCHEMES), floats, floats, st.floats(0, 1))
    def test_rounding_costs_half_a_step_inside_the_range(
        self, numerics: Numerics, one: float, other: float, where: float
    ) -> None:
        low, high = sorted((one, other))
        params = activation_params(low, high, numerics)
        smallest, largest = numerics.activation_range
        assert params.scale > 0 and np.isfinite(params.scale)
        assert params.scale == float(np.float32(params.scale))
        assert smallest <= params.zero_point <= largest  # so zero has a code of its own
        value = min(max(low + where * (high - low), low), high)
        code = np.clip(np.rint(value / params.scale) + params.zero_point, smallest, largest)
        error = abs(value - params.scale * (code - params.zero_point))
        # scales are rounded to float32: 255 steps of it may miss the end of the range by a little more than half a one
        assert error <= params.scale * (0.5 + 255 * 2**-23)

    @given(st.sampled_from(SCHEMES), floats, floats)
    def test_symmetric_means_a_fixed_zero_point(self, numerics: Numerics, one: float, other: float) -> None:
        params = activation_params(min(one, other), max(one, other), numerics)
        if numerics.symmetric_activations:
            assert params.zero_point == (0 if numerics.signed_activations else 128)

    def test_known_ranges(self) -> None:
        u8, s8 = Numerics(False, False, 127), Numerics(True, True, 127)
        assert activation_params(0.0, 25.5, u8) == QuantParams(float(np.float32(0.1)), 0)
        assert activation_params(-1.0, 1.55, u8).zero_point == 100
        assert activation_params(3.0, 25.5, u8).zero_point == 0  # zero is put into the range
        assert activation_params(-25.5, -3.0, u8).zero_point == 255
        assert activation_params(-12.7, 3.0, s8).scale == pytest.approx(0.1)

    @pytest.mark.parametrize("bound", [0.0, 1e-45, 1e-39])
    def test_a_constant_or_vanishing_tensor_has_a_usable_scale(self, bound: float) -> None:
        for numerics in SCHEMES:
            assert activation_params(-bound, bound, numerics).scale == 1.0


class TestWeights:
    @given(weights, st.sampled_from(SCHEMES))
    def test_codes_are_bounded_and_near(self, weight: NDArray[np.float32], numerics: Numerics) -> None:
        found = quantize_weight(weight, numerics)
        codes, scale = found.codes, found.scale
        assert codes.dtype == np.int8 and codes.shape == weight.shape
        assert scale.dtype == np.float32 and scale.shape == weight.shape[:1]
        assert np.abs(codes.astype(int)).max() <= numerics.weight_max
        error = np.abs(weight - found.real).reshape(len(weight), -1).max(axis=1)
        assert (error <= scale * (0.5 + 127 * 2**-22)).all()
        assert (codes[weight == 0] == 0).all()

    @given(weights, st.sampled_from(SCHEMES))
    def test_rounding_again_changes_nothing(self, weight: NDArray[np.float32], numerics: Numerics) -> None:
        once = quantize_weight(weight, numerics).real
        np.testing.assert_allclose(quantize_weight(once, numerics).real, once, rtol=1e-5, atol=0)

    def test_the_largest_weight_of_each_channel_has_the_largest_code(self) -> None:
        weight = np.array([[0.6, -1.0], [2.0, 0.02], [0.0, 0.0]], np.float32)
        found = quantize_weight(weight, Numerics(False, False, 63))
        assert found.codes.tolist() == [[38, -63], [63, 1], [0, 0]]
        np.testing.assert_allclose(found.scale[:2], [1 / 63, 2 / 63], rtol=1e-6)

    def test_subnormal_weights_become_zero(self) -> None:
        weight = np.full((2, 3), 1e-44, np.float32)
        found = quantize_weight(weight, SCHEMES[0])
        assert not found.codes.any() and (found.scale == 1).all()

    @given(weights, st.sampled_from(SCHEMES), st.integers(2, 7))
    def test_fewer_bits_stay_in_their_codes(self, weight: NDArray[np.float32], numerics: Numerics, bits: int) -> None:
        found = quantize_weight(weight, numerics, bits)
        limit = code_max(numerics, bits)
        assert limit == min(2 ** (bits - 1) - 1, numerics.weight_max) and found.bits == bits
        assert np.abs(found.codes.astype(int)).max() <= limit
        assert (found.scale > 0).all() and np.isfinite(found.real).all()
        nearest = np.clip(np.rint(weight / scale_of(found, weight)), -limit, limit)
        assert (found.codes == nearest).all()

    @pytest.mark.parametrize("bits", [2, 3, 4, 6])
    def test_scales_of_fewer_bits_are_those_of_least_error(self, bits: int) -> None:
        """Against brute force over a grid ten times as fine, with no least squares behind it."""
        rng = np.random.default_rng(bits)
        weight = rng.standard_t(4, (6, 48)).astype(np.float32)
        limit = 2 ** (bits - 1) - 1
        found = quantize_weight(weight, SCHEMES[1], bits)
        for row, real in zip(weight, found.real, strict=True):
            scales = np.abs(row).max() / limit * np.linspace(0.1, 1.0, 320)[:, None]
            errors = ((np.clip(np.rint(row / scales), -limit, limit) * scales - row) ** 2).sum(1)
            assert ((real - row) ** 2).sum() <= 1.02 * errors.min()
            assert ((real - row) ** 2).sum() <= errors[-1] * (0.9 if bits < 4 else 1)  # the last cuts nothing off

    def test_a_layer_of_zeros(self) -> None:
        for bits in (2, 4, 8):
            found = quantize_weight(np.zeros((3, 2, 3, 3), np.float32), SCHEMES[0], bits)
            assert not found.codes.any() and (found.scale == 1).all()

    @pytest.mark.parametrize("bits", [0, 1, 9, 16])
    def test_bits_that_cannot_be_stored(self, bits: int) -> None:
        with pytest.raises(InputError, match=f"{bits} bits"):
            quantize_weight(np.ones((1, 1), np.float32), SCHEMES[0], bits)

    def test_every_integer_layer_gets_its_bits(self) -> None:
        graph = residual_net(1)
        rng = np.random.default_rng(0)
        tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in graph.parameters.items()}
        policy = Policy(precisions={"stem": INT8, "blocks.0.a": Precision.parse("w3a8")})
        found = quantize_weights(graph, policy, tensors, SCHEMES[1])
        assert {name: weight.bits for name, weight in found.items()} == {"stem.weight": 8, "blocks.0.a.weight": 3}


def scale_of(found: QuantWeight, weight: NDArray[np.float32]) -> NDArray[np.float32]:
    return found.scale.reshape(-1, *[1] * (weight.ndim - 1))


def every(graph: LayerGraph) -> dict[str, object]:
    return {layer.name: INT8 for layer in graph.layers}


def quantized(graph: LayerGraph, policy: Policy) -> dict[str, str]:
    return dict(place(graph, policy).values)


class TestPlace:
    def test_fp32_places_nothing(self) -> None:
        plan = place(residual_net(2), Policy())
        assert (dict(plan.values), plan.layers, plan.observed) == ({}, (), ())

    def test_a_whole_residual_net(self) -> None:
        """Pairs stand at the input, behind each fused ReLU, on both inputs of an addition and behind it; the head
        reads its own, and the logits stay float."""
        graph = residual_net(2)
        plan = place(graph, Policy(precisions=every(graph)))
        expected = ["x", "relu_stem", "relu_0a", "conv_0b", "relu_0", "relu_1a", "conv_1b", "relu_1", "flatten"]
        assert dict(plan.values) == {value: value for value in expected}
        assert plan.observed == tuple(expected)
        assert plan.layers == tuple(layer.name for layer in graph.layers)

    def test_activations_of_fewer_bits_are_refused(self) -> None:
        with pytest.raises(InputError, match="stem cannot run as int4"):
            place(residual_net(1), Policy(precisions={"stem": Precision("int4", "int4")}))

    def test_one_layer_alone(self) -> None:
        graph = residual_net(2)
        assert quantized(graph, Policy(precisions={"blocks.0.a": INT8})) == {
            "relu_stem": "relu_stem",
            "relu_0a": "relu_0a",
        }
        assert quantized(graph, Policy(precisions={"head": INT8})) == {"flatten": "flatten"}

    def test_an_addition_runs_in_int8_when_all_it_reads_is_quantized(self) -> None:
        graph = residual_net(2)
        both = quantized(graph, Policy(precisions={"blocks.0.b": INT8, "stem": INT8}))
        assert {"relu_stem", "conv_0b", "relu_0"} <= set(both)  # relu_0 stands behind the addition
        only_branch = quantized(graph, Policy(precisions={"blocks.0.b": INT8}))
        assert set(only_branch) == {"relu_0a", "conv_0b"}
        # relu_0 is quantized by the addition, conv_1b by its layer: the second addition follows
        chained = quantized(graph, Policy(precisions={"blocks.0.b": INT8, "stem": INT8, "blocks.1.b": INT8}))
        assert "relu_1" in chained

    def test_a_dropped_branch_leaves_no_trace(self) -> None:
        graph = residual_net(2)
        policy = graph.normalise(Policy({}, frozenset({"blocks.0"}), every(graph)))
        plan = place(graph, policy)
        assert not {"relu_0a", "conv_0b", "add_0"} & set(plan.values)
        assert "blocks.0.a" not in plan.layers
        # what read the addition reads the stream: the ReLU behind it is read by block 1, so it is quantized for it
        assert set(plan.values) == {"x", "relu_stem", "relu_0", "relu_1a", "conv_1b", "relu_1", "flatten"}

    def test_all_branches_dropped(self) -> None:
        graph = residual_net(3)
        policy = graph.normalise(Policy({}, frozenset(graph.branch_by_name), every(graph)))
        assert set(quantized(graph, policy)) == {"x", "relu_stem", "flatten"}

    def test_moved_values_share_the_scale_of_their_source(self) -> None:
        """A concatenation of quantized values is quantized; pooling and reshaping only move its values."""
        graph = concat_net()
        assert quantized(graph, Policy(precisions=every(graph))) == {
            "x": "x",
            "relu_left": "relu_left",
            "conv_right": "conv_right",
            "relu_depth": "relu_depth",
            "cat": "cat",
            "view": "cat",
        }

    def test_a_concatenation_with_a_float_input_stays_float(self) -> None:
        graph = concat_net()
        found = quantized(graph, Policy(precisions={"left": INT8, "head": INT8}))
        assert found == {"x": "x", "relu_left": "relu_left", "view": "view"}

    def test_a_shortcut_of_slice_and_pad_keeps_the_streams_scale(self) -> None:
        graph = residual_net(1)
        nodes = list(graph.nodes)
        place_of = {node.name: index for index, node in enumerate(nodes)}
        add = nodes[place_of["add_0"]]
        nodes[place_of["add_0"]] = replace(add, inputs=("pad", "conv_0b"))
        shape = add.shape
        nodes[place_of["add_0"] : place_of["add_0"]] = [
            Node("slice", "slice", ("relu_stem",), shape),
            Node("pad", "pad", ("slice",), shape),
        ]
        branch = Branch("blocks.0", "add_0", "pad", "conv_0b", graph.branches[0].layers)
        shortcut = replace(graph, nodes=tuple(nodes), branches=(branch,))
        found = quantized(shortcut, Policy(precisions=every(shortcut)))
        assert found["pad"] == "relu_stem" and found["relu_stem"] == "relu_stem"
        assert found["relu_0"] == "relu_0"
        policy = shortcut.normalise(Policy({}, frozenset({"blocks.0"}), every(shortcut)))
        assert "conv_0b" not in quantized(shortcut, policy)

    def test_a_value_read_twice_is_quantized_before_its_activation(self) -> None:
        """A convolution whose output is also read elsewhere cannot swallow the ReLU."""
        layer = Layer("a", "conv", "conv", (4, 3, 1, 1), 16, (1, 1), (0, 0), (1, 1))
        nodes = (
            Node("x", "input", (), (3, 4, 4)),
            Node("conv", "conv2d", ("x",), (4, 4, 4)),
            Node("relu", "relu", ("conv",), (4, 4, 4)),
            Node("mul", "mul", ("conv", "relu"), (4, 4, 4)),
        )
        graph = LayerGraph(nodes, "mul", (layer,), (), (), parameters_of((layer,)))
        assert set(quantized(graph, Policy(precisions={"a": INT8}))) == {"x", "conv"}

    def test_the_scale_of_an_excited_map_is_quantized_with_it(self) -> None:
        """Behind a sigmoid or another gate; a second map that is float leaves a product in float."""
        layers = tuple(Layer(name, "conv", name, (4, 4, 1, 1), 16, (1, 1), (0, 0), (1, 1)) for name in "ab")
        nodes = (
            Node("x", "input", (), (4, 4, 4)),
            Node("a", "conv2d", ("x",), (4, 4, 4)),
            Node("sigmoid", "sigmoid", ("a",), (4, 4, 4)),
            Node("silu", "mul", ("a", "sigmoid"), (4, 4, 4)),
            Node("mean", "mean", ("silu",), (4, 1, 1)),
            Node("gate", "hardsigmoid", ("mean",), (4, 1, 1)),
            Node("scaled", "mul", ("gate", "silu"), (4, 4, 4)),
            Node("tanh", "tanh", ("scaled",), (4, 4, 4)),
            Node("product", "mul", ("scaled", "tanh"), (4, 4, 4)),
            Node("b", "conv2d", ("product",), (4, 4, 4)),
        )
        graph = LayerGraph(nodes, "b", layers, (), (), parameters_of(layers))
        found = quantized(graph, Policy(precisions={"a": INT8}))
        assert set(found) == {"x", "a", "sigmoid", "silu", "gate", "scaled"}
        assert quantized(graph, Policy(precisions={"b": INT8})).keys() == {"product", "b"}

    def test_a_linear_layer_over_several_axes_writes_floats(self) -> None:
        layers = tuple(Layer(name, "linear", name, (4, 4), 7) for name in "ab")
        nodes = (
            Node("x", "input", (), (7, 4)),
            Node("a", "linear", ("x",), (7, 4)),
            Node("gelu", "gelu", ("a",), (7, 4)),
            Node("b", "linear", ("gelu",), (7, 4)),
            Node("add", "add", ("x", "b"), (7, 4)),
        )
        graph = LayerGraph(nodes, "add", layers, (), (), parameters_of(layers))
        assert set(quantized(graph, Policy(precisions=every(graph)))) == {"x", "gelu"}

    @given(st.lists(st.booleans(), min_size=8, max_size=8), st.lists(st.booleans(), min_size=3, max_size=3))
    def test_of_any_policy(self, int8: list[bool], drops: list[bool]) -> None:
        graph = residual_net(3)
        precisions = {layer.name: INT8 if chosen else FP32 for layer, chosen in zip(graph.layers, int8, strict=True)}
        dropped = frozenset(branch.name for branch, drop in zip(graph.branches, drops, strict=True) if drop)
        policy = graph.normalise(Policy({}, dropped, precisions))
        plan = place(graph, policy)
        assert set(plan.layers) == set(policy.precisions)
        assert set(plan.observed) <= set(plan.values)
        gone = {node for name in dropped for node in (f"conv_{name[-1]}a", f"conv_{name[-1]}b", f"add_{name[-1]}")}
        assert not gone & set(plan.values) and "linear" not in plan.values
        stream = {f"add_{k}": f"relu_{k - 1}" if k else "relu_stem" for k in range(3) if f"blocks.{k}" in dropped}
        for name in plan.layers:
            read = graph.node_by_name[graph.layer_by_name[name].node].inputs[0]
            assert stream.get(read, read) in plan.values
