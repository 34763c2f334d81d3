"""The typed model against torch's own fake quantization, and what ONNX Runtime makes of it."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from autocomp.engines import BackendSpec, emit, initializer_bytes, int8_layers, load_template, structure_digest
from autocomp.engines.onnxruntime import OnnxRuntimeBackend
from autocomp.engines.simulated import SimulatedBackend
from autocomp.errors import EngineError
from autocomp.policy import INT8, Policy
from autocomp.quantization import place, round_biases
from tests.engines.conftest import Case, case
from tests.engines.nets import NATIVE, Net

INTEGER = ("QLinearConv", "QGemm", "MatMulIntegerToFloat")


def everywhere(net: Net) -> Policy:
    return Policy(precisions={layer.name: INT8 for layer in net.graph.layers})


def optimized(data: bytes, folder: Path) -> onnx.ModelProto:
    path = folder / "optimized.onnx"
    return onnx.load_model_from_string(OnnxRuntimeBackend(BackendSpec()).optimized(data, path))


def exact(data: bytes, images: np.ndarray) -> np.ndarray:
    """Outputs with every Q/DQ pair computed in float, which torch's fake quantization is too."""
    with SimulatedBackend(BackendSpec(batch=len(images))).build(data) as engine:
        return engine.run(images)


def random_policy(net: Net, rng: np.random.Generator) -> Policy:
    graph = net.graph
    kept = {g.name: 8 * int(rng.integers(1, g.channels // 8 + 1)) for g in graph.groups if rng.random() < 0.7}
    dropped = frozenset(b.name for b in graph.branches if rng.random() < 0.25)
    precisions = {layer.name: INT8 for layer in graph.layers if rng.random() < 0.6}
    return graph.normalise(Policy(kept, dropped, precisions))


def vgg() -> Net:
    net = Net((3, 16, 16))
    x = net.max_pool(net.relu(net.conv("c1", "input", 8)))
    x = net.max_pool(net.relu(net.conv("c2", x, 16)))
    x = net.relu(net.linear("f1", net.flatten(x), 32))
    net.linear("f2", x, 10)
    net.groups.clear()
    return net


def mobile() -> Net:
    """An inverted residual with a depthwise convolution and ReLU6, its expansion prunable."""
    net = Net((3, 16, 16))
    x = net.relu6(net.conv("c1", "input", 16))
    y = net.relu6(net.conv("expand", x, 32, 1))
    y = net.relu6(net.conv("depth", y, 32, groups=32))
    y = net.conv("project", y, 16, 1)
    parts = [("expand.weight", 0), ("expand.bias", 0), ("depth.weight", 0), ("depth.bias", 0), ("project.weight", 1)]
    net.group("expand", 32, *parts)
    net.linear("f", net.flatten(net.average(net.add(x, y))), 10)
    return net


def fire() -> Net:
    net = Net((3, 16, 16))
    x = net.relu(net.conv("c1", "input", 16))
    x = net.cat(net.relu(net.conv("a", x, 16, 1)), net.relu(net.conv("b", x, 16)))
    x = net.relu(net.conv("c2", x, 8))
    net.linear("f", net.flatten(net.average(x)), 10)
    return net


def convolutional() -> Net:
    """Its logits come from a convolution, and are quantized."""
    net = Net((3, 8, 8))
    x = net.relu(net.conv("c1", "input", 8))
    net.conv("head", x, 10)
    return net


def test_float_model_is_unchanged(resnet20: Case) -> None:
    expected = resnet20.net.values(resnet20.images, resnet20.net.tensors)[resnet20.net.graph.output]
    np.testing.assert_allclose(exact(resnet20.emit(Policy()), resnet20.images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [vgg, mobile, fire, convolutional])
def test_int8_equals_fake_quantization(make, tmp_path: Path) -> None:
    this = case(make())
    policy = everywhere(this.net)
    data = this.emit(policy)
    onnx.checker.check_model(data, full_check=True)
    expected = this.expected(policy)
    # A rounding tie may fall to either side, which moves single codes.
    assert np.abs(exact(data, this.images) - expected).max() < 0.03 * expected.std()
    found = int8_layers(optimized(data, tmp_path).SerializeToString(), this.net.graph)
    assert found == {layer.name for layer in this.net.graph.layers}


def test_all_int8_resnet_leaves_nothing_in_float(resnet20: Case, tmp_path: Path) -> None:
    policy = everywhere(resnet20.net)
    model = optimized(resnet20.emit(policy), tmp_path)
    count = Counter(node.op_type for node in model.graph.node)
    assert (count["QLinearConv"], count["QLinearAdd"], count["MatMulIntegerToFloat"]) == (19, 9, 1)
    assert not count.keys() & {"Conv", "Relu", "Add", "Gemm", "MatMul"}
    assert len(int8_layers(model.SerializeToString(), resnet20.net.graph)) == 20


@pytest.mark.parametrize("seed", range(10))
def test_every_int8_layer_of_a_random_policy_runs_as_int8(resnet20: Case, seed: int, tmp_path: Path) -> None:
    policy = random_policy(resnet20.net, np.random.default_rng(seed))
    data = resnet20.emit(policy)
    model = optimized(data, tmp_path)
    found = int8_layers(model.SerializeToString(), resnet20.net.graph)
    assert found == policy.precisions.keys()
    assert sum(node.op_type in INTEGER for node in model.graph.node) == len(found)
    expected = resnet20.expected(policy)
    assert np.abs(exact(data, resnet20.images) - expected).max() < 0.1 * expected.std()
    shapes = {tensor.name: tuple(tensor.dims) for tensor in onnx.load_model_from_string(data).graph.initializer}
    for name, shape in resnet20.net.graph.parameter_shapes(policy).items():
        stored = f"{name}_codes" if f"{name}_codes" in shapes else name
        assert sorted(shapes[stored]) == sorted(shape)
    gone = {f"{layer}.bias" for layer in resnet20.net.graph.removed_layers(policy)}
    assert not gone & shapes.keys()


def test_engine_agrees_with_fake_quantization(resnet20: Case) -> None:
    """Nearly all logits are equal to rounding; without rounded biases nearly none are."""
    policy = everywhere(resnet20.net)
    expected = resnet20.expected(policy)
    tensors = resnet20.net.sliced(policy)
    plain = emit(resnet20.template, policy, tensors, *resnet20.parts(policy)[1:], NATIVE)
    backend = OnnxRuntimeBackend(BackendSpec(batch=8))
    distances = []
    for data in (resnet20.emit(policy), plain):
        with backend.build(data) as engine:
            distances.append(np.abs(engine.run(resnet20.images) - expected).mean() / expected.std())
    assert distances[0] < 0.005
    assert distances[1] < 0.05


def test_rounded_biases_are_multiples_of_the_step(resnet8: Case) -> None:
    policy = everywhere(resnet8.net)
    tensors = resnet8.net.sliced(policy)
    rounded, weights, params = resnet8.parts(policy)
    for layer in resnet8.net.graph.layers:
        read = resnet8.net.graph.node_by_name[layer.node].inputs[0]
        scale = weights[layer.weight].scale
        codes = rounded[layer.bias].astype(np.float64) / (params[read].scale * scale.astype(np.float64))
        np.testing.assert_allclose(codes, np.rint(codes), atol=1e-2)
        assert np.abs(rounded[layer.bias] - tensors[layer.bias]).max() <= 0.51 * (params[read].scale * scale).max()
    assert round_biases(resnet8.net.graph, Policy(), tensors, {}, {}) == {}


def test_float_layer_between_int8_layers_stays_float(resnet8: Case, tmp_path: Path) -> None:
    """ONNX Runtime would quantize the weights of such a layer without being asked."""
    chosen = [layer.name for layer in resnet8.net.graph.layers if layer.name != "layer1.0.conv2"]
    model = optimized(resnet8.emit(Policy(precisions=dict.fromkeys(chosen, INT8))), tmp_path)
    count = Counter(node.op_type for node in model.graph.node)
    assert (count["Conv"], count["QLinearConv"], count["MatMulIntegerToFloat"]) == (1, 6, 1)


@pytest.mark.parametrize("shrink", [0.0, 1e-12, 1e-5])
def test_bias_of_a_nearly_dead_channel_survives(shrink: float) -> None:
    """Engines store a bias as int32 in units of the channel's weight scale."""
    net = Net((3, 8, 8))
    x = net.relu(net.conv("c1", "input", 8))
    x = net.relu(net.conv("c2", x, 8))
    net.linear("f", net.flatten(net.average(x)), 10)
    net.tensors["c2.weight"][3] *= shrink
    net.tensors["c2.bias"][3] = 40.0
    this, policy = case(net), everywhere(net)
    with OnnxRuntimeBackend(BackendSpec(batch=8)).build(this.emit(policy)) as engine:
        result = engine.run(this.images)
    expected = this.expected(policy)
    assert np.abs(result - expected).max() < 0.1 * expected.std()


def test_depthwise_group_follows_its_channels() -> None:
    this = case(mobile())
    policy = Policy(kept={"expand": 16}, precisions={"depth": INT8})
    data = this.emit(policy)
    groups = {
        node.input[1]: next(entry.i for entry in node.attribute if entry.name == "group")
        for node in onnx.load_model_from_string(data).graph.node
        if node.op_type == "Conv"
    }
    assert groups["depth.weight_dq"] == 16
    assert groups["expand.weight"] == 1
    expected = this.expected(policy)
    assert np.abs(exact(data, this.images) - expected).max() < 0.03 * expected.std()


def test_dropped_branch_passes_the_stream_on(resnet20: Case) -> None:
    policy = Policy(dropped=frozenset({"layer1.0", "layer2.0"}))
    data = resnet20.emit(policy)
    model = onnx.load_model_from_string(data)
    assert sum(node.op_type == "Conv" for node in model.graph.node) == 15
    assert sum(node.op_type == "Add" for node in model.graph.node) == 7
    np.testing.assert_allclose(exact(data, resnet20.images), resnet20.expected(policy), rtol=1e-4, atol=1e-4)


def test_pruned_stream_that_is_flattened() -> None:
    """The exporter's constant number of features must follow."""
    net = Net((3, 8, 8))
    x = net.relu(net.conv("c1", "input", 16))
    net.linear("f", net.flatten(net.average(x)), 10)
    net.group("c1", 16, ("c1.weight", 0), ("c1.bias", 0), ("f.weight", 1))
    this, policy = case(net), Policy(kept={"c1": 8})
    np.testing.assert_allclose(exact(this.emit(policy), this.images), this.expected(policy), rtol=1e-4, atol=1e-5)


def test_int8_weights_take_a_quarter(resnet20: Case) -> None:
    weights = sum(t.nbytes for name, t in resnet20.net.tensors.items() if name.endswith(".weight"))
    model = onnx.load_model_from_string(resnet20.emit(everywhere(resnet20.net)))
    codes = [numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith("_codes")]
    assert {array.dtype for array in codes} == {np.dtype(np.int8)}
    assert sum(array.nbytes for array in codes) * 4 == weights
    floats = initializer_bytes(resnet20.emit(Policy()))
    assert 0.25 < initializer_bytes(model.SerializeToString()) / floats < 0.30


def test_typed_pairs_follow_the_plan(resnet20: Case) -> None:
    policy = Policy(precisions={"layer1.0.conv1": INT8, "layer1.0.conv2": INT8})
    model = onnx.load_model_from_string(resnet20.emit(policy))
    quantized = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert quantized == set(place(resnet20.net.graph, policy).values)
    types = {t.name: t.data_type for t in model.graph.initializer}
    assert types["layer1.0.conv1.bias"] == onnx.TensorProto.FLOAT
    assert not model.graph.value_info


def test_missing_parameters_and_unknown_tensors_are_named(resnet8: Case) -> None:
    policy = everywhere(resnet8.net)
    tensors, weights, params = resnet8.parts(policy)
    without = {value: entry for value, entry in params.items() if value != "relu"}
    with pytest.raises(EngineError, match="for relu"):
        emit(resnet8.template, policy, tensors, weights, without, NATIVE)
    with pytest.raises(EngineError, match=r"no weight codes for layer1\.0\.conv1"):
        fewer = {name: weight for name, weight in weights.items() if name != "layer1.0.conv1.weight"}
        emit(resnet8.template, policy, tensors, fewer, params, NATIVE)
    with pytest.raises(EngineError, match="no parameter nowhere"):
        emit(resnet8.template, policy, {**tensors, "nowhere": tensors["linear.bias"]}, weights, params, NATIVE)


def test_models_that_cannot_be_edited_are_refused(resnet8: Case) -> None:
    graph = resnet8.net.graph
    with pytest.raises(EngineError, match="no ONNX model"):
        load_template(b"not a model", graph)
    with pytest.raises(EngineError, match="no ONNX model"):
        load_template(b"", graph)
    model = onnx.load_model_from_string(resnet8.net.onnx)
    renamed = onnx.ModelProto.FromString(model.SerializeToString())
    for tensor in renamed.graph.initializer:
        tensor.name = tensor.name.replace("layer2.0.conv1", "other")
    for node in renamed.graph.node:
        node.input[:] = [value.replace("layer2.0.conv1", "other") for value in node.input]
    with pytest.raises(EngineError, match=r"layer2\.0\.conv1"):
        load_template(renamed.SerializeToString(), graph)


def test_values_are_found_without_their_names(resnet20: Case) -> None:
    """An exporter may call a value anything; structure decides."""
    model = onnx.load_model_from_string(resnet20.net.onnx)
    own = {value for node in model.graph.node for value in node.output} - {"logits"}
    for node in model.graph.node:
        node.input[:] = [f"other_{value}" if value in own else value for value in node.input]
        node.output[:] = [f"other_{value}" if value in own else value for value in node.output]
    template = load_template(model.SerializeToString(), resnet20.net.graph)
    for name in own:
        assert template.values[name] == f"other_{name}"
    policy = everywhere(resnet20.net)
    other = Case(resnet20.net, template, resnet20.images)
    assert structure_digest(other.emit(policy)) == structure_digest(resnet20.emit(policy))


def test_wiring_that_differs_is_refused(resnet8: Case) -> None:
    model = onnx.load_model_from_string(resnet8.net.onnx)
    add = next(node for node in model.graph.node if node.op_type == "Add")
    add.op_type = "Mul"
    with pytest.raises(EngineError, match="add"):
        load_template(model.SerializeToString(), resnet8.net.graph)
