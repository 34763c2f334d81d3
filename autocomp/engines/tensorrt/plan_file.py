"""Engine files: a plan behind a line that says what built it and for which GPU, and a cache of them."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from autocomp.engines.tensorrt.flavour import Flavour
from autocomp.errors import EngineError
from autocomp.policy import digest_of

__all__ = ["PlanCache", "PlanHeader", "read_plan", "write_plan"]

_MAGIC = "autocomp-engine-1"
CACHE_BYTES = 4 * 2**30


@dataclass(frozen=True, slots=True)
class PlanHeader:
    """What an engine depends on.

    Attributes:
        engine, version: of the TensorRT that built it.
        targets: compute capabilities it runs on.
        device: name of the GPU it was timed on while it was built; empty when built ahead of time.
        tf32: as built.
        batch: images in a run.
        batches: smallest and largest number that it takes; None for ``batch`` alone.
        model: SHA-256 of the ONNX file, which fixes structure, precisions and weights.
    """

    engine: str
    version: str
    targets: tuple[str, ...]
    device: str
    tf32: bool
    batch: int
    model: str
    batches: tuple[int, int] | None = None

    @property
    def key(self) -> str:
        return digest_of(asdict(self))

    def check(self, flavour: Flavour, capability: str, batch: int) -> None:
        """Raises: EngineError: the engine is of another TensorRT, or for another GPU or number of images.

        Args:
            flavour: installed here.
            capability: of the GPU here, as ``SM89``.
            batch: images in a run.
        """
        low, high = self.batches or (self.batch, self.batch)
        if not low <= batch <= high:
            taken = f"batch {self.batch}" if low == high else f"batches of {low} to {high}"
            raise EngineError(f"the engine takes {taken}, not {batch}: give --batch {self.batch}")
        if (self.engine, self.version) != (flavour.engine, flavour.version):
            raise EngineError(
                f"the engine was built by {self.engine} {self.version} and {flavour} is installed: build it again"
            )
        if capability not in self.targets:
            raise EngineError(
                f"the engine was built for {', '.join(self.targets)} and this GPU is {capability}: build it again"
            )


def write_plan(path: Path, header: PlanHeader, plan: bytes) -> None:
    """Write an engine file, whole or not at all."""
    line = json.dumps({"format": _MAGIC, **asdict(header), "sha256": hashlib.sha256(plan).hexdigest()})
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_bytes(line.encode() + b"\n" + plan)
    unfinished.replace(path)


def read_plan(path: Path) -> tuple[PlanHeader, bytes]:
    """Read an engine file.

    Raises:
        EngineError: it cannot be read, is no engine that autocomp wrote, or is damaged.
    """
    try:
        line, _, plan = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise EngineError(f"cannot read the engine {path}: {error.strerror}") from error
    try:
        fields = json.loads(line)
        digest, magic = fields.pop("sha256"), fields.pop("format")
        batches = fields.get("batches")
        fields |= {"targets": tuple(fields["targets"]), "batches": None if batches is None else tuple(batches)}
        header = PlanHeader(**fields)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise EngineError(f"{path} is no engine that autocomp wrote: build one with 'autocomp build'") from error
    if magic != _MAGIC or digest != hashlib.sha256(plan).hexdigest():
        raise EngineError(f"the engine {path} is damaged or of another version of autocomp: build it again")
    return header, plan


class PlanCache:
    """Engines that were built before, in a folder that is kept below a size.

    Args:
        folder: may not exist yet.
        limit_bytes: the files used longest ago are removed above it.
    """

    def __init__(self, folder: Path, limit_bytes: int = CACHE_BYTES) -> None:
        self._folder = folder
        self._limit = limit_bytes

    def get(self, header: PlanHeader) -> bytes | None:
        """The plan of exactly that header. A damaged file counts as missing."""
        path = self._path(header)
        if not path.exists():
            return None
        try:
            found, plan = read_plan(path)
        except EngineError:
            path.unlink(missing_ok=True)
            return None
        if found != header:
            return None
        os.utime(path)
        return plan

    def put(self, header: PlanHeader, plan: bytes) -> None:
        write_plan(self._path(header), header, plan)
        files = sorted(self._folder.glob("*.engine"), key=lambda path: path.stat().st_mtime)
        total = sum(path.stat().st_size for path in files)
        for path in files[:-1]:
            if total <= self._limit:
                break
            total -= path.stat().st_size
            path.unlink(missing_ok=True)

    def _path(self, header: PlanHeader) -> Path:
        return self._folder / f"{header.key}.engine"
