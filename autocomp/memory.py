"""What a model will take of memory against what there is, asked before the work begins."""

from collections.abc import Mapping
from pathlib import Path

from autocomp.errors import ModelError

__all__ = ["available_bytes", "refuse_larger"]


def available_bytes(machine: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Memory that can still be had: the machine's, or less where the control group (version 2) limits it.

    Args:
        machine: the kernel's table of memory.
        group: folder of the control group; what it caches of files counts as free.

    Returns:
        bytes; None where neither can be read, as on other systems than Linux.
    """
    known = []
    try:
        entries = dict(line.split(":", 1) for line in machine.read_text().splitlines() if ":" in line)
        known.append(int(entries["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        pass
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        known.append(max(0, limit - used + int(counts["inactive_file"])))
    except (OSError, KeyError, ValueError):  # no such group, or its limit is the word "max"
        pass
    return min(known, default=None)


def refuse_larger(what: str, parts: Mapping[str, int]) -> None:
    """Refuse what does not fit.

    Args:
        what: needs the memory, for the message.
        parts: what for -> bytes.

    Raises:
        ModelError: the parts together are more than is available; the message says how much each is.
    """
    free, needed = available_bytes(), sum(parts.values())
    if free is not None and needed > free:
        listed = ", ".join(f"{_units(size)} {name}" for name, size in parts.items())
        raise ModelError(
            f"{what} needs about {_units(needed)} of memory ({listed}), but {_units(free)} are free: take a "
            "machine with more, or a smaller model or input"
        )


def _units(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 10**9 else f"{size / 1e6:.2f} MB"
