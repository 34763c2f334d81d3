"""A typed ONNX file as a program of PyTorch's own format, and as a function."""

import io
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from autocomp.engines.template import parse
from autocomp.engines.torch_cuda.onnx_module import OnnxModule

__all__ = ["exported_program", "torch_function"]


def exported_program(onnx: bytes) -> bytes:
    """A ``.pt2`` file, for ``torch.export.load``, that computes what the file says: any batch, weights in their types.

    Raises:
        EngineError: no ONNX model, or an operator that torch does not know under ONNX's name.
    """
    shapes = [[axis.dim_value for axis in value.type.tensor_type.shape.dim][1:] for value in parse(onnx).graph.input]
    # Weights in rows: the file's writer takes strided ones for parts of others. Two images: torch takes a size of 1 for
    # one that never changes.
    module = OnnxModule(onnx).to(memory_format=torch.contiguous_format).eval()
    images = tuple(torch.zeros(2, *shape) for shape in shapes)
    free = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(module, images, dynamic_shapes=(tuple(free for _ in shapes),))
    for node in program.graph.nodes:  # the larger part of the file, and names of folders on this machine
        node.meta.pop("stack_trace", None)
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def torch_function(onnx: bytes) -> Callable[..., NDArray[np.float32]]:
    """What the file says, computed by torch on the CPU: takes an array for each of its inputs.

    Raises:
        EngineError: no ONNX model, or an operator that torch does not know under ONNX's name.
    """
    module = OnnxModule(onnx).eval()

    def run(*inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            found: NDArray[np.float32] = module(*map(torch.from_numpy, inputs)).float().numpy()
        return found

    return run
