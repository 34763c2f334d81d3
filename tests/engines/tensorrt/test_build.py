"""Engines from the real builder of TensorRT-RTX, which needs no GPU, and every way in which a build ends badly."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from autocomp.engines import BackendSpec, make_backend
from autocomp.engines.tensorrt import (
    BuildOptions,
    Flavour,
    PlanHeader,
    build_plan,
    find_flavour,
    first_installed,
    prepare,
    read_plan,
    write_plan,
)
from autocomp.engines.tensorrt.backend import NUMERICS, TensorRtBackend
from autocomp.engines.tensorrt.engine import TensorRtEngine
from autocomp.errors import ConfigError, EngineError
from autocomp.policy import Policy
from autocomp.resources import cache
from tests.engines.conftest import Case

rtx = pytest.importorskip(
    "tensorrt_rtx_bindings", reason="tensorrt-rtx is not installed: pip install 'autocomp[tensorrt-rtx]'"
)
AHEAD = BackendSpec("tensorrt-rtx", batch=2, hardware="sm80,8.9,sm120")
RANGE = BackendSpec("tensorrt-rtx", 4, hardware="sm89", batches=(1, 8))
ONE = BuildOptions(("SM89",))


@pytest.fixture(scope="module")
def flavour() -> Flavour:
    return find_flavour("tensorrt-rtx")


@pytest.fixture(scope="module")
def file(resnet8: Case) -> bytes:
    return prepare(resnet8.emit(Policy(), NUMERICS), 2)


def standing_in(folder: Path, monkeypatch: pytest.MonkeyPatch, flavour: Flavour, code: str) -> Flavour:
    """A package that runs some code and is TensorRT-RTX otherwise."""
    (folder / "stand_in.py").write_text(f"{code}\nfrom tensorrt_rtx_bindings import *\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return replace(flavour, module="stand_in")


def test_one_engine_for_three_architectures_is_kept_and_found_again(resnet8: Case, tmp_path: Path) -> None:
    backend = make_backend(AHEAD)
    assert isinstance(backend, TensorRtBackend)
    data = resnet8.emit(Policy(), NUMERICS)
    header = backend.save(data, tmp_path / "net.engine")
    assert (header.targets, header.batch, header.engine) == (("SM80", "SM89", "SM120"), 2, "tensorrt-rtx")
    found, plan = read_plan(tmp_path / "net.engine")
    assert found == header and len(plan) > 10_000
    cached = cache("engines") / f"{header.key}.engine"
    assert read_plan(cached) == (header, plan)
    write_plan(cached, header, b"kept")
    assert backend.plan(prepare(data, 2)) == b"kept"
    cached.write_bytes(b"damaged")
    assert len(backend.plan(prepare(data, 2))) == len(plan)
    with backend.build(data) as engine:
        result = engine.run(resnet8.images)
        np.testing.assert_allclose(result, resnet8.expected(Policy(), NUMERICS), rtol=1e-3, atol=1e-4)
        with pytest.raises(EngineError, match="ahead of time for SM80, SM89, SM120: time it on such a GPU"):
            engine.time(1)
    with pytest.raises(EngineError, match="nothing runs here for SM80"):
        backend.profile(data, 1)


def test_keys_tell_apart_what_an_engine_depends_on(file: bytes) -> None:
    header = PlanHeader("tensorrt", "10.9", ("SM89",), "L4, driver 13.0", False, 8, "abc")
    changes = {"version": "11.0", "targets": ("SM80",), "device": "", "tf32": True, "batch": 1, "model": "abd"}
    keys = {header.key} | {replace(header, **{name: value}).key for name, value in changes.items()}  # type: ignore[arg-type]
    assert len(keys) == 7


def test_a_node_that_is_not_supported_is_named_with_its_layer(flavour: Flavour, file: bytes) -> None:
    model = onnx.load_model_from_string(file)
    node = next(node for node in model.graph.node if node.op_type == "Relu")
    node.op_type = "Own"
    with pytest.raises(EngineError, match=rf"{node.name} \(Own\) of layer conv1 is refused: it knows no such operator"):
        build_plan(flavour, model.SerializeToString(), ONE)


def test_the_first_error_of_the_builder_is_shown_in_one_line(flavour: Flavour, file: bytes) -> None:
    model = onnx.load_model_from_string(file)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    with pytest.raises(EngineError, match="no profile: give --batches for images") as caught:
        build_plan(flavour, model.SerializeToString(), ONE)
    assert "\n" not in str(caught.value) and ".cpp" not in str(caught.value)
    first, second, *_ = [node for node in model.graph.node if node.op_type == "Conv"]
    first.input[1], second.input[1] = second.input[1], first.input[1]
    with pytest.raises(EngineError, match=r"cannot build the model: node \S+ \(Conv\) of layer"):
        build_plan(flavour, model.SerializeToString(), ONE)


def test_a_range_of_batches_has_a_profile(resnet8: Case, tmp_path: Path) -> None:
    backend = make_backend(RANGE)
    assert isinstance(backend, TensorRtBackend)
    data = resnet8.emit(Policy(), NUMERICS)
    header = backend.save(data, tmp_path / "net.engine")
    assert read_plan(tmp_path / "net.engine")[0] == header and (header.batch, header.batches) == (4, (1, 8))
    other = replace(RANGE, batches=(2, 8))
    assert header.key != make_backend(other).save(data, tmp_path / "other.engine").key  # type: ignore[attr-defined]
    for batch in (1, 8):
        header.check(find_flavour("tensorrt-rtx"), "SM89", batch)
    with pytest.raises(EngineError, match="takes batches of 1 to 8, not 9: give --batch 4"):
        header.check(find_flavour("tensorrt-rtx"), "SM89", 9)
    with pytest.raises(EngineError, match="batch 2, not a range: give --batch 2"):
        backend.save(prepare(data, 2), tmp_path / "fixed.engine")
    with pytest.raises(ConfigError, match="batches 5 to 8 must hold --batch 4"):
        replace(other, batches=(5, 8))
    assert BackendSpec.from_json(json.loads(json.dumps(other.to_json()))) == other


def test_a_builder_that_hangs_is_ended(
    flavour: Flavour, file: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = standing_in(tmp_path, monkeypatch, flavour, "import time; time.sleep(60)")
    with pytest.raises(EngineError, match=r"took more than 0\.3 s and was ended"):
        build_plan(slow, file, replace(ONE, timeout_s=0.3))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9: end programs that take memory"),
        ("import ctypes; ctypes.string_at(0)", "killed by signal 11: report it"),
        ("bytearray(2**60)", r"failed: out of memory: give a smaller --batch"),
    ],
)
def test_a_builder_that_dies_is_a_failed_build(
    flavour: Flavour, file: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        build_plan(standing_in(tmp_path, monkeypatch, flavour, code), file, ONE)


def unload(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Have a module imported anew, now and after the test."""
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    del sys.modules[module]


