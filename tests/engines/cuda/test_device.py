"""One suite for both packages that drive a GPU: on the GPU, where there is one, and on a stand-in for their drivers."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from autocomp.engines.cuda import Cuda, open_cuda
from autocomp.errors import ConfigError, EngineError
from tests.engines.cuda.standin import RUN_MS, HostGpu, as_bindings, as_pycuda, forget


@dataclass(frozen=True)
class Opened:
    """A GPU, and the stand-in behind it; None where it is a real one."""

    load: Callable[[], Cuda]
    host: HostGpu | None


def bindings() -> Cuda:
    from autocomp.engines.cuda.with_bindings import CudaBindings

    return CudaBindings()


def pycuda() -> Cuda:
    from autocomp.engines.cuda.with_pycuda import PyCuda

    return PyCuda()


@pytest.fixture(params=["bindings", "pycuda", "bindings, stand-in", "pycuda, stand-in"])
def opened(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Opened:
    load = bindings if request.param.startswith("bindings") else pycuda
    if request.param.endswith("stand-in"):
        with_bindings = pytest.importorskip("autocomp.engines.cuda.with_bindings", reason="no cuda-bindings")
        host = HostGpu()
        monkeypatch.setattr(with_bindings, "driver", as_bindings(host))
        if load is pycuda:
            as_pycuda(host, monkeypatch)
        return Opened(load, host)
    try:
        load()
    except (ConfigError, ImportError) as missing:
        pytest.skip(f"no CUDA device: {missing}")
    return Opened(load, None)


def test_memory_events_and_graphs(opened: Opened) -> None:
    cuda = opened.load()
    assert cuda.info.target.startswith("SM") and cuda.info.memory_bytes > 2**28 and cuda.info.bus.count(":") == 2
    assert cuda.info.driver.partition(".")[0].isdecimal() and "\0" not in cuda.info.name
    stream = cuda.stream()
    values, back = np.arange(1000, dtype=np.float32), np.zeros(1000, np.float32)
    first, second = cuda.allocate(values.nbytes), cuda.allocate(values.nbytes)
    cuda.upload(first, values, stream)
    cuda.download(back, first, stream)
    np.testing.assert_array_equal(back, values)
    launch = cuda.capture(stream, lambda: cuda.upload(second, values, stream))
    begin, end = cuda.event(), cuda.event()
    cuda.record(begin, stream)
    if launch is not None:
        launch()
    cuda.record(end, stream)
    cuda.synchronize(stream)
    assert cuda.elapsed_ms(begin, end) >= 0
    if launch is not None:
        back[:] = 0
        cuda.download(back, second, stream)
        np.testing.assert_array_equal(back, values)
    if opened.host is not None:
        assert cuda.elapsed_ms(begin, end) == RUN_MS and cuda.info.driver == "13.0" and cuda.info.target == "SM89"
    for address in (first, second):
        cuda.free(address)
    cuda.release(stream)
    del launch, begin, end
    if opened.host is not None:
        left = opened.host
        assert not (left.memory or left.streams or left.events or left.graphs)


def test_what_cannot_be_captured_is_launched_one_by_one(opened: Opened) -> None:
    cuda = opened.load()
    stream = cuda.stream()

    def fail() -> None:
        raise EngineError("cannot be captured")

    assert cuda.capture(stream, fail) is None
    cuda.synchronize(stream)
    cuda.release(stream)


def test_too_little_memory_is_an_error_with_a_remedy(opened: Opened) -> None:
    cuda = opened.load()
    if opened.host is not None:
        named = "CUDA_ERROR_OUT_OF_MEMORY" if cuda.package == "cuda-bindings" else "out of memory"
        opened.host.failing["cuMemAlloc"] = named
    with pytest.raises(EngineError, match="out of memory: give a smaller --batch, or end other programs"):
        cuda.allocate(2**50)


@pytest.mark.parametrize(
    ("by_bindings", "by_pycuda", "message"),
    [
        (
            "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
            "CUDA driver version is insufficient for CUDA runtime version",
            "driver is missing or too old for this CUDA version: install a newer one; see 'autocomp doctor'",
        ),
        (
            "CUDA_ERROR_NO_DEVICE",
            "no CUDA-capable device is detected",
            "no CUDA device is found: run 'autocomp doctor'",
        ),
        ("CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error", "the GPU reported .*: see 'autocomp doctor'"),
    ],
)
def test_a_driver_that_refuses_is_said_with_a_remedy(
    opened: Opened, by_bindings: str, by_pycuda: str, message: str
) -> None:
    if opened.host is None:
        pytest.skip("this driver does not refuse")
    opened.host.failing["cuInit"] = by_bindings if opened.load is bindings else by_pycuda
    with pytest.raises(ConfigError, match=message):
        opened.load()


def test_pycuda_comes_first_and_leaves_no_context_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """pycuda ends a process with an abort where its context is still pushed."""
    atexit: list[Callable[[], object]] = []
    monkeypatch.setattr("atexit.register", atexit.append)
    log = as_pycuda(HostGpu(), monkeypatch)
    assert open_cuda().package == "pycuda" and log == ["push"]
    for last in atexit:
        last()
    assert log == ["push", "pop"]


def test_pycuda_without_its_driver_leaves_the_word_to_the_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    with_bindings = pytest.importorskip("autocomp.engines.cuda.with_bindings", reason="no cuda-bindings")
    monkeypatch.setattr(with_bindings, "driver", as_bindings(HostGpu()))
    forget(monkeypatch)

    class Unlinked:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> None:
            if name.startswith("pycuda"):
                raise ImportError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr("sys.meta_path", [Unlinked, *sys.meta_path])
    assert open_cuda().package == "cuda-bindings"
    monkeypatch.setitem(sys.modules, "autocomp.engines.cuda.with_bindings", None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no way to the GPU is installed: pip install cuda-bindings"):
        open_cuda()
