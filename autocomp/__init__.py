"""Compress trained PyTorch models under a latency budget that the real engine, measured on the device, keeps.

``autocomp.search(model, data, budget="15ms")`` is the whole of it; the names below are loaded when first used, so that
importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autocomp.api import apply_policy, load_result, measure, resume, search
    from autocomp.outcome import SearchResult

__all__ = ["SearchResult", "apply_policy", "load_result", "measure", "resume", "search"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'autocomp' has no attribute {name!r}")
    return getattr(import_module("autocomp.outcome" if name == "SearchResult" else "autocomp.api"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
