"""Timings of real engines, written down and played again.

    PYTHONPATH=. python -m tests.engines.replay NAME [--slowed]

writes ``tests/engines/traces/NAME.json``: every answer of a small ResNet's ONNX Runtime engines to ``time`` while it
was compared with itself. With ``--slowed`` another process keeps the same processor busy in the middle third.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from autocomp.engines import BackendSpec, compare, make_backend
from autocomp.policy import Policy
from autocomp.protocols import Engine
from autocomp.results import Timing, TimingProtocol

TRACES = Path(__file__).parent / "traces"
PROTOCOL = TimingProtocol(warmup_ms=30, blocks=9, block_ms=60)
SLOWED = range(8, 14)
"""Which of the blocks' answers, both engines' counted together, the other process slows."""


class Standin:
    """An engine that holds nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


@dataclass
class Recorder(Standin):
    """An engine that writes down what it answers."""

    engine: Engine
    answers: list[list[float]]
    before: Any = None

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        return self.engine.run(images)

    def time(self, repeats: int) -> NDArray[np.float64]:
        if self.before is not None:
            self.before()
        found = self.engine.time(repeats)
        self.answers.append(np.round(found, 6).tolist())
        return found


class Replayed(Recorder):
    """An engine that answers as one did, and fails where it is asked something else."""

    def __init__(self, answers: list[list[float]]) -> None:
        self._left: Iterator[list[float]] = iter(answers)

    def time(self, repeats: int) -> NDArray[np.float64]:
        found = np.array(next(self._left))
        assert len(found) == repeats, "the protocol asks for other blocks than it did when this was recorded"
        return found


def replayed(name: str) -> Timing:
    """The timing that comes of a trace."""
    trace = json.loads((TRACES / f"{name}.json").read_text())
    return compare(Replayed(trace["candidate"]), Replayed(trace["reference"]), PROTOCOL)


def main() -> None:
    from tests.engines.conftest import case
    from tests.engines.nets import resnet

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--slowed", action="store_true")
    args = parser.parse_args()
    backend = make_backend(BackendSpec(batch=32))
    file = case(resnet(depth=20, width=16, size=32)).emit(Policy())
    burner: list[subprocess.Popen[bytes]] = []
    asked = 0

    def watch() -> None:
        nonlocal asked
        asked += 1
        if args.slowed and asked == SLOWED.start:
            command = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
            burner.append(subprocess.Popen(command, stdout=subprocess.PIPE))
            burner[0].stdout.readline()  # type: ignore[union-attr]
        if args.slowed and asked == SLOWED.stop:
            burner.pop().kill()

    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with backend.build(file) as first, backend.build(file) as second:
        sides = Recorder(first, [], watch), Recorder(second, [], watch)
        timing = compare(*sides, PROTOCOL)
    made = {"device": backend.device.to_json(), "load": os.getloadavg()[0], "rejected": timing.rejected}
    path = TRACES / f"{args.name}.json"
    path.write_text(json.dumps({**made, "candidate": sides[0].answers, "reference": sides[1].answers}) + "\n")
    print(path, timing.rejected, [round(float(np.median(block.reference_ms)), 3) for block in timing.blocks])


if __name__ == "__main__":
    main()
