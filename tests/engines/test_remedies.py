"""What is said of messages that TensorRT and the driver are known to give."""

import re

import pytest

from autocomp.engines.remedies import explain

MESSAGES = {
    "CUDA initialization failure with error: 35. Please check your CUDA installation: "
    "CUDA driver version is insufficient for CUDA runtime version": "driver is missing or too old.*install a newer one",
    "[checkMacros.cpp::catchCudaError::203] Error Code 1: Cuda Runtime (no CUDA-capable device is detected)": (
        "no CUDA device is found: run 'autocomp doctor'"
    ),
    "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)": (
        "out of memory: give a smaller --batch"
    ),
    "Error Code 2: OutOfMemory (Requested size was 17179869184 bytes.)": ("out of memory: give a smaller"),
    "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion stdVersionRead == "
    "kSERIALIZATION_VERSION failed. Version tag does not match. Note: Current Version: 240, Serialized Engine Version: "
    "239)": "built by another version of TensorRT: build it again",
    "The engine plan file is generated on an incompatible device, expecting compute capability 8.9 got compute "
    "capability 8.6, please rebuild.": "does not fit this GPU's compute capability: build it again",
    "CUDA_ERROR_INVALID_DEVICE": "no GPU of that number: see 'nvidia-smi'",
    "Network has dynamic or shape inputs, but no optimization profile has been defined.": (
        "dynamic shapes have no profile: give --batches"
    ),
}


@pytest.mark.parametrize("message", MESSAGES)
def test_a_known_message_comes_with_its_remedy_and_without_source_lines(message: str) -> None:
    found = explain(message)
    assert "\n" not in found and ".cpp" not in found and "Error Code" not in found
    assert re.search(MESSAGES[message], found)


def test_an_unknown_message_is_shown_as_it_is() -> None:
    assert explain("Could not find\n any implementation for node X.") == "Could not find any implementation for node X"
