"""One measurement at a time on a device, across processes."""

import fcntl
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from autocomp.capabilities import DeviceInfo
from autocomp.errors import EngineError

__all__ = ["device_lock"]

_POLL_S = 0.02


@contextmanager
def device_lock(device: DeviceInfo, timeout_s: float | None = None) -> Iterator[None]:
    """Hold a device alone. The lock dies with its process, so nothing is left to clean up.

    Engines of all kinds and thread counts on one machine disturb each other, so the lock is per device name
    without its threads. Not re-entrant.

    Args:
        device: to be timed on.
        timeout_s: longest wait for another process; None waits as long as it takes.

    Raises:
        EngineError: another process, named by its id, holds the device for longer than that, or the lock file
            cannot be written.
    """
    path = _folder() / f"{_machine(device)}.lock"
    try:
        file = path.open("a+")
    except OSError as error:
        raise EngineError(f"cannot open the device lock {path}: {error.strerror}") from error
    with file:
        _acquire(file, device, timeout_s)
        try:
            yield
        finally:
            file.truncate(0)
            fcntl.flock(file, fcntl.LOCK_UN)


def _acquire(file: TextIO, device: DeviceInfo, timeout_s: float | None) -> None:
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if deadline is not None and time.monotonic() >= deadline:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise EngineError(
                    f"{device.name} is being timed by process {holder} for more than {timeout_s:g} s: "
                    "wait for it or end it"
                ) from None
            time.sleep(_POLL_S)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()


def _machine(device: DeviceInfo) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", re.sub(r"-\d+t$", "", device.name))


def _folder() -> Path:
    """A folder of this user's, the same for all their processes."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base is not None and os.access(base, os.W_OK):
        folder = Path(base) / "autocomp"
    else:
        folder = Path(tempfile.gettempdir()) / f"autocomp-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise EngineError(f"cannot create the folder of the device lock {folder}: {error.strerror}") from error
    return folder
