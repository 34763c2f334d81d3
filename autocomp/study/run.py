"""The run folder: manifest, append-only journal, lock, and what a finished search leaves."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
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

    def __init__(self, folder: Path, manifest: Manifest, entries: list[dict[str, Any]], lock: IO[str]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._entries = [entry for entry in entries if entry["kind"] not in _MANY]
        self._lock = lock
        self._journal: IO[bytes] | None = None
        self._before_s = _elapsed_before(entries)
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
        run = cls(folder, manifest, [], lock)
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
            entries = cls.entries_of(folder, repair=True)
            run = cls(folder, manifest, entries, lock)
            run.record("opened")
        except BaseException:
            lock.close()
            raise
        return run

    @staticmethod
    def entries_of(folder: Path, *, repair: bool = False) -> list[dict[str, Any]]:
        """All whole journal lines; with ``repair`` a torn last one is removed from the file."""
        path = folder / _JOURNAL
        if not path.exists():
            return []
        raw = path.read_bytes()
        entries: list[dict[str, Any]] = []
        position = 0
        for line in raw.splitlines(keepends=True):
            last = position + len(line) == len(raw)
            try:
                if last and not line.endswith(b"\n"):
                    raise ValueError("torn")
                entry = json.loads(line)
                if not isinstance(entry, dict) or not {"kind", "seconds"} <= entry.keys():
                    raise ValueError("no entry")
                entries.append(entry)
            except ValueError as error:
                if not last:
                    raise RunError(f"{path} is damaged at byte {position}: start a new search") from error
                if repair:
                    os.truncate(path, position)
                break
            position += len(line)
        return entries

    def record(self, kind: str, **data: Any) -> None:
        """Append one line and force it to disk."""
        entry = {"kind": kind, "seconds": round(monotonic() - self._opened, 3), **data}
        line = json.dumps(entry, allow_nan=False).encode() + b"\n"
        path = self.folder / _JOURNAL
        with storage_errors(path):
            if self._journal is None:
                self._journal = path.open("ab", buffering=0)
            start = os.fstat(self._journal.fileno()).st_size
            written = self._journal.write(line)
            if written != len(line):
                os.ftruncate(self._journal.fileno(), start)
                raise OSError(errno.ENOSPC, "short write", str(path))
            os.fsync(self._journal.fileno())
        if kind not in _MANY:
            self._entries.append(entry)

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

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _elapsed_before(entries: Sequence[Mapping[str, Any]]) -> float:
    """Sum of the last time stamp of each part of the run (a part begins with ``opened``)."""
    total, last = 0.0, 0.0
    for entry in entries:
        if entry["kind"] == "opened":
            total, last = total + last, 0.0
        last = entry["seconds"]
    return total + last


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
