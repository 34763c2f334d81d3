"""Which TensorRT is installed."""

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autocomp.errors import ConfigError

__all__ = ["FLAVOURS", "Flavour", "find_flavour", "first_installed", "installed"]

# Engine name -> modules that may provide it. The second of TensorRT-RTX is what its registry wheels bring.
FLAVOURS: Mapping[str, tuple[str, ...]] = {
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
_OLDEST = 10  # of tensorrt: strongly typed networks and this interface


@dataclass(frozen=True, slots=True)
class Flavour:
    """A TensorRT package.

    Attributes:
        engine: as in ``--engine``.
        module: to import.
        version: of it.
    """

    engine: str
    module: str
    version: str

    @property
    def builds_without_gpu(self) -> bool:
        """Whether it builds for GPUs that are not here; it then times nothing while it builds."""
        return self.engine == "tensorrt-rtx"

    def targets(self) -> tuple[str, ...]:
        """Compute capabilities that it builds for ahead of time, as ``SM89``."""
        if not self.builds_without_gpu:
            return ()
        return tuple(name for name in self.load().ComputeCapability.__members__ if name.startswith("SM"))

    def load(self) -> Any:
        return importlib.import_module(self.module)

    def __str__(self) -> str:
        return f"{self.engine} {self.version}"


def find_flavour(engine: str) -> Flavour:
    """The package behind an engine's name.

    Raises:
        ConfigError: it is not installed, cannot be loaded, or is too old.
    """
    install = f"pip install 'autocomp[{engine}]'"
    broken = ""
    for module in FLAVOURS[engine]:
        try:
            version = str(importlib.import_module(module).__version__)
        except (AttributeError, ImportError, OSError, RuntimeError) as error:
            if not (isinstance(error, ModuleNotFoundError) and error.name == module):
                broken = " ".join(str(error).split())
            continue
        if engine == "tensorrt" and _major(version) < _OLDEST:
            raise ConfigError(f"tensorrt {version} is too old, {_OLDEST}.0 is needed: {install}")
        return Flavour(engine, module, version)
    if broken:
        raise ConfigError(f"the engine {engine} cannot be loaded ({broken}): install it again, {install}")
    raise ConfigError(f"the engine {engine} is not installed: {install}")


def first_installed(*, ahead: bool) -> str:
    """The engine to build with where none is named: the data-centre package before TensorRT-RTX.

    Args:
        ahead: for a GPU that is not here, which only the second can.
    """
    found = (flavour.engine for flavour in installed() if flavour.builds_without_gpu or not ahead)
    return next(found, "tensorrt-rtx")


def installed() -> tuple[Flavour, ...]:
    """Every TensorRT that can be loaded here, the data-centre one first."""
    found = []
    for engine in FLAVOURS:
        try:
            found.append(find_flavour(engine))
        except ConfigError:
            continue
    return tuple(found)


def _major(version: str) -> int:
    digits = re.match(r"\d+", version)
    return int(digits[0]) if digits else 0
