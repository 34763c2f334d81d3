"""What this machine can build and run, and the command for what it lacks."""

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from autocomp.engines.backends import BACKENDS, BackendSpec, make_backend
from autocomp.engines.cuda import GpuInfo, open_cuda
from autocomp.engines.cuda.telemetry import GpuState, Nvml
from autocomp.engines.processor import processor
from autocomp.errors import AutocompError

__all__ = ["Diagnosis", "EngineCheck", "GpuCheck", "advice_for", "diagnose"]

# Compute capabilities from which on tensor cores have a type.
_TYPES = (("fp16", (7, 0)), ("int8", (7, 5)), ("tf32", (8, 0)), ("bf16", (8, 0)), ("fp8", (8, 9)))
HELD = 0.75
"""Of the highest clock: what a GPU holds under load, whatever its power limit."""
_PACKAGES = ("torch", "onnx", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", "pycuda", "cuda-bindings")


@dataclass(frozen=True, slots=True)
class EngineCheck:
    """An engine.

    Attributes:
        name: as in ``--engine``.
        version: of its runtime; None where it cannot be asked.
        runs: whether it runs here.
        precisions: a policy may use.
        builds_for: compute capabilities it builds for ahead of time, with no GPU.
        missing: why it does not run, and what to do.
    """

    name: str
    version: str | None
    runs: bool
    precisions: tuple[str, ...] = ()
    builds_for: tuple[str, ...] = ()
    missing: str | None = None


@dataclass(frozen=True, slots=True)
class GpuCheck:
    """A GPU.

    Attributes:
        info: from the driver.
        driver: version of its package; None where it does not tell.
        state: clocks, power and temperature now; None where it does not tell.
        types: its tensor cores compute with.
        access: the package that drives it: pycuda or cuda-bindings.
        highest_mhz: SM clock; None where the driver does not tell.
    """

    info: GpuInfo
    driver: str | None
    state: GpuState | None
    types: tuple[str, ...]
    access: str
    highest_mhz: int | None = None

    @property
    def clocks(self) -> str:
        if self.state is None:
            return "unknown"
        return "locked" if self.state.locked else "not locked"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that was found.

    Attributes:
        processor: name.
        cpus: logical ones.
        python: version.
        packages: name -> version of those installed.
        gpu: the first one; None without.
        no_gpu: why there is none.
        engines: every one there is, by name.
        advice: commands that would make more possible.
    """

    processor: str
    cpus: int
    python: str
    packages: dict[str, str]
    gpu: GpuCheck | None
    no_gpu: str | None
    engines: tuple[EngineCheck, ...]
    advice: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        if self.gpu is not None:
            data["gpu"] = {**asdict(self.gpu), "clocks": self.gpu.clocks}
        return data


def diagnose() -> Diagnosis:
    """Look at the machine; nothing is built and nothing is timed."""
    gpu, no_gpu = _gpu()
    engines = tuple(_engine(name) for name in sorted(BACKENDS))
    packages = {name: found for name in _PACKAGES if (found := _version(name)) is not None}
    return Diagnosis(
        processor=processor()[0],
        cpus=os.cpu_count() or 1,
        python=platform.python_version(),
        packages=packages,
        gpu=gpu,
        no_gpu=no_gpu,
        engines=engines,
        advice=tuple(advice_for(gpu, engines, packages)),
    )


def _gpu() -> tuple[GpuCheck | None, str | None]:
    try:
        cuda = open_cuda()
    except AutocompError as error:
        return None, str(error)
    telemetry = Nvml(cuda.info.bus)
    types = tuple(name for name, since in _TYPES if cuda.info.capability >= since)
    read = telemetry.driver_version(), telemetry.read(), types, cuda.package, telemetry.highest_mhz()
    return GpuCheck(cuda.info, *read), None


def _engine(name: str) -> EngineCheck:
    from autocomp.engines.tensorrt import FLAVOURS, find_flavour

    found: str | None = None
    ahead: tuple[str, ...] = ()
    if name in FLAVOURS:
        try:
            flavour = find_flavour(name)
        except AutocompError as error:
            return EngineCheck(name, None, False, missing=str(error))
        found = flavour.version
        ahead = flavour.targets()
    try:
        backend = make_backend(BackendSpec(name))
    except AutocompError as error:
        return EngineCheck(name, found, False, builds_for=ahead, missing=str(error))
    precisions = tuple(str(entry) for entry in backend.capabilities().precisions)
    return EngineCheck(name, backend.device.engine.partition(" ")[2] or None, True, precisions, ahead)


def advice_for(gpu: GpuCheck | None, engines: tuple[EngineCheck, ...], packages: dict[str, str]) -> list[str]:
    """Commands, the most useful first."""
    found = []
    missing = {check.name for check in engines if check.missing is not None and "not installed" in check.missing}
    if gpu is None:
        if "tensorrt-rtx" in missing:
            found.append("to build engines for GPUs elsewhere: pip install 'autocomp[tensorrt-rtx]'")
    else:
        if missing >= {"tensorrt", "tensorrt-rtx"}:
            found.append("to run TensorRT on this GPU: pip install 'autocomp[tensorrt]'")
        if "pycuda" not in packages and "cuda-bindings" not in packages:
            found.append("to reach the GPU: pip install cuda-bindings")
        if gpu.highest_mhz is not None and gpu.state is not None and not gpu.state.locked:
            held = int(HELD * gpu.highest_mhz)
            found.append(f"for steadier times: sudo nvidia-smi -lgc {held} (undo: sudo nvidia-smi -rgc)")
    if "openvino" in missing:
        found.append("for a second engine on this processor: pip install 'autocomp[openvino]'")
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
