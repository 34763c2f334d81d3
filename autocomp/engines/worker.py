"""A timing process: ``python -m autocomp.engines.worker`` reads a request and writes a timing, both as JSON."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from autocomp.engines.backends import BackendSpec, make_backend
from autocomp.engines.lock import device_lock
from autocomp.engines.timing import compare
from autocomp.errors import AutocompError, EngineError
from autocomp.results import TimingProtocol

__all__ = ["main"]


def main() -> int:
    """Answer one request from standard input; a failure is one line on standard error and status 1."""
    try:
        print(json.dumps(_answer(json.load(sys.stdin))))
    except AutocompError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    backend = make_backend(BackendSpec.from_json(request["spec"]))
    protocol = TimingProtocol(**request["protocol"])
    candidate, reference = (_read(request[name]) for name in ("candidate", "reference"))
    with backend.build(candidate) as built, backend.build(reference) as beside, device_lock(backend.device):
        timing = compare(built, beside, protocol, request["build"])
    return asdict(timing)


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise EngineError(f"cannot read the model {path}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
