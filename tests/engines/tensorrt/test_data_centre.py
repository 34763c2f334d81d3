"""The data-centre package, which cannot be installed without its vendor's index: TensorRT-RTX's builder under its name,
with what versions 10 and 11 have of their own, for a GPU that is not there."""

from dataclasses import replace
from pathlib import Path

import pytest

from autocomp.engines import BackendSpec
from autocomp.engines.cuda import GpuInfo
from autocomp.engines.tensorrt import BuildOptions, backend, build_plan, prepare, read_plan
from autocomp.engines.tensorrt.backend import NUMERICS, TensorRtBackend
from autocomp.engines.tensorrt.timing_cache import sealed, timing_cache
from autocomp.errors import EngineError
from autocomp.policy import FP8, Policy
from autocomp.resources import cache
from tests.engines.conftest import Case
from tests.engines.tensorrt.test_build import unload
from tests.engines.tensorrt.test_engine import HostCuda

pytest.importorskip("tensorrt_rtx_bindings", reason="not installed: pip install 'autocomp[tensorrt-rtx]'")

# From the documentation of 10.13 and 11.4: in 10 networks are weakly typed unless a flag says otherwise; in 11 the flag
# has another number, is ignored, and the flags of weak typing are gone.
OWN = {
    "10.13.3": "EXPLICIT_BATCH, STRONGLY_TYPED = 0, 1",
    "11.4.1": "STRONGLY_TYPED, PREFER_AOT_PYTHON_PLUGINS, PREFER_JIT_PYTHON_PLUGINS = 0, 1, 2",
}
STAND_IN = """
import tensorrt_rtx_bindings as real
from tensorrt_rtx_bindings import *
__version__ = "{version}"
class NetworkDefinitionCreationFlag:
    {own}
class Builder:
    def __init__(self, logger):
        self._real = real.Builder(logger)
    def __getattr__(self, name):
        return getattr(self._real, name)
    def create_network(self, flags=0):
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED, flags
        return self._real.create_network(1)
    def create_builder_config(self):
        config = self._real.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(real.ComputeCapability.SM89, 0)
        return config
del ComputeCapability
"""
GPU = GpuInfo("NVIDIA L4", (8, 9), "13.0", 24 * 2**30, "0000:01:00.0")


@pytest.fixture(params=OWN)
def version(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The version that is installed."""
    (tmp_path / "tensorrt.py").write_text(STAND_IN.format(version=request.param, own=OWN[request.param]))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    unload(monkeypatch, "tensorrt")
    monkeypatch.setattr(backend, "open_cuda", lambda: HostCuda(info=GPU))
    return str(request.param)


@pytest.fixture
def file(resnet8: Case) -> bytes:
    return prepare(resnet8.emit(Policy(), NUMERICS), 2)


def test_both_versions_build_typed_networks_with_a_cache_of_timings(version: str, file: bytes, tmp_path: Path) -> None:
    built = TensorRtBackend(BackendSpec("tensorrt", 2))
    assert built.device.engine == f"tensorrt {version}" and FP8 in built.capabilities().precisions
    header = built.save(file, tmp_path / "net.engine")
    assert (header.version, header.targets, header.device) == (version, ("SM89",), "NVIDIA L4, driver 13.0")
    assert len(read_plan(tmp_path / "net.engine")[1]) > 10_000
    (timings,) = cache("timings").glob(f"tensorrt-{version}-nvidia-l4-13.0.cache")
    assert timings.stat().st_size > 0 and timings.with_suffix(".sha256").read_text() == sealed(timings)
    stamp = timings.stat().st_mtime_ns
    TensorRtBackend(BackendSpec("tensorrt", 2, fresh=True)).plan(file)  # which is to choose its kernels anew
    assert timings.stat().st_mtime_ns == stamp
    other = replace(header, version="10.0.1")
    with pytest.raises(EngineError, match=rf"built by tensorrt 10\.0\.1 and tensorrt {version} is installed"):
        other.check(built._flavour, "SM89", 2)


def test_a_cache_of_timings_that_was_changed_is_dropped(version: str, file: bytes, tmp_path: Path) -> None:
    flavour = TensorRtBackend(BackendSpec("tensorrt", 2))._flavour
    path = timing_cache(tmp_path / "timings", flavour, GPU)
    build_plan(flavour, file, BuildOptions(timing_cache=path))
    sealed(path)
    assert timing_cache(path.parent, flavour, GPU).exists()
    build_plan(flavour, file, BuildOptions(timing_cache=path))  # reads what it wrote
    path.write_bytes(path.read_bytes() + b"!")
    assert not timing_cache(path.parent, flavour, GPU).exists()
    others = (replace(GPU, driver="13.1"), replace(GPU, name="NVIDIA T4"))
    assert len({timing_cache(path.parent, flavour, gpu) for gpu in (GPU, *others)}) == 3
