"""GPUs behind one small protocol: memory, streams, events and graphs. Importing this loads no CUDA library."""

from collections.abc import Callable

from autocomp.engines.cuda.protocol import Cuda, GpuInfo
from autocomp.errors import ConfigError

__all__ = ["Cuda", "GpuInfo", "open_cuda"]


def open_cuda(index: int = 0) -> Cuda:
    """The GPU of that number, through pycuda where it is installed, else through NVIDIA's cuda-bindings.

    Raises:
        ConfigError: neither package is installed, or there is no GPU or driver; says what to do.
    """
    for load in (_pycuda, _bindings):
        try:
            make = load()
        except ImportError:  # not installed, or pycuda on a machine without the driver that it is linked to
            continue
        return make(index)
    raise ConfigError("no way to the GPU is installed: pip install cuda-bindings")


def _pycuda() -> Callable[[int], Cuda]:
    from autocomp.engines.cuda.with_pycuda import PyCuda

    return PyCuda


def _bindings() -> Callable[[int], Cuda]:
    from autocomp.engines.cuda.with_bindings import CudaBindings

    return CudaBindings
