"""The builder's own timings of kernels, kept per GPU and version, and used only as they were left."""

import hashlib
import re
from pathlib import Path

from autocomp.engines.cuda import GpuInfo
from autocomp.engines.tensorrt.flavour import Flavour

__all__ = ["sealed", "timing_cache"]


def timing_cache(folder: Path, flavour: Flavour, gpu: GpuInfo) -> Path:
    """The file for one GPU and version; one that is not as `sealed` left it is removed."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{flavour}-{gpu.name}-{gpu.driver}").strip("-").lower()
    path = folder / f"{name}.cache"
    folder.mkdir(parents=True, exist_ok=True)
    seal = _seal(path)
    if path.exists() and (not seal.exists() or seal.read_text() != _digest(path)):
        path.unlink()
    return path


def sealed(path: Path) -> str:
    """Write the file's digest beside it, and return it."""
    digest = _digest(path)
    _seal(path).write_text(digest)
    return digest


def _seal(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
