"""TensorRT and TensorRT-RTX as engines."""

import hashlib
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from autocomp.capabilities import Capabilities, DeviceInfo, Numerics
from autocomp.engines.attribution import Attribution
from autocomp.engines.backends import BackendSpec
from autocomp.engines.cuda import Cuda, open_cuda
from autocomp.engines.structure import has_sparse_weights
from autocomp.engines.tensorrt.build import BuildOptions, build_plan
from autocomp.engines.tensorrt.engine import AheadOfTimeEngine, TensorRtEngine
from autocomp.engines.tensorrt.flavour import Flavour, find_flavour
from autocomp.engines.tensorrt.inspector import EngineLayer, inspected
from autocomp.engines.tensorrt.onnx_file import prepare
from autocomp.engines.tensorrt.plan_file import PlanCache, PlanHeader, read_plan, write_plan
from autocomp.engines.tensorrt.timing_cache import sealed, timing_cache
from autocomp.errors import ConfigError, EngineError
from autocomp.policy import FEWER_BITS, FP8, FP32, INT8, Precision
from autocomp.resources import cache
from autocomp.results import OperatorTimes

__all__ = ["TensorRtBackend", "parse_targets"]

FP16 = Precision("fp16", "fp16")
NUMERICS = Numerics(signed_activations=True, symmetric_activations=True, weight_max=127)
SINCE = (
    (Precision("bf16", "bf16"), (8, 0)),
    (FP8, (8, 9)),
    (Precision("fp16", "fp16", sparse=True), (8, 0)),
    (Precision("int8", "int8", sparse=True), (8, 0)),
)
"""Precisions, and the compute capability of the first tensor cores that have them."""


