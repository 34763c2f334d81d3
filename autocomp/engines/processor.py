"""The processor that CPU engines run on: its name, and how it computes 8-bit products."""

import os
import platform
import re
from functools import cache
from pathlib import Path

from autocomp.capabilities import DeviceInfo

__all__ = ["cpu_device", "processor", "weight_max"]

# Instruction sets that decide how fast, and how exactly, 8-bit products are computed.
_SETS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
# Those that a device's name ends with, the fastest first: hypervisors call unlike processors "AMD EPYC".
_NAMED = ("amx_int8", "avx512_vnni", "avx_vnni", "avx512f")
_EXACT = frozenset({"avx_vnni", "avx512_vnni", "asimddp"})


def cpu_device(engine: str, threads: int) -> DeviceInfo:
    """Fingerprint of this machine's processor under an engine, given as name and version."""
    model, flags = processor()
    details = (("cpu", model), ("instructions", " ".join(flags)), ("cpus", str(os.cpu_count())))
    known = re.sub(r"\((r|tm)\)|\bcpu\b|@.*", "", model.lower())
    fastest = next((name for name in _NAMED if name in flags), "")
    slug = re.sub(r"[^a-z0-9]+", "-", f"{known} {fastest}").strip("-")
    return DeviceInfo(f"{slug}-{threads}t", engine, threads, details)


def weight_max() -> int:
    """Largest weight code whose products with uint8 are exact: without 8-bit dot products x86 adds pairs of them in
    16 bits, where those of larger codes saturate."""
    return 127 if _EXACT.intersection(processor()[1]) else 63


@cache
def processor() -> tuple[str, tuple[str, ...]]:
    """Name of the processor and those of its instruction sets that matter to int8."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        model = platform.processor() or platform.machine()
        return model, ("asimddp",) if platform.machine() == "arm64" else ()
    names = re.search(r"^(?:model name|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = frozenset(flags[1].split()) if flags else frozenset[str]()
    return names[1].strip() if names else platform.machine(), tuple(name for name in _SETS if name in present)