def test_packages_that_are_missing_broken_or_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        unload(monkeypatch, module)
        (tmp_path / f"{module}.py").write_text("raise FileNotFoundError('Could not find: libnvinfer.so.10')")
    with pytest.raises(ConfigError, match=r"cannot be loaded \(Could not find: libnvinfer.so.10\): install it again"):
        make_backend(BackendSpec("tensorrt"))
    (tmp_path / "tensorrt.py").write_text("__version__ = '8.6.1'")
    with pytest.raises(ConfigError, match=r"tensorrt 8\.6\.1 is too old, 10\.0 is needed: pip install"):
        make_backend(BackendSpec("tensorrt"))
    for module in ("tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'autocomp\[tensorrt-rtx\]'"):
        make_backend(BackendSpec("tensorrt-rtx"))


def test_what_is_installed_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    unload(monkeypatch, "tensorrt")
    assert first_installed(ahead=True) == "tensorrt-rtx"
    (tmp_path / "tensorrt.py").write_text("__version__ = '11.0.0'")
    importlib.invalidate_caches()
    assert [first_installed(ahead=ahead) for ahead in (False, True)] == ["tensorrt", "tensorrt-rtx"]
    for module in ("tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, module, None)
    assert [first_installed(ahead=ahead) for ahead in (False, True)] == ["tensorrt", "tensorrt-rtx"]


@pytest.mark.parametrize(
    ("hardware", "message"), [("sm9", "cannot build for sm9: use sm"), ("h100", "cannot build for"), ("", "cannot")]
)
def test_unknown_targets_list_the_known_ones(hardware: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_backend(replace(AHEAD, hardware=hardware))


def test_the_data_centre_package_builds_for_the_gpu_at_hand_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    unload(monkeypatch, "tensorrt")
    (tmp_path / "tensorrt.py").write_text("__version__ = '10.9.0'")
    with pytest.raises(ConfigError, match="builds for the GPU at hand: leave --hardware out, or use tensorrt-rtx"):
        make_backend(BackendSpec("tensorrt", hardware="sm89"))


def test_engines_of_another_version_or_gpu_are_refused(flavour: Flavour, tmp_path: Path) -> None:
    header = PlanHeader("tensorrt-rtx", "1.0.0", ("SM89",), "", False, 2, "0")
    with pytest.raises(EngineError, match=rf"built by tensorrt-rtx 1\.0\.0 and {flavour} is installed: build it again"):
        header.check(flavour, "SM89", 2)
    with pytest.raises(EngineError, match="built for SM89 and this GPU is SM120: build it again"):
        replace(header, version=flavour.version).check(flavour, "SM120", 2)
    replace(header, version=flavour.version).check(flavour, "SM89", 2)
    path = tmp_path / "net.engine"
    write_plan(path, header, b"plan")
    path.write_bytes(path.read_bytes() + b"!")
    with pytest.raises(EngineError, match="damaged"):
        read_plan(path)
    path.write_bytes(b"\x00\x01 a bare plan of trtexec")
    with pytest.raises(EngineError, match="no engine that autocomp wrote: build one with 'autocomp build'"):
        read_plan(path)
    with pytest.raises(EngineError, match="cannot read the engine"):
        read_plan(tmp_path / "none.engine")


def test_the_runtime_says_what_it_lacks(flavour: Flavour, file: bytes) -> None:
    """Without a driver the real runtime refuses a good engine; with one it refuses what is no engine."""
    plan = build_plan(flavour, file, ONE)

    class Nothing:
        """Never reached: loading fails before the GPU is asked for anything."""

    with pytest.raises(EngineError, match=r"cannot load the engine: .*(driver is missing or too old|another version)"):
        TensorRtEngine(flavour, plan if not has_gpu() else b"no engine" * 99, Nothing(), 2)  # type: ignore[arg-type]


def has_gpu() -> bool:
    from autocomp.engines.cuda import open_cuda

    try:
        open_cuda()
    except ConfigError:
        return False
    return True


def test_no_gpu_is_said_before_anything_is_built() -> None:
    if has_gpu():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ConfigError, match=r"no (NVIDIA driver|CUDA device) is found.*(install one|doctor)"):
        make_backend(BackendSpec("tensorrt-rtx"))
