"""Timing in fresh processes: memory layout and a process's history are part of what a latency depends on."""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from autocomp.engines.backends import BackendSpec
from autocomp.engines.timing import merge
from autocomp.errors import EngineError
from autocomp.results import Block, Timing, TimingProtocol

__all__ = ["measure_fresh"]


def measure_fresh(
    spec: BackendSpec, candidate: bytes | Path, reference: bytes | Path, protocol: TimingProtocol
) -> Timing:
    """Time a model beside the reference in ``protocol.builds`` fresh processes, one after the other.

    Each process builds both engines anew and holds the device lock while it times them. A build all of whose blocks
    were rejected for drift of the reference is followed by another one, up to twice as many as were asked for.

    Args:
        spec: of the backend.
        candidate, reference: ONNX models or files of them.
        protocol: of each process; blocks of all are judged for drift together.

    Raises:
        EngineError: a process died or failed; the message ends with the last line it wrote.
    """
    with tempfile.TemporaryDirectory(prefix="autocomp-") as folder:
        files = []
        for name, model in (("candidate", candidate), ("reference", reference)):
            path = model if isinstance(model, Path) else Path(folder) / f"{name}.onnx"
            if isinstance(model, bytes):
                path.write_bytes(model)
            files.append(str(path))
        timings: list[Timing] = []
        while True:
            timings.append(_one(spec, files, protocol, len(timings)))
            merged = merge(timings, protocol.max_drift)
            usable = len({block.build for block in merged.blocks})
            if usable >= protocol.builds or len(timings) >= 2 * protocol.builds:
                return merged


def _one(spec: BackendSpec, files: list[str], protocol: TimingProtocol, build: int) -> Timing:
    request = {
        "spec": replace(spec, fresh=True).to_json(),
        "candidate": files[0],
        "reference": files[1],
        "protocol": protocol.to_json(),
        "build": build,
    }
    done = subprocess.run(
        [sys.executable, "-m", "autocomp.engines.worker"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        how = f"was killed by signal {-done.returncode}" if done.returncode < 0 else "failed"
        raise EngineError(f"a timing process {how}: {lines[-1] if lines else 'it wrote no message'}")
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
        blocks = tuple(
            Block(entry["build"], tuple(entry["candidate_ms"]), tuple(entry["reference_ms"]))
            for entry in answer["blocks"]
        )
        return Timing(blocks, answer["rejected"])
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise EngineError("a timing process wrote no result: run the same measurement again") from error
