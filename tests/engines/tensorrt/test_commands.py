"""``autocomp build`` and ``autocomp doctor`` as a user calls them."""

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autocomp.cli import main
from autocomp.engines import BACKENDS, doctor
from autocomp.engines.cuda import GpuInfo
from autocomp.engines.cuda.telemetry import GpuState
from autocomp.engines.doctor import Diagnosis, EngineCheck, GpuCheck, advice_for
from autocomp.engines.tensorrt import read_plan
from autocomp.engines.tensorrt.backend import NUMERICS
from tests.engines.conftest import Case
from tests.engines.cuda.standin import Library
from tests.engines.tensorrt.test_engine import HostCuda
from tests.engines.test_onnx_graph import everywhere


def called(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    return int(left.value.code or 0)


def test_build_writes_an_engine_and_says_what_for(
    resnet8: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="not installed: pip install 'autocomp[tensorrt-rtx]'")
    path = tmp_path / "net.onnx"
    path.write_bytes(resnet8.emit(everywhere(resnet8.net), NUMERICS))
    assert called("build", str(path), "--hardware", "sm89", "--batch", "4", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["targets"], found["batch"], found["engine"]) == (["SM89"], 4, "tensorrt-rtx")
    header, plan = read_plan(tmp_path / "net.engine")
    assert (header.batch, len(plan) < found["size_bytes"]) == (4, True)
    path.write_bytes(resnet8.emit(everywhere(resnet8.net)))
    assert called("build", str(path), "--hardware", "sm89") == 2
    assert "uint8 codes" in capsys.readouterr().err
    assert called("measure", str(tmp_path / "net.engine")) == 2
    assert "is an engine of TensorRT: give --engine tensorrt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none.onnx",), "no file none.onnx"),
        ((__file__, "--batches", "few"), "--batches few: give a range as 1-32"),
        ((__file__, "--batches", "2-4", "--batch", "8"), "batches 2 to 4 must hold --batch 8"),
        (("none.onnx", "--engine", "onnxruntime"), "keeps no engine files: use tensorrt or tensorrt-rtx"),
    ],
)
def test_bad_requests(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert called("build", *arguments) == 2
    assert message in capsys.readouterr().err


def test_doctor_names_every_engine_and_what_is_missing(capfd: pytest.CaptureFixture[str]) -> None:
    assert called("doctor", "--json") == 0
    found = json.loads(capfd.readouterr().out)
    engines = {check["name"]: check for check in found["engines"]}
    assert set(engines) == set(BACKENDS)
    assert engines["onnxruntime"]["runs"] and "int8" in engines["onnxruntime"]["precisions"]
    assert all(check["runs"] or check["missing"] for check in found["engines"])
    assert (found["gpu"] is None) == (found["no_gpu"] is not None)
    assert called("doctor") == 0
    screen = capfd.readouterr().out
    assert all(name in screen for name in BACKENDS) and found["processor"] in screen
    assert all(check["missing"] in screen for check in found["engines"] if check["missing"])


def test_doctor_describes_a_gpu(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A stand-in for the driver, and NVML as its documentation has it."""
    info = GpuInfo("NVIDIA L4", (8, 9), "13.0", 24 * 2**30, "0000:01:00.0")
    monkeypatch.setattr(doctor, "open_cuda", lambda: HostCuda(info=info))
    real = ctypes.CDLL

    def driver(reasons: int) -> Callable[..., Any]:
        return lambda name, *more, **given: Library(reasons) if "nvidia-ml" in str(name) else real(name, *more, **given)

    monkeypatch.setattr("ctypes.CDLL", driver(0x2))
    assert called("doctor") == 0
    screen = " ".join(capfd.readouterr().out.split())
    assert "NVIDIA L4, compute capability 8.9, 24 GiB; driver 580.65.06 (CUDA 13.0)" in screen
    assert "tensor cores: fp16, int8, tf32, bf16, fp8; through host; clocks locked; 1980 MHz, 72 W, 61 °C" in screen
    monkeypatch.setattr("ctypes.CDLL", driver(0x1))
    assert called("doctor", "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["gpu"]["clocks"], found["gpu"]["highest_mhz"], found["no_gpu"]) == ("not locked", 2040, None)
    assert any("nvidia-smi -lgc 1530" in line for line in found["advice"])


def test_advice_is_the_command_for_what_is_missing() -> None:
    info = GpuInfo("NVIDIA L4", (8, 9), "13.0", 24 * 2**30, "0000:01:00.0")
    gpu = GpuCheck(info, "580.65", GpuState(210, 405, 13.0, 40), ("fp16", "int8"), "cuda-bindings", 2040)
    missing = [EngineCheck(name, None, False, missing="not installed: pip") for name in ("tensorrt", "tensorrt-rtx")]
    assert advice_for(gpu, tuple(missing), {"cuda-bindings": "13.0"}) == [
        "to run TensorRT on this GPU: pip install 'autocomp[tensorrt]'",
        "for steadier times: sudo nvidia-smi -lgc 1530 (undo: sudo nvidia-smi -rgc)",
    ]
    assert advice_for(None, tuple(missing), {}) == [
        "to build engines for GPUs elsewhere: pip install 'autocomp[tensorrt-rtx]'"
    ]
    locked = GpuCheck(info, "580.65", GpuState(2040, 6251, 72.0, 60, reasons=0x2), ("fp16",), "pycuda")
    assert advice_for(locked, (), {"pycuda": "2025.1"}) == []
    whole = Diagnosis("cpu", 2, "3.11.9", {}, locked, None, (), ())
    assert whole.to_json()["gpu"]["clocks"] == "locked" and whole.to_json()["gpu"]["info"]["capability"] == (8, 9)
