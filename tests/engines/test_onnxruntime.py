"""What is particular to ONNX Runtime."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from autocomp.engines import BackendSpec
from autocomp.engines.onnxruntime import OnnxRuntimeBackend
from autocomp.engines.processor import processor
from autocomp.errors import ConfigError, EngineError
from autocomp.policy import Policy
from tests.engines.conftest import Case

CPUINFO = "processor\t: 0\nmodel name\t: Imaginary(R) Chip(TM) CPU @ 2.00GHz\nflags\t\t: fpu sse avx2 {}\n"


@pytest.mark.parametrize(
    ("flag", "weight_max", "name"),
    [
        ("", 63, "imaginary-chip-2t"),
        ("avx_vnni", 127, "imaginary-chip-avx-vnni-2t"),
        ("avx512_vnni amx_int8", 127, "imaginary-chip-amx-int8-2t"),
    ],
)
def test_weights_stay_small_where_products_saturate(
    flag: str, weight_max: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", lambda self: CPUINFO.format(flag))
        backend = OnnxRuntimeBackend(BackendSpec(threads=2))
        assert backend.capabilities().numerics.weight_max == weight_max
        assert backend.device.name == name
        assert dict(backend.device.details)["instructions"].split() == ["avx2", *flag.split()]
    processor.cache_clear()


def test_device_has_no_other_hardware() -> None:
    with pytest.raises(ConfigError, match="simulated-gpu"):
        OnnxRuntimeBackend(BackendSpec(hardware="simulated-gpu"))


def test_refused_model_names_the_node(resnet8: Case) -> None:
    model = onnx.load_model_from_string(resnet8.emit(Policy()))
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(EngineError, match=model.graph.node[0].name) as caught:
        OnnxRuntimeBackend(BackendSpec()).build(model.SerializeToString())
    assert "\n" not in str(caught.value)


def test_interface_that_does_not_fit() -> None:
    integer = helper.make_tensor_value_info("x", onnx.TensorProto.INT64, ["n", 3])
    out = helper.make_tensor_value_info("y", onnx.TensorProto.INT64, ["n", 3])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [integer], [out])
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    with pytest.raises(EngineError, match="float32"):
        OnnxRuntimeBackend(BackendSpec()).build(data)


def test_fixed_batch_must_match(resnet8: Case) -> None:
    model = onnx.load_model_from_string(resnet8.emit(Policy()))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    data = model.SerializeToString()
    with pytest.raises(EngineError, match="batch 4, not 2"):
        OnnxRuntimeBackend(BackendSpec(batch=2)).build(data)
    with OnnxRuntimeBackend(BackendSpec(batch=4)).build(data) as engine:
        assert engine.run(np.zeros((5, *resnet8.net.input_shape), np.float32)).shape == (5, 10)
