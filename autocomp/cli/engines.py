"""``autocomp doctor`` and ``autocomp build``: what this machine can do, and engines for GPUs that are not here."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from autocomp.cli.flags import AsJson, Batch, Hardware, Text
from autocomp.cli.output import console, print_json, quiet_stdout
from autocomp.errors import EngineError, InputError

__all__ = ["add_engine_commands"]


def add_engine_commands(app: typer.Typer) -> None:
    """Register the commands of this file."""
    app.command()(doctor)
    app.command()(build)


def doctor(json: AsJson = None) -> None:
    """Say what this machine can build and run, and the command for what it lacks."""
    from autocomp.engines.doctor import diagnose

    with quiet_stdout():
        found = diagnose()
    if json:
        print_json(found.to_json())
        return
    from autocomp.report.doctor import print_diagnosis

    print_diagnosis(found, console(sys.stdout))


def build(
    file: Annotated[Path, typer.Argument(help="ONNX model, with symmetric int8 where it is quantized")],
    engine: Annotated[str, typer.Option(help="tensorrt or tensorrt-rtx")] = "tensorrt-rtx",
    hardware: Hardware = None,
    batch: Batch = None,
    tf32: Annotated[bool, typer.Option("--tf32/--no-tf32", help="10-bit mantissas in float32 layers")] = False,
    calibration: Annotated[Path | None, typer.Option(help="calibration cache of TensorRT 8 or 10 for FILE")] = None,
    out: Annotated[Text, typer.Option(help="engine file [FILE.engine]")] = None,
    json: AsJson = None,
) -> None:
    """Build a TensorRT engine; for a GPU that is not here name its compute capability, as --hardware sm89."""
    from autocomp.engines import BackendSpec
    from autocomp.engines.tensorrt import FLAVOURS, CalibrationCache, TensorRtBackend, with_scales

    if engine not in FLAVOURS:
        raise InputError(f"the engine {engine} keeps no engine files: use {' or '.join(FLAVOURS)}")
    if not file.is_file():
        raise InputError(f"no file {file}: give an ONNX model")
    path = file.with_suffix(".engine") if out is None else Path(out)
    backend = TensorRtBackend(BackendSpec(engine, batch or 1, hardware=hardware, tf32=tf32))
    try:
        data = file.read_bytes()
        if calibration is not None:
            data, quantized, layers = with_scales(data, CalibrationCache.read(calibration))
            print(f"{quantized} of {layers} layers are int8", file=sys.stderr)
        header = backend.save(data, path)
    except EngineError as error:
        raise InputError(str(error)) from error
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    if json:
        found = {"file": str(path), "size_bytes": path.stat().st_size, "targets": list(header.targets)}
        print_json({**found, "engine": header.engine, "version": header.version, "batch": header.batch})
    else:
        print(f"{path}: {header.engine} {header.version} for {', '.join(header.targets)}, batch {header.batch}")
