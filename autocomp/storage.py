"""Files written as a whole, tables as text, and what a full or read-only disk says."""

import csv
import errno
import io
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from autocomp.errors import RunError

__all__ = ["csv_of", "storage_errors", "write_atomic"]

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


def csv_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """One line a row under the names that all rows have; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for place, row in enumerate(rows):
        if place == 0:
            writer.writerow(row)
        writer.writerow(row.values())
    return text.getvalue()


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
