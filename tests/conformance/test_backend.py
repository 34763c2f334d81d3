"""What every backend must do."""

import json
from contextlib import suppress

import numpy as np
import pytest

from autocomp.engines import BACKENDS, BackendSpec, by_graph_value, make_backend
from autocomp.engines.template import parse
from autocomp.errors import ConfigError, EngineError
from autocomp.policy import FP32, INT8, Policy, Precision
from autocomp.protocols import Backend, Engine
from tests.engines.conftest import Case, case
from tests.engines.nets import resnet

BATCH = 4


@pytest.fixture(scope="module")
def model() -> Case:
    return case(resnet(depth=8, width=8, size=8), images=10)


GPU_ENGINES = frozenset({"tensorrt", "tensorrt-rtx", "torch-cuda", "torch-cuda-compiled"})


def runnable() -> list[str]:
    """The engines that this machine can be asked for: those of GPUs only beside one, and where they are installed."""
    found = []
    for name in sorted(BACKENDS):
        with suppress(ConfigError):
            if name in GPU_ENGINES:
                make_backend(BackendSpec(name))
            found.append(name)
    return found


@pytest.fixture(params=runnable())
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "openvino":
        pytest.importorskip("openvino", reason="openvino is not installed: pip install 'autocomp[openvino]'")
    return make_backend(BackendSpec(request.param, batch=BATCH))


def test_is_what_the_protocol_says(backend: Backend, model: Case) -> None:
    assert isinstance(backend, Backend)
    assert backend.name in BACKENDS
    assert backend.batch == BATCH
    assert isinstance(backend.measures, bool)
    assert backend.device.threads == 1
    json.dumps(backend.device.to_json())
    with backend.build(model.emit(Policy())) as engine:
        assert isinstance(engine, Engine)


def test_capabilities_are_sensible(backend: Backend) -> None:
    found = backend.capabilities()
    assert FP32 in found.precisions
    assert found.channel_multiple >= 1
    assert found.numerics.weight_max in (63, 127)


@pytest.mark.parametrize("count", [0, 1, BATCH, BATCH + 1, 10])
def test_any_number_of_images(backend: Backend, model: Case, count: int) -> None:
    expected = model.expected(Policy())[:count]
    with backend.build(model.emit(Policy())) as engine:
        result = engine.run(model.images[:count])
    assert result.dtype == np.float32
    assert result.shape == (count, 10)
    np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-4)


def test_int8_outputs_are_those_of_the_fake_quantized_model(backend: Backend, model: Case) -> None:
    if INT8 not in backend.capabilities().precisions:
        pytest.skip("this backend has no int8")
    policy = Policy(precisions={layer.name: INT8 for layer in model.net.graph.layers})
    with backend.build(model.emit(policy)) as engine:
        result = engine.run(model.images)
    expected = model.expected(policy)
    assert np.abs(result - expected).max() < 0.15 * expected.std()


def test_times_are_positive_milliseconds(backend: Backend, model: Case) -> None:
    with backend.build(model.emit(Policy())) as engine:
        times = engine.time(3)
    assert times.shape == (3,)
    assert times.dtype == np.float64
    assert ((times > 0) & (times < 1e4)).all()


@pytest.mark.parametrize("precision", [FP32, INT8], ids=str)
def test_the_times_of_operators_are_of_operators_in_the_file(
    backend: Backend, model: Case, precision: Precision
) -> None:
    policy = Policy(precisions={layer.name: precision for layer in model.net.graph.layers})
    onnx = model.emit(policy)
    times = backend.profile(onnx, repeats=5)
    graph = parse(onnx).graph
    assert set(times.by_value) <= {graph.input[0].name, *(node.output[0] for node in graph.node)}
    assert all(ms >= 0 for ms in times.by_value.values())
    assert 0 < sum(times.by_value.values()) <= 1.01 * times.run_ms  # the rest is the runtime's own
    by_node = by_graph_value(onnx, times.by_value, model.template.values)
    assert set(by_node) <= set(model.net.graph.node_by_name)
    assert sum(by_node.values()) == pytest.approx(sum(times.by_value.values()))


@pytest.mark.parametrize("shape", [(2, 3, 8, 9), (3, 8, 8), (2, 1, 8, 8)])
def test_images_of_another_shape_are_refused(backend: Backend, model: Case, shape: tuple[int, ...]) -> None:
    with backend.build(model.emit(Policy())) as engine, pytest.raises(EngineError, match="shape"):
        engine.run(np.zeros(shape, np.float32))


@pytest.mark.parametrize("data", [b"", b"this is no model", b"\x08\x07"])
def test_what_is_no_model_is_refused(backend: Backend, data: bytes) -> None:
    with pytest.raises(EngineError, match="no ONNX model"):
        backend.build(data)


def test_closed_engine_is_refused(backend: Backend, model: Case) -> None:
    with backend.build(model.emit(Policy())) as engine:
        pass
    with pytest.raises(EngineError, match="closed"):
        engine.time(1)
    with pytest.raises(EngineError, match="closed"):
        engine.run(model.images)


def test_outputs_repeat(backend: Backend, model: Case) -> None:
    data = model.emit(Policy())
    with backend.build(data) as first, backend.build(data) as second:
        np.testing.assert_array_equal(first.run(model.images), second.run(model.images))


def test_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="onnxruntime, openvino, simulated"):
        make_backend(BackendSpec("warp"))


def test_spec_round_trip_and_bad_values() -> None:
    spec = BackendSpec("simulated", 32, 2, "simulated-gpu")
    assert BackendSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    for bad in ({"batch": 0}, {"threads": -1}, {"speed": 9}):
        with pytest.raises(ConfigError):
            BackendSpec.from_json(bad)
