"""What is known of devices: profiles kept as folders, predictions from them, and latencies measured before."""

from autocomp.hardware.diff import KernelDifference, ProfileDifference, difference
from autocomp.hardware.kernels import ENTRY, Kernel, kernels_of, owners
from autocomp.hardware.latency import LatencyEntry, LatencyKey, LatencyTable
from autocomp.hardware.lookup import Question, kernel_asked
from autocomp.hardware.predict import SHORTEST_MS, KernelEstimate, Prediction, Predictor
from autocomp.hardware.profile import EngineTime, HardwareProfile, KernelTime

__all__ = [
    "ENTRY",
    "SHORTEST_MS",
    "EngineTime",
    "HardwareProfile",
    "Kernel",
    "KernelDifference",
    "KernelEstimate",
    "KernelTime",
    "LatencyEntry",
    "LatencyKey",
    "LatencyTable",
    "Prediction",
    "Predictor",
    "ProfileDifference",
    "Question",
    "difference",
    "kernel_asked",
    "kernels_of",
    "owners",
]
