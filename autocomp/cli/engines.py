"""``autocomp doctor``, ``build`` and ``debug-accuracy``: what this machine can do, engines for GPUs that are not here,
and where an engine goes wrong."""

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from autocomp.cli.flags import (
    AsJson,
    Batch,
    CalibrationImages,
    Config,
    Data,
    Engine,
    Hardware,
    Mean,
    Model,
    OutputKey,
    Seed,
    Size,
    Std,
    Text,
    Threads,
    Weights,
    settings_of,
)
from autocomp.cli.output import UNTRUE, console, print_found, print_json, quiet_stdout, watched
from autocomp.errors import EngineError, InputError

__all__ = ["add_engine_commands"]


def add_engine_commands(app: typer.Typer) -> None:
    """Register the commands of this file."""
    app.command()(doctor)
    app.command()(build)
    app.command()(debug_accuracy)


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
    engine: Annotated[Text, typer.Option(help="tensorrt or tensorrt-rtx [what is installed]")] = None,
    hardware: Hardware = None,
    batch: Batch = None,
    batches: Annotated[Text, typer.Option(help="numbers of images that the engine takes, as 1-32 [--batch]")] = None,
    tf32: Annotated[bool, typer.Option("--tf32/--no-tf32", help="10-bit mantissas in float32 layers")] = False,
    calibration: Annotated[Path | None, typer.Option(help="calibration cache of TensorRT 8 or 10 for FILE")] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="say what is fused, in which precision, and where reformats sit (on a GPU)")
    ] = False,
    out: Annotated[Text, typer.Option(help="engine file [FILE.engine]")] = None,
    json: AsJson = None,
) -> None:
    """Build a TensorRT engine; for a GPU that is not here name its compute capability, as --hardware sm89."""
    from autocomp.engines import BackendSpec
    from autocomp.engines.tensorrt import FLAVOURS, CalibrationCache, TensorRtBackend, first_installed, with_scales

    engine = engine or first_installed(ahead=hardware is not None)
    if engine not in FLAVOURS:
        raise InputError(f"the engine {engine} keeps no engine files: use {' or '.join(FLAVOURS)}")
    if not file.is_file():
        raise InputError(f"no file {file}: give an ONNX model")
    path = file.with_suffix(".engine") if out is None else Path(out)
    spec = BackendSpec(engine, batch or 1, hardware=hardware, tf32=tf32, batches=_range_of(batches))
    backend = TensorRtBackend(spec)
    try:
        data = file.read_bytes()
        if calibration is not None:
            data, quantized, total = with_scales(data, CalibrationCache.read(calibration))
            print(f"{quantized} of {total} layers are int8", file=sys.stderr)
        made = backend.layers(data) if layers else ()
        header = backend.save(data, path)
    except EngineError as error:
        raise InputError(str(error)) from error
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    if json:
        found = {"file": str(path), "size_bytes": path.stat().st_size, "targets": list(header.targets)}
        built = {"engine": header.engine, "version": header.version, "batch": header.batch}
        print_json({**found, **built, "layers": [layer.to_json() for layer in made]})
        return
    if made:
        from autocomp.report import print_layers

        print_layers(made, console(sys.stdout))
    print(f"{path}: {header.engine} {header.version} for {', '.join(header.targets)}, batch {header.batch}")


def _range_of(text: str | None) -> tuple[int, int] | None:
    """Raises: InputError: it is no range."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)-(\d+)", text)
    if found is None:
        raise InputError(f"--batches {text}: give a range as 1-32")
    return int(found[1]), int(found[2])


def debug_accuracy(
    context: typer.Context,
    target: Annotated[Path, typer.Argument(metavar="RUN|POLICY", help="run folder, or policy.json of one")],
    onnx: Annotated[Path | None, typer.Option(help="file to examine [model.onnx of RUN]")] = None,
    model: Model = None,
    weights: Weights = None,
    output_key: OutputKey = None,
    data: Data = None,
    engine: Engine = None,
    hardware: Hardware = None,
    threads: Threads = None,
    batch: Batch = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    seed: Seed = None,
    calibration_images: CalibrationImages = None,
    config: Config = None,
    json: AsJson = None,
) -> None:
    """Compare an engine's accuracy with the torch model's, and find the layer at which it goes wrong.

    A run brings its own settings. Exit status 1 where the two differ by more than half a point.
    """
    given = settings_of(context, "target", "onnx", "json")
    from autocomp import api
    from autocomp.report import print_accuracy_gap

    with watched("nothing was changed", as_json=bool(json)) as observer:
        found = api.debug_accuracy(target, given, config, onnx, observer)
    print_found(found, print_accuracy_gap, as_json=bool(json))
    sys.exit(0 if found.agrees else UNTRUE)
