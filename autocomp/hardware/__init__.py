"""What is known of devices: profiles kept as folders, and latencies measured before."""

from autocomp.hardware.latency import LatencyEntry, LatencyKey, LatencyTable
from autocomp.hardware.profile import HardwareProfile, Kernel

__all__ = ["HardwareProfile", "Kernel", "LatencyEntry", "LatencyKey", "LatencyTable"]
