"""Files written as a whole, and what a full or read-only disk says."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autocomp.errors import RunError

__all__ = ["storage_errors", "write_atomic"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNUSABLE = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk, or a path that no folder can have, into one line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise RunError(f"no space left to write {path}: free some and go on with 'autocomp resume'") from error
        if error.errno in _UNUSABLE:
            raise RunError(f"cannot write {path} ({error.strerror}): choose another folder with --out") from error
        raise


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace a file as a whole: a reader, or a kill, sees the old content or the new one."""
    raw = data.encode() if isinstance(data, str) else data
    with storage_errors(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
