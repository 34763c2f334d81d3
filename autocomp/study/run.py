"""The run folder: manifest, append-only journal, lock, and what a finished search leaves."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import IO, Any, Self

from autocomp.errors import RunError
from autocomp.storage import storage_errors, write_atomic

__all__ = ["FORMAT", "Manifest", "Run", "read_manifest", "refuse_taken"]

FORMAT = 1
_MANIFEST, _JOURNAL, _LOCK = "manifest.json", "journal.jsonl", ".lock"
_MANY = ("trial", "wave")
"""Kinds of lines of which there may be a hundred thousand: read when asked for, not held."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a run was started with; fixed for its life but for ``status``.

    Attributes:
        version: of autocomp.
        config: the search's configuration as JSON.
        command: how it was started.
        versions: package -> version.
        device: fingerprint of the measured device.
        digests: of weights, data, graph, recipe, numerics and space: what every cached accuracy depends on.
        status: ``running``, ``verified``, ``unverified``, ``infeasible``, ``failed`` or ``interrupted``.
        format: of the folder.
    """

    version: str
    config: Mapping[str, Any]
    command: Sequence[str]
    versions: Mapping[str, str]
    device: Mapping[str, Any]
    digests: Mapping[str, str]
    status: str = "running"
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "version": self.version,
            "status": self.status,
            "config": dict(self.config),
            "command": list(self.command),
            "versions": dict(self.versions),
            "device": dict(self.device),
            "digests": dict(self.digests),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(**data)


def read_manifest(folder: Path) -> Manifest:
    """Raises: RunError if the folder is no run, or one of another version."""
    path = folder / _MANIFEST
    try:
        data = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{folder} is no run folder: it holds no {_MANIFEST}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is damaged ({error}): start a new search") from error
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        raise RunError(
            f"{folder} was written in format {found!r}, this version reads {FORMAT}: "
            f"open it with autocomp {data.get('version', 'of that time') if isinstance(data, dict) else ''}".rstrip()
        )
    try:
        manifest = Manifest.from_json(data)
        for name in ("config", "versions", "device", "digests"):
            if not isinstance(data[name], dict):
                raise TypeError(f"{name} is no table")
        return manifest
    except TypeError as error:
        raise RunError(f"{path} is damaged ({error}): start a new search") from error


def refuse_taken(folder: Path) -> None:
    """Raises: RunError if ``folder`` holds something already, or can be none."""
    with storage_errors(folder):
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken:
        raise RunError(f"{folder} exists already: choose another --out, or go on with 'autocomp resume {folder}'")


class Run:
    """An open run folder. One process at a time; every journal line is on disk before the next step begins.

    Use `Run.create` or `Run.open`, and close it (it is a context manager).
    """

    def __init__(self, folder: Path, manifest: Manifest, lock: IO[str]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._entries: list[dict[str, Any]] = []
        self._lock = lock
        self._journal: IO[bytes] | None = None
        self._before_s = self._read()
        self._opened = monotonic()

    @classmethod
    def create(cls, folder: Path, manifest: Manifest) -> Self:
        """Make a new folder.

        Raises:
            RunError: it exists and is not empty, or cannot be written.
        """
        refuse_taken(folder)
        made = not folder.exists()
        try:
            with storage_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                lock = _acquire(folder)
                write_atomic(folder / _MANIFEST, json.dumps(manifest.to_json(), indent=2))
        except BaseException:
            if made and folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)
            raise
        run = cls(folder, manifest, lock)
        run.record("opened")
        return run

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open an existing run to go on with it. A torn last line is cut off.

        Raises:
            RunError: no run, another version, in use by another process, or damaged before its last line.
        """
        manifest = read_manifest(folder)
        with storage_errors(folder):
            lock = _acquire(folder)
        try:
            run = cls(folder, manifest, lock)
            run.record("opened")
        except BaseException:
            lock.close()
            raise
        return run

    @staticmethod
    def entries_of(folder: Path) -> Iterator[dict[str, Any]]:
        """All whole journal lines, one at a time, since memory should not hold them all.

        Raises:
            RunError: a line before the last one is damaged.
        """
        return (entry for entry, _ in _whole_lines(folder / _JOURNAL))

    def record(self, kind: str, **data: Any) -> None:
        """Append one line and force it to disk."""
        self.record_all(kind, [data])

    def record_all(self, kind: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append a line for each of what came together, and force them to disk at once."""
        seconds = round(monotonic() - self._opened, 3)
        entries = [{"kind": kind, "seconds": seconds, **data} for data in rows]
        lines = b"".join(json.dumps(entry, allow_nan=False).encode() + b"\n" for entry in entries)
        path = self.folder / _JOURNAL
        with storage_errors(path):
            if self._journal is None:
                self._journal = path.open("ab", buffering=0)
            start = os.fstat(self._journal.fileno()).st_size
            written = self._journal.write(lines)
            if written != len(lines):
                os.ftruncate(self._journal.fileno(), start)
                raise OSError(errno.ENOSPC, "short write", str(path))
            os.fsync(self._journal.fileno())
        if kind not in _MANY:
            self._entries += entries

    def entries(self, kind: str) -> list[dict[str, Any]]:
        """All lines of a kind, oldest first."""
        entries = self.entries_of(self.folder) if kind in _MANY else self._entries
        return [entry for entry in entries if entry["kind"] == kind]

    @property
    def seconds(self) -> float:
        """Time spent on this run, earlier parts included."""
        return self._before_s + monotonic() - self._opened

    def set_status(self, status: str) -> None:
        self.manifest = replace(self.manifest, status=status)
        self.write("manifest.json", json.dumps(self.manifest.to_json(), indent=2))

    def write(self, name: str, data: bytes | str) -> Path:
        """Write one artefact as a whole."""
        path = self.folder / name
        write_atomic(path, data)
        return path

    def _read(self) -> float:
        """Take in the lines that are held and cut off a torn one; seconds of the run so far.

        A part begins with ``opened``; the last time stamps of all parts add up.
        """
        total, last, whole = 0.0, 0.0, 0
        path = self.folder / _JOURNAL
        for entry, end in _whole_lines(path):
            whole = end
            if entry["kind"] not in _MANY:
                self._entries.append(entry)
            if entry["kind"] == "opened":
                total, last = total + last, 0.0
            last = entry["seconds"]
        if path.exists() and path.stat().st_size > whole:
            os.truncate(path, whole)
        return total + last

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _whole_lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each line that is an entry, and where in the file it ends; a last one that a kill has torn is none."""
    if not path.exists():
        return
    end, size = 0, path.stat().st_size
    with path.open("rb") as file:
        for line in file:
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("torn")
                entry = json.loads(line)
                if not isinstance(entry, dict) or not {"kind", "seconds"} <= entry.keys():
                    raise ValueError("no entry")
            except ValueError as error:
                if end + len(line) >= size:
                    return
                raise RunError(f"{path} is damaged at byte {end}: start a new search") from error
            end += len(line)
            yield entry, end


def _acquire(folder: Path) -> IO[str]:
    """The folder's lock, held until the handle is closed; the kernel frees it if the process dies."""
    handle = (folder / _LOCK).open("a+")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.close()
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise RunError(f"another process works on {folder}: wait for it, or choose another --out") from None
        raise
    return handle
