"""Building engines in a process of its own, with a time limit."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from autocomp.engines.attribution import layer_of
from autocomp.engines.remedies import explain
from autocomp.engines.template import parse
from autocomp.engines.tensorrt import build_worker
from autocomp.engines.tensorrt.flavour import Flavour
from autocomp.errors import EngineError

__all__ = ["BuildOptions", "build_plan"]


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How an engine is built.

    Attributes:
        targets: compute capabilities as ``SM89``; empty for the GPU at hand.
        tf32: lets float32 layers compute with 10-bit mantissas.
        batches: smallest, usual and largest number of images, for a file that leaves it free; None for other files.
        sparse: looks for kernels that skip the zeros of 2:4 sparse weights.
        detailed: keeps the names of all fused operators in the engine, for profiles.
        level: the builder's optimization level; None for its default.
        timing_cache: file of kernel timings, read and written; None without.
        timeout_s: after which the builder is ended.
    """

    targets: tuple[str, ...] = ()
    tf32: bool = False
    batches: tuple[int, int, int] | None = None
    sparse: bool = False
    detailed: bool = False
    level: int | None = None
    timing_cache: Path | None = None
    timeout_s: float = 900.0


def build_plan(flavour: Flavour, onnx: bytes, options: BuildOptions) -> bytes:
    """Build an engine.

    Args:
        flavour: the TensorRT that builds.
        onnx: as `onnx_file.prepare` writes it.
        options: see there.

    Returns:
        the serialized engine ("plan").

    Raises:
        EngineError: with the builder's first error, the node it refused and the layer that it belongs to, or how the
            builder's process ended.
    """
    with TemporaryDirectory(prefix="autocomp-") as folder:
        model, engine = Path(folder) / "model.onnx", Path(folder) / "model.engine"
        model.write_bytes(onnx)
        request = {
            "module": flavour.module,
            "onnx": str(model),
            "engine": str(engine),
            "targets": options.targets,
            "tf32": options.tf32,
            "batches": options.batches,
            "sparse": options.sparse,
            "detailed": options.detailed,
            "level": options.level,
            "timing_cache": None if options.timing_cache is None else str(options.timing_cache),
        }
        answer = _ask(flavour, request, options.timeout_s)
        if answer["built"]:
            return engine.read_bytes()
    raise EngineError(f"{flavour.engine} cannot build the model: {_reason(onnx, answer)}")


def _ask(flavour: Flavour, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    # -P: the worker's folder holds modules of other names than its own, which it must not import.
    command = [sys.executable, "-P", "-W", "ignore", build_worker.__file__]
    try:
        done = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, check=False, timeout=timeout_s
        )
    except subprocess.TimeoutExpired as error:
        raise EngineError(
            f"the builder of {flavour.engine} took more than {timeout_s:g} s and was ended: build on an idle machine, "
            "or search without this structure"
        ) from error
    lines = done.stderr.strip().splitlines()
    if done.returncode < 0:
        hint = "end programs that take memory" if done.returncode == -9 else "report it to the maker of TensorRT"
        raise EngineError(f"the builder of {flavour.engine} was killed by signal {-done.returncode}: {hint}")
    if done.returncode != 0:
        raise EngineError(f"the builder of {flavour.engine} failed: {explain(lines[-1] if lines else '')}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _reason(onnx: bytes, answer: dict[str, Any]) -> str:
    for index, name, operator, text in answer["refused"]:
        if index < 0:
            return explain(text)
        layer = layer_of(parse(onnx), index)
        where = f"node {name} ({operator})" + (f" of layer {layer}" if layer else "")
        # Where the parser does not know an operator it says so with an expression of its own source.
        told = re.search(r"creator &&|^false$", text.strip())
        return f"{where} is refused: {'it knows no such operator' if told else explain(text)}"
    errors = [text for severity, text in answer["messages"] if severity != "WARNING"]
    return explain(errors[0]) if errors else "it gave no reason"
