"""What to do about a message of the driver, of the builder or of the runtime."""

import re

__all__ = ["explain", "one_line"]

_REMEDIES = (
    (
        r"out[ _]?of[ _]?memory|MemoryError|MEM_ALLOC_FAILED|bad_alloc|FAILED_ALLOCATION|cudaError 2\b",
        "out of memory: give a smaller --batch, or end other programs on the GPU",
    ),
    (
        r"driver version is insufficient|cudaError 35\b|INSUFFICIENT_DRIVER|SYSTEM_DRIVER_MISMATCH|OLD_CUDA_DRIVER",
        "the NVIDIA driver is missing or too old for this CUDA version: install a newer one; see 'autocomp doctor'",
    ),
    (
        r"no CUDA-capable device|cudaError 100\b|NO_DEVICE",
        "no CUDA device is found: run 'autocomp doctor' to see what is missing",
    ),
    (r"invalid device ordinal|INVALID_DEVICE", "there is no GPU of that number: see 'nvidia-smi'"),
    (
        r"magicTag|[Vv]ersion tag|serialization version|serialized engine version",
        "it was built by another version of TensorRT: build it again with the one installed here",
    ),
    (
        r"compute capability|SM \d+ (is )?not supported|[Uu]nsupported SM|Target GPU SM",
        "it does not fit this GPU's compute capability: build it again for this GPU",
    ),
    (
        r"no optimization profile",
        "dynamic shapes have no profile: give --batches for images, and export the model with other sizes fixed",
    ),
)


def explain(message: str) -> str:
    """The message in one line, behind what to do about it where that is known."""
    for pattern, remedy in _REMEDIES:
        if re.search(pattern, message, re.IGNORECASE):
            return f"{remedy} ({one_line(message)})"
    return one_line(message)


def one_line(message: str) -> str:
    """A message of TensorRT without source lines and error codes."""
    text = " ".join(message.split())
    text = re.sub(r"\S+\.(cpp|h):\d+:? ?|In function \w+: ?|\[\d+\] |\[\w+\.\w+::\w+::\d+\] ", "", text)
    text = re.sub(r"(\w+::\w+: )?Error Code \d+: ", "", text)
    text = re.sub(r"\(?\(?In \w+ at [^()]*?(\(|\)|$)", r"\1", text)
    return text.strip(" .")[:300] or "it gave no reason"