class TensorRtBackend:
    """Builds strongly typed engines for the first GPU, or ahead of time for those that the hardware names."""

    measures = True

    def __init__(self, spec: BackendSpec) -> None:
        """Raises: ConfigError: the package, the driver or the GPU is missing, or a target is unknown."""
        self._flavour = find_flavour(spec.name)
        self._spec = spec
        self._cuda: Cuda | None = None
        self._targets: tuple[str, ...] = ()
        if spec.hardware is not None:
            self._targets = parse_targets(spec.hardware, self._flavour)
        else:
            self._cuda = open_cuda()

    @property
    def name(self) -> str:
        return self._spec.name

    @property
    def batch(self) -> int:
        return self._spec.batch

    @property
    def device(self) -> DeviceInfo:
        engine, tf32 = str(self._flavour), "on" if self._spec.tf32 else "off"
        if self._cuda is not None:
            return self._cuda.info.device(engine, self._spec.threads, tf32=tf32)
        name = f"cuda-{'-'.join(target.lower() for target in self._targets)}"
        return DeviceInfo(name, engine, self._spec.threads, (("tf32", tf32),))

    def capabilities(self) -> Capabilities:
        oldest = min(map(_capability, self._targets)) if self._cuda is None else self._cuda.info.capability
        newer = [kind for kind, since in SINCE if oldest >= since]
        return Capabilities((FP32, FP16, INT8, *FEWER_BITS, *newer), channel_multiple=8, numerics=NUMERICS)

    def build(self, onnx: bytes) -> TensorRtEngine | AheadOfTimeEngine:
        plan = self.plan(self._prepared(onnx))
        if self._cuda is None:
            return AheadOfTimeEngine(onnx, self.batch, self._targets)
        return TensorRtEngine(self._flavour, plan, self._cuda, self.batch)

    def profile(self, onnx: bytes, repeats: int) -> OperatorTimes:
        """See `autocomp.protocols.Backend`; engines for profiles carry the names of what was fused, and are built
        for it."""
        file = self._prepared(onnx)
        with self._detailed(file) as engine:
            layers, run_ms = engine.profile(repeats)
            fused = _fused(engine, file)
        owners = Attribution(file).of_names(layers, fused)
        sums: dict[str, float] = {}
        for name, ms in layers.items():
            sums[owners[name]] = sums.get(owners[name], 0.0) + ms
        return OperatorTimes(sums, run_ms)

    def layers(self, onnx: bytes) -> tuple[EngineLayer, ...]:
        """What the model's engine is made of; it is built for that, with the names of what is fused.

        Raises:
            EngineError: the file is refused, or the GPU is not here.
        """
        file = self._prepared(onnx)
        with self._detailed(file) as engine:
            return inspected(engine.inspect(), file)

    def _detailed(self, file: bytes) -> TensorRtEngine:
        if self._cuda is None:
            raise EngineError(f"nothing runs here for {', '.join(self._targets)}: profile and inspect on such a GPU")
        plan = build_plan(self._flavour, file, replace(self._options(file), detailed=True))
        return TensorRtEngine(self._flavour, plan, self._cuda, self.batch)

    def save(self, onnx: bytes, path: Path) -> PlanHeader:
        """Build an engine and write it to a file that says what it is for."""
        file = self._prepared(onnx)
        header = self._header(file)
        write_plan(path, header, self.plan(file))
        return header

    def load(self, path: Path) -> TensorRtEngine:
        """An engine from a file that `save` wrote.

        Raises:
            EngineError: it is of another TensorRT, for another GPU or batch, or damaged.
        """
        header, plan = read_plan(path)
        cuda = self._cuda if self._cuda is not None else open_cuda()
        header.check(self._flavour, cuda.info.target, self.batch)
        return TensorRtEngine(self._flavour, plan, cuda, self.batch)

    def plan(self, file: bytes) -> bytes:
        """The serialized engine of a prepared file, from the cache unless a fresh one is asked for."""
        header, plans = self._header(file), PlanCache(cache("engines"))
        found = None if self._spec.fresh else plans.get(header)
        if found is None:
            options = self._options(file)
            found = build_plan(self._flavour, file, options)
            if options.timing_cache is not None and options.timing_cache.exists():
                sealed(options.timing_cache)
            with suppress(OSError):  # a cache that cannot be written is no reason to stop
                plans.put(header, found)
        return found

    def _header(self, file: bytes) -> PlanHeader:
        gpu = None if self._cuda is None else self._cuda.info
        return PlanHeader(
            engine=self._flavour.engine,
            version=self._flavour.version,
            targets=self._targets if gpu is None else (gpu.target,),
            device="" if gpu is None else f"{gpu.name}, driver {gpu.driver}",
            tf32=self._spec.tf32,
            batch=self.batch,
            model=hashlib.sha256(file).hexdigest(),
            batches=self._spec.batches,
        )

    def _options(self, file: bytes) -> BuildOptions:
        timings = None
        # Fresh builds are to choose their kernels anew, and TensorRT-RTX times none.
        if self._cuda is not None and not self._spec.fresh and not self._flavour.builds_without_gpu:
            with suppress(OSError):
                timings = timing_cache(cache("timings"), self._flavour, self._cuda.info)
        spread = self._spec.batches
        return BuildOptions(
            self._targets,
            tf32=self._spec.tf32,
            batches=None if spread is None else (spread[0], self.batch, spread[1]),
            sparse=has_sparse_weights(file),
            timing_cache=timings,
        )

    def _prepared(self, onnx: bytes) -> bytes:
        return prepare(onnx, self.batch if self._spec.batches is None else None)


def parse_targets(text: str, flavour: Flavour) -> tuple[str, ...]:
    """Compute capabilities from ``sm89``, ``8.9`` or a list of them, separated by commas.

    Raises:
        ConfigError: one is unknown to the package, or it builds only for the GPU at hand.
    """
    if not flavour.builds_without_gpu:
        raise ConfigError(f"{flavour.engine} builds for the GPU at hand: leave --hardware out, or use tensorrt-rtx")
    found = tuple("SM" + re.sub(r"^sm|\.", "", part.strip().lower()) for part in text.split(","))
    known = flavour.targets()
    unknown = [name for name in found if name not in known]
    if unknown:
        raise ConfigError(f"{flavour} cannot build for {unknown[0].lower()}: use {', '.join(known).lower()}")
    return found


def _fused(engine: TensorRtEngine, file: bytes) -> dict[str, tuple[str, ...]]:
    """Name of each of the engine's layers -> operators of the file; nothing where the inspector does not tell."""
    try:
        return {layer.name: layer.operators for layer in inspected(engine.inspect(), file)}
    except EngineError:
        return {}


def _capability(target: str) -> tuple[int, int]:
    """Major and minor number of a compute capability written as ``SM89``."""
    major, minor = re.fullmatch(r"SM(\d+)(\d)", target).groups()  # type: ignore[union-attr]
    return int(major), int(minor)
