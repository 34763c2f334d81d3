"""A typed ONNX file as a program of PyTorch's own format."""

import io

import torch

from autocomp.engines.template import parse
from autocomp.engines.torch_cuda.onnx_module import OnnxModule

__all__ = ["exported_program"]


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
