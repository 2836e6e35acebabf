"""Files that are whole or absent: written beside their place, flushed to the disk, then renamed into it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

TEMPORARY_PREFIX = ".tmp-"


class StoreError(ValueError):
    """The run directory cannot be read or written; the message says what to do. Nothing earlier is lost."""


@contextlib.contextmanager
def disk_errors(action: str, path: Path) -> Iterator[None]:
    """Turn the operating system's errors into a StoreError that says what was being done and what helps."""
    try:
        yield
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        if code in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            advice = "The disk is full. Free some space and run the same command again: it goes on where it stopped."
        elif code in (errno.EACCES, errno.EROFS, errno.EPERM):
            advice = "The place is not writable. Choose another directory with --out, or change its permissions."
        elif code is not None:
            advice = "What was written before is intact; once the cause is gone, run the same command again."
        else:
            raise
        raise StoreError(f"Could not {action} {path}: {error}. {advice}") from error


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a whole file or none: `write` fills a temporary file beside `path`, which then takes its name.

    Raises: StoreError when the disk refuses; `path` then still holds what it held before.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    try:
        with disk_errors("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable, as fsync does for the contents of a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Flush every file and directory below `path`, and `path` itself."""
    for folder, _, names in os.walk(path):
        for name in names:
            descriptor = os.open(Path(folder, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(folder))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_temporaries(root: Path) -> None:
    """Delete what an interrupted writer left anywhere below `root`."""
    for path in sorted(root.rglob(f"{TEMPORARY_PREFIX}*")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class DirectoryLock:
    """Holds a directory for one writer. The system drops the lock when its process ends, however it ends.

    Raises: StoreError naming the process that holds it.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / "lock"
        with disk_errors("lock", directory):
            self._file = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise StoreError(
                f"{directory} is being written by another process (pid {holder}). Wait for it, end it, or choose "
                "another directory with --out."
            ) from None
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def release(self) -> None:
        self._file.close()
