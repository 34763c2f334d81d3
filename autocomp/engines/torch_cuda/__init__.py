"""PyTorch on an NVIDIA GPU, for GPUs that the installed TensorRT refuses, and for users who do not run TensorRT."""

from autocomp.engines.torch_cuda.backend import TorchCudaBackend
from autocomp.engines.torch_cuda.onnx_module import OnnxModule
from autocomp.engines.torch_cuda.program import exported_program, torch_function

__all__ = ["OnnxModule", "TorchCudaBackend", "exported_program", "torch_function"]
