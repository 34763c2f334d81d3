"""One suite for both packages that drive a GPU; each is skipped where it, or the GPU, is missing."""

from collections.abc import Callable

import numpy as np
import pytest

from autocomp.engines.cuda import Cuda
from autocomp.errors import ConfigError


def bindings() -> Cuda:
    from autocomp.engines.cuda.with_bindings import CudaBindings

    return CudaBindings()


def pycuda() -> Cuda:
    from autocomp.engines.cuda.with_pycuda import PyCuda

    return PyCuda()


@pytest.mark.parametrize("load", [bindings, pycuda])
def test_memory_events_and_graphs(load: Callable[[], Cuda]) -> None:
    try:
        cuda = load()
    except (ConfigError, ModuleNotFoundError) as missing:
        pytest.skip(f"no CUDA device: {missing}")
    assert cuda.info.target.startswith("SM") and cuda.info.memory_bytes > 2**28
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
    for address in (first, second):
        cuda.free(address)
