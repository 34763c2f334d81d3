"""Calibration caches of TensorRT 8 and 10."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from autocomp.cli import main
from autocomp.engines.tensorrt import CalibrationCache, prepare, with_scales
from autocomp.engines.tensorrt.backend import NUMERICS
from autocomp.errors import InputError
from autocomp.policy import Policy
from tests.engines.conftest import Case
from tests.engines.test_onnx_graph import everywhere, exact

# Lines of a published cache with the values that its readers gave.
TEXT = "TRT-7000-EntropyCalibration2\nrelu46: 3c92aa10\nconv 1:0: 3c88edfc\n\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "model.cache"
    path.write_text(text)
    return path


def test_names_may_hold_colons_and_scales_are_big_endian(tmp_path: Path) -> None:
    cache = CalibrationCache.read(written(tmp_path, TEXT))
    assert (cache.version, cache.algorithm) == ("7000", "EntropyCalibration2")
    assert cache.scales["relu46"] == pytest.approx(0.0179033577)
    assert set(cache.scales) == {"relu46", "conv 1:0"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no calibration cache"),
        ("relu46: 3c92aa10\n", "first line must be like TRT-8601"),
        ("TRT-8601-EntropyCalibration2\nrelu46: 0.5\n", "line 2 of .* is no scale"),
        ("TRT-8601-MinMaxCalibration\na: 3c92aa10\nb: 7fc00000\n", "line 3 of .* is no scale"),
    ],
)
def test_what_is_no_cache(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        CalibrationCache.read(written(tmp_path, text))


def hexadecimal(scale: float) -> str:
    return np.array(scale, ">f4").tobytes().hex()


def calibrated(found: Case) -> tuple[bytes, str]:
    """A float file, and the cache that a min-max calibration of it would write."""
    data = found.emit(Policy())
    model = onnx.load_model_from_string(data)
    values = found.net.values(found.images, found.net.tensors)
    layers = {node.input[0] for node in model.graph.node if node.op_type in ("Conv", "Gemm")}
    lines = [f"{name}: {hexadecimal(float(np.abs(values[name]).max()) / 127)}" for name in sorted(layers)]
    return data, "\n".join(["TRT-8601-EntropyCalibration2", *lines])


def test_the_file_is_quantized_by_the_caches_scales(resnet8: Case, tmp_path: Path) -> None:
    data, text = calibrated(resnet8)
    quantized, done, all_layers = with_scales(data, CalibrationCache.read(written(tmp_path, text)))
    assert done == all_layers == len(resnet8.net.graph.layers)
    onnx.checker.check_model(quantized, full_check=True)
    prepare(quantized, 8)
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load_model_from_string(quantized).graph.initializer}
    largest = np.abs(resnet8.images).max()
    assert tensors["input_scale"] == pytest.approx(largest / 127, rel=1e-6)
    weight = resnet8.net.tensors["linear.weight"]
    name = next(name for name in tensors if name.endswith("linear_weight_codes"))
    real = tensors[name] * tensors[name.replace("codes", "scale")][:, None]
    assert np.abs(real - weight).max() <= np.abs(weight).max() / 127
    expected = resnet8.expected(Policy())
    assert np.linalg.norm(exact(quantized, resnet8.images) - expected) < 0.1 * np.linalg.norm(expected)


def test_the_cache_of_another_model_is_refused(resnet8: Case, tmp_path: Path) -> None:
    cache = CalibrationCache.read(written(tmp_path, TEXT))
    with pytest.raises(
        InputError, match=r"inputs of 0 of 8 layers \(input is missing\): it was made for another model"
    ):
        with_scales(resnet8.emit(Policy()), cache)
    with pytest.raises(InputError, match="quantized already: leave the calibration cache out"):
        with_scales(resnet8.emit(everywhere(resnet8.net), NUMERICS), cache)


def test_products_with_weights_on_the_right_are_scaled_by_column(tmp_path: Path) -> None:
    weight = np.array([[1.0, 100.0], [-2.0, 50.0]], np.float32)
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 2]) for name in "xy"]
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", values[:1], values[1:], [numpy_helper.from_array(weight, "w")])
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    cache = CalibrationCache("8601", "EntropyCalibration2", {"x": 1 / 127})
    result = exact(with_scales(data, cache)[0], np.ones((1, 2), np.float32))
    np.testing.assert_allclose(result, [[-1.0, 150.0]], rtol=1e-2)


def test_build_takes_a_cache(resnet8: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="not installed: pip install 'autocomp[tensorrt-rtx]'")
    data, text = calibrated(resnet8)
    model = tmp_path / "net.onnx"
    model.write_bytes(data)
    given = ["build", str(model), "--hardware", "sm89", "--calibration"]
    with pytest.raises(SystemExit) as left:
        main([*given, str(written(tmp_path, text))])
    assert left.value.code == 0 and "8 of 8 layers are int8" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main([*given, str(tmp_path / "none.cache")])
    assert left.value.code == 2 and "cannot read the calibration cache" in capsys.readouterr().err
