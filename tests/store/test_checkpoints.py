"""Checkpoints: only a whole one counts, and a broken one never hides the one before it."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from rorqual.store.checkpoints import COMPLETE, find_problem, latest_checkpoint, restore_replaced, write_checkpoint
from rorqual.store.files import StoreError


def write(step: int):
    def fill(directory: Path) -> None:
        (directory / "weights.bin").write_bytes(bytes([step]) * 100)
        (directory / "shards").mkdir()
        (directory / "shards" / "0.bin").write_bytes(b"x" * step)

    return fill


def contents(root: Path) -> int:
    checkpoint = latest_checkpoint(root)
    assert checkpoint is not None
    assert (Path(checkpoint.path) / "weights.bin").read_bytes() == bytes([checkpoint.step]) * 100
    return checkpoint.step


def test_newest_is_read_and_older_ones_pruned(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step in (1, 2, 10):
        write_checkpoint(tmp_path, step, write(step), keep=2)
    assert contents(tmp_path) == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000010"]


def test_same_step_is_replaced(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, write(7), keep=2)
    write_checkpoint(tmp_path, 1, write(1), keep=2)
    assert contents(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "differs from what was written": lambda path: flip(path / "weights.bin"),
    "has 50 bytes, 100 were written": lambda path: (path / "weights.bin").write_bytes(b"x" * 50),
    "0.bin is missing": lambda path: (path / "shards" / "0.bin").unlink(),
    "never finished": lambda path: (path / COMPLETE).unlink(),
    "COMPLETE file cannot be read": lambda path: (path / COMPLETE).write_bytes(b'{"step": 2'),
}


@pytest.mark.parametrize("words", DAMAGES)
def test_broken_checkpoint_is_passed_over_with_a_warning(tmp_path: Path, words: str) -> None:
    write_checkpoint(tmp_path, 1, write(1), keep=3)
    broken = write_checkpoint(tmp_path, 2, write(2), keep=3)
    assert find_problem(broken) is None
    DAMAGES[words](broken)
    with pytest.warns(UserWarning, match=words):
        assert contents(tmp_path) == 1


def test_all_broken_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    for step in (1, 2):
        flip(write_checkpoint(tmp_path, step, write(step), keep=3) / "weights.bin")
    with pytest.warns(UserWarning), pytest.raises(StoreError, match="step_000002: .* step_000001: .* start this stage"):
        latest_checkpoint(tmp_path)


def test_failed_write_leaves_the_earlier_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, write(1), keep=1)

    def full(directory: Path) -> None:
        (directory / "weights.bin").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StoreError, match="The disk is full. Free some space"):
        write_checkpoint(tmp_path, 2, full, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]

    def serializer_full(directory: Path) -> None:
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    with pytest.raises(StoreError, match="The disk is full"):
        write_checkpoint(tmp_path, 2, serializer_full, keep=1)
    assert contents(tmp_path) == 1


def test_interrupted_replacement_is_undone(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1, write(1), keep=1)
    path.rename(path.with_name("step_000001.replaced"))
    assert latest_checkpoint(tmp_path) is None
    restore_replaced(tmp_path)
    assert contents(tmp_path) == 1


def test_keep_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep = 0"):
        write_checkpoint(tmp_path, 1, write(1), keep=0)
