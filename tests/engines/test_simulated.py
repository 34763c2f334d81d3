"""The roofline against arithmetic by hand."""

import numpy as np
import onnx
import pytest

from autocomp.engines import BackendSpec, make_backend
from autocomp.engines.simulated import DESCRIPTIONS, Description, roofline_ms
from autocomp.errors import ConfigError, EngineError
from autocomp.policy import INT8, Policy
from tests.engines.conftest import Case, case
from tests.engines.nets import Net

# One unit of each, so that times can be counted by hand.
UNIT = Description("unit", 1.0, 4.0, 1e9, 0.0, 1, 1)


def one_conv() -> Case:
    net = Net((8, 4, 4))
    net.relu(net.conv("c", "input", 8))
    return case(net)


def test_compute_bound_conv() -> None:
    this = one_conv()
    macs = 2 * 8 * 8 * 9 * 16
    assert roofline_ms(this.emit(Policy()), UNIT, 2, 1) == pytest.approx(macs / 1e6)
    assert roofline_ms(this.emit(Policy()), UNIT, 2, 4) == pytest.approx(macs / 4e6)


def test_memory_bound_conv_and_overhead() -> None:
    slow = Description("slow", 1e12, 4.0, 1.0, 7.0, 1, 1)
    values = 8 * 16 + 8 * 16 + 8 * 8 * 9 + 8
    assert roofline_ms(one_conv().emit(Policy()), slow, 1, 1) == pytest.approx(4 * values / 1e6 + 0.007)


def test_channels_are_a_staircase() -> None:
    steps = Description("steps", 1.0, 4.0, 1e9, 0.0, 16, 16)
    macs = 16 * 16 * 9 * 16
    assert roofline_ms(one_conv().emit(Policy()), steps, 1, 1) == pytest.approx(macs / 1e6)


def test_int8_is_faster_and_its_pairs_are_free(resnet20: Case) -> None:
    """All work is then at four times the peak, but for the pair at the input."""
    graph = resnet20.net.graph
    whole = resnet20.emit(Policy(precisions={layer.name: INT8 for layer in graph.layers}))
    plain = roofline_ms(resnet20.emit(Policy()), UNIT, 1, 1)
    assert plain == pytest.approx(graph.macs(Policy()) / 1e6, rel=1e-3)
    assert roofline_ms(whole, UNIT, 1, 1) == pytest.approx(plain / 4, rel=0.01)


def test_dropping_and_pruning_save_their_macs(resnet20: Case) -> None:
    graph = resnet20.net.graph
    policy = Policy(kept={"layer1.0.conv1": 8}, dropped=frozenset({"layer3.1"}))
    expected = graph.macs(policy) / graph.macs(Policy())
    found = roofline_ms(resnet20.emit(policy), UNIT, 1, 1) / roofline_ms(resnet20.emit(Policy()), UNIT, 1, 1)
    assert found == pytest.approx(expected, rel=1e-3)


def test_says_that_it_is_an_estimate() -> None:
    for name in DESCRIPTIONS:
        backend = make_backend(BackendSpec("simulated", hardware=name))
        assert not backend.measures
        assert "estimate" in backend.device.engine


def test_unknown_hardware_and_invalid_graph(resnet8: Case) -> None:
    with pytest.raises(ConfigError, match="simulated-gpu"):
        make_backend(BackendSpec("simulated", hardware="toaster"))
    model = onnx.load_model_from_string(resnet8.emit(Policy()))
    weight = next(t for t in model.graph.initializer if t.name == "layer1.0.conv2.weight")
    weight.CopyFrom(onnx.numpy_helper.from_array(np.zeros((5, 8, 3, 3), np.float32), weight.name))
    with pytest.raises(EngineError, match="not valid"):
        make_backend(BackendSpec("simulated")).build(model.SerializeToString())
