"""The device lock between two real processes."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from autocomp.capabilities import DeviceInfo
from autocomp.engines import device_lock
from autocomp.errors import EngineError

DEVICE = DeviceInfo("test-cpu-1t", "none", 1)
HOLDER = """
import sys
from autocomp.capabilities import DeviceInfo
from autocomp.engines import device_lock
with device_lock(DeviceInfo("test-cpu-1t", "none", 1)):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_second_process_times_out_and_names_the_first(holder: subprocess.Popen[str]) -> None:
    with pytest.raises(EngineError, match=f"process {holder.pid} "), device_lock(DEVICE, timeout_s=0.1):
        pass


def test_second_process_waits_its_turn(holder: subprocess.Popen[str]) -> None:
    assert holder.stdin is not None
    holder.stdin.write("\n")
    holder.stdin.flush()
    with device_lock(DEVICE, timeout_s=30):
        pass


def test_lock_dies_with_its_process(holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    with device_lock(DEVICE, timeout_s=5):
        pass


def test_thread_counts_share_a_device_and_devices_do_not(holder: subprocess.Popen[str]) -> None:
    with pytest.raises(EngineError), device_lock(DeviceInfo("test-cpu-4t", "none", 4), timeout_s=0.0):
        pass
    with device_lock(DeviceInfo("other-cpu-1t", "none", 1), timeout_s=0.0):
        pass


def test_lock_is_free_again_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), device_lock(DEVICE, timeout_s=0.0):
        raise ZeroDivisionError
    start = time.monotonic()
    with device_lock(DEVICE, timeout_s=5):
        assert time.monotonic() - start < 5


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "autocomp").mkdir(mode=0o500)
    with pytest.raises(EngineError, match="device lock"), device_lock(DEVICE):
        pass
