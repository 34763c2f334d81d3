"""Timing in real fresh processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from autocomp.engines import BackendSpec, estimate, fresh, measure_fresh
from autocomp.errors import EngineError
from autocomp.policy import Policy
from autocomp.results import Block, Timing, TimingProtocol
from tests.engines.conftest import Case

QUICK = TimingProtocol(warmup_ms=1, blocks=2, block_ms=1, min_repeats=2, builds=2, max_drift=100.0)


def test_round_trip_equals_this_process(resnet8: Case, tmp_path: Path) -> None:
    """The simulated engine's times are exact, so nothing may be lost on the way."""
    full, pruned = resnet8.emit(Policy()), resnet8.emit(Policy(kept={"layer3.0.conv1": 8}))
    file = tmp_path / "reference.onnx"
    file.write_bytes(full)
    timing = measure_fresh(BackendSpec("simulated"), pruned, file, QUICK)
    assert [block.build for block in timing.blocks] == [0, 0, 1, 1]
    from autocomp.engines import make_backend

    backend = make_backend(BackendSpec("simulated"))
    with backend.build(pruned) as candidate, backend.build(full) as reference:
        expected = candidate.time(1)[0] / reference.time(1)[0]
    assert estimate(timing, "p50").ratio.value == expected


def test_real_engine_in_fresh_processes(resnet8: Case) -> None:
    data = resnet8.emit(Policy())
    timing = measure_fresh(BackendSpec("onnxruntime", batch=2), data, data, QUICK)
    assert {block.build for block in timing.blocks} == {0, 1}
    assert all(time > 0 for block in timing.blocks for time in block.candidate_ms + block.reference_ms)


def test_a_build_on_a_slowed_device_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    references_ms = iter([10.0, 10.0, 14.0, 10.0, 99.0])
    builds: list[int] = []

    def one(spec: BackendSpec, files: list[str], protocol: TimingProtocol, build: int) -> Timing:
        builds.append(build)
        return Timing((Block(build, (5.0,), (next(references_ms),)),))

    monkeypatch.setattr(fresh, "_one", one)
    timing = measure_fresh(BackendSpec(), b"", b"", TimingProtocol(builds=3))
    assert builds == [0, 1, 2, 3]
    assert [block.build for block in timing.blocks] == [0, 1, 3] and timing.rejected == 1


def test_a_device_that_never_settles_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[int] = []

    def one(spec: BackendSpec, files: list[str], protocol: TimingProtocol, build: int) -> Timing:
        builds.append(build)
        return Timing((Block(build, (5.0,), (10.0 * 2**build,)),))

    monkeypatch.setattr(fresh, "_one", one)
    assert len(measure_fresh(BackendSpec(), b"", b"", TimingProtocol(builds=3)).blocks) == 1
    assert len(builds) == 6


def test_failure_is_the_last_line(resnet8: Case) -> None:
    with pytest.raises(EngineError, match="a timing process failed: this is no ONNX model"):
        measure_fresh(BackendSpec("simulated"), b"nonsense", resnet8.emit(Policy()), QUICK)
    with pytest.raises(EngineError, match="cannot read the model"):
        measure_fresh(BackendSpec("simulated"), Path("nowhere.onnx"), resnet8.emit(Policy()), QUICK)


def test_killed_process_is_an_error(resnet8: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nkill -9 $$\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(EngineError, match="was killed by signal 9"):
        measure_fresh(BackendSpec("simulated"), resnet8.emit(Policy()), resnet8.emit(Policy()), QUICK)


def test_silent_process_is_an_error(resnet8: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nexit 0\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(EngineError, match="no result"):
        measure_fresh(BackendSpec("simulated"), resnet8.emit(Policy()), resnet8.emit(Policy()), QUICK)


def test_worker_starts_without_torch_or_unneeded_runtimes() -> None:
    code = (
        "import sys, autocomp.engines, autocomp.engines.worker;"
        "print(*sorted({'torch', 'onnxruntime', 'optuna', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": "."}
    )
    assert done.stdout.strip() == ""
