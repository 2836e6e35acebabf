"""Checkpoint directories: written whole, verified when read, the last few kept.

<root>/step_000012/...        the caller's files
<root>/step_000012/COMPLETE   step, and the size and SHA-256 of each file; without it the checkpoint does not count
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import msgspec

from rorqual.records import Record
from rorqual.store.files import (
    TEMPORARY_PREFIX,
    StoreError,
    disk_errors,
    sha256,
    sync_directory,
    sync_tree,
    write_atomic,
)

COMPLETE = "COMPLETE"
REPLACED_SUFFIX = ".replaced"


class Checkpoint(Record):
    """A verified checkpoint: `Checkpoint(path="runs/a/checkpoints/rl/step_000012", step=12)`."""

    path: str
    step: int


class FileSeal(Record):
    """Size and hash of one file of a checkpoint."""

    num_bytes: int
    sha256: str


class Seal(Record):
    """The contents of COMPLETE: every file of the checkpoint by its path inside the directory."""

    step: int
    files: dict[str, FileSeal]


def step_name(step: int) -> str:
    """`step_000012`: sorts as text in the order of the numbers."""
    return f"step_{step:06d}"


def write_checkpoint(root: Path, step: int, write: Callable[[Path], object], keep: int) -> Path:
    """Call `write` on an empty directory, seal it, put it in place, then drop all but the newest `keep` checkpoints.

    A checkpoint of the same step is replaced. Raises: StoreError when the disk refuses; earlier ones are untouched.
    """
    target = root / step_name(step)
    temporary = root / f"{TEMPORARY_PREFIX}{target.name}"
    try:
        with disk_errors("write the checkpoint", target):
            root.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            write(temporary)
            _seal(temporary, step)
            _put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    prune(root, keep)
    return target


def latest_checkpoint(root: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None where there are none at all.

    Warns about each one that is passed over. Raises: StoreError when there are some and none verifies.
    """
    problems = []
    for step, path in reversed(_checkpoints(root)):
        problem = find_problem(path)
        if problem is None:
            return Checkpoint(path=str(path), step=step)
        problems.append(f"{path.name}: {problem}")
        warnings.warn(f"Passing over checkpoint {path}: {problem}.", stacklevel=2)
    if problems:
        raise StoreError(
            f"No checkpoint in {root} can be read ({'; '.join(problems)}). Restore one from a copy, or delete the "
            "directory to start this stage again."
        )
    return None


def find_problem(path: Path) -> str | None:
    """What is wrong with a checkpoint directory, or None: every sealed file is there with its size and hash."""
    try:
        seal = msgspec.json.decode((path / COMPLETE).read_bytes(), type=Seal)
    except FileNotFoundError:
        return f"it has no {COMPLETE} file, so it was never finished"
    except (msgspec.DecodeError, OSError) as error:
        return f"its {COMPLETE} file cannot be read ({error})"
    for name, expected in seal.files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected.num_bytes:
            return f"{name} has {file.stat().st_size} bytes, {expected.num_bytes} were written"
        if sha256(file) != expected.sha256:
            return f"{name} differs from what was written"
    return None


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints. Raises: ValueError when `keep` is below 1."""
    if keep < 1:
        raise ValueError(f"keep = {keep}: at least one checkpoint must be kept.")
    for _, path in _checkpoints(root)[:-keep]:
        doomed = root / f"{TEMPORARY_PREFIX}{path.name}"
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def restore_replaced(root: Path) -> None:
    """Undo a replacement that was interrupted between its two renames; drop the old one where the new one is there."""
    for replaced in root.rglob(f"step_*{REPLACED_SUFFIX}"):
        target = replaced.with_suffix("")
        if target.exists():
            shutil.rmtree(replaced)
        else:
            os.rename(replaced, target)


def _seal(directory: Path, step: int) -> None:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    sealed = {
        path.relative_to(directory).as_posix(): FileSeal(num_bytes=path.stat().st_size, sha256=sha256(path))
        for path in files
    }
    sync_tree(directory)
    write_atomic(directory / COMPLETE, lambda file: file.write(msgspec.json.encode(Seal(step=step, files=sealed))))


def _put_in_place(temporary: Path, target: Path) -> None:
    replaced = target.with_name(target.name + REPLACED_SUFFIX)
    if target.exists():
        os.rename(target, replaced)
    os.rename(temporary, target)
    sync_directory(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _checkpoints(root: Path) -> list[tuple[int, Path]]:
    found = [path for path in root.glob("step_*") if path.is_dir() and path.name[5:].isdecimal()]
    return sorted((int(path.name[5:]), path) for path in found)
