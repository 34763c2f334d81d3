"""The process that builds engines: started by its path, it imports the standard library and TensorRT alone.

Reads one request as JSON from standard input, writes the engine to the file that it names, and answers with one line
of JSON. A crash, a hang or a lack of memory inside TensorRT ends this process and nothing else.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    """Answer the request on standard input."""
    request = json.load(sys.stdin)
    messages: list[tuple[str, str]] = []
    answer = {"messages": messages, **build(importlib.import_module(request["module"]), request, messages)}
    print(json.dumps(answer))
    return 0


def build(trt: Any, request: dict[str, Any], messages: list[tuple[str, str]]) -> dict[str, Any]:
    """Parse and build.

    Args:
        trt: the TensorRT module.
        request: ``onnx`` and ``engine`` are files, ``targets`` names of compute capabilities or empty for the GPU at
            hand, ``batches`` the smallest, usual and largest number of images of an optimization profile or None,
            ``tf32``, ``sparse`` and ``detailed`` switches, ``level`` the builder's optimization level or None,
            ``timing_cache`` a file or None.
        messages: filled with (severity, text) of warnings and errors.

    Returns:
        ``refused``: the nodes that the parser refused, as index, name, operator and reason; ``built``: whether there
        is an engine.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
                messages.append((severity.name, message))

    logger = Logger()
    builder = trt.Builder(logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # the only kind where it is missing
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request["onnx"]):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        refused = [[error.node(), error.node_name(), error.node_operator(), error.desc()] for error in errors]
        return {"refused": refused, "built": False}
    config = builder.create_builder_config()
    (config.set_flag if request["tf32"] else config.clear_flag)(trt.BuilderFlag.TF32)
    if request["batches"]:
        images = network.get_input(0)
        profile = builder.create_optimization_profile()
        profile.set_shape(images.name, *((count, *tuple(images.shape)[1:]) for count in request["batches"]))
        config.add_optimization_profile(profile)
    if request["sparse"]:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if request["detailed"]:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if request["level"] is not None:
        config.builder_optimization_level = request["level"]
    if request["targets"]:
        config.num_compute_capabilities = len(request["targets"])
        for index, name in enumerate(request["targets"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    store = Path(request["timing_cache"]) if request["timing_cache"] else None
    if store is not None:
        known = store.read_bytes() if store.exists() else b""
        config.set_timing_cache(config.create_timing_cache(known), False)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        return {"refused": [], "built": False}
    Path(request["engine"]).write_bytes(bytes(engine))
    if store is not None:
        store.write_bytes(bytes(config.get_timing_cache().serialize()))
    return {"refused": [], "built": True}


if __name__ == "__main__":
    sys.exit(main())
