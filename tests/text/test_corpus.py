"""Text files, cut into sequences: two sides that never mix, every token once an epoch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rorqual.text.corpus import Sequences, TextConfig, TextFiles
from rorqual.text.tokenizer import train_tokenizer


def write_files(folder: Path, number: int) -> None:
    (folder / "deep").mkdir()
    for index in range(number):
        place = folder / "deep" if index % 2 else folder
        (place / f"file{index}.txt").write_text(f"text number {index}. " * 5)
    (folder / "picture.png").write_bytes(b"\xff\x00")


def test_sides_are_apart_and_do_not_depend_on_the_other_files(tmp_path: Path) -> None:
    write_files(tmp_path, 30)
    config = TextConfig(paths=(str(tmp_path),), held_out_share=0.3)
    files = TextFiles(config).files
    names = {side: {path.name for path in paths} for side, paths in files.items()}
    assert not names["train"] & names["held_out"] and len(names["train"] | names["held_out"]) == 30
    assert 3 <= len(names["held_out"]) <= 15
    (tmp_path / "file0.txt").unlink()
    fewer = {path.name for path in TextFiles(config).files["held_out"]}
    assert fewer == names["held_out"] - {"file0.txt"}


def test_a_limit_takes_whole_files_of_both_sides(tmp_path: Path) -> None:
    write_files(tmp_path, 30)
    config = TextConfig(paths=(str(tmp_path),), held_out_share=0.3, max_bytes=1000)
    files = [path for side in TextFiles(config).files.values() for path in side]
    total = sum(path.stat().st_size for path in files)
    assert 1000 <= total < 1000 + max(path.stat().st_size for path in files)


def test_tokens_are_the_files_with_an_end_after_each(tmp_path: Path) -> None:
    write_files(tmp_path, 20)
    (tmp_path / "broken.txt").write_bytes(b"caf\xe9")
    files = TextFiles(TextConfig(paths=(str(tmp_path),), held_out_share=0.5))
    tokenizer = train_tokenizer(files.texts("train"), 320)
    for side in ("train", "held_out"):
        ids = files.tokens(side, tokenizer)  # type: ignore[arg-type]
        ends = np.flatnonzero(ids == tokenizer.special_id("eos"))
        assert len(ends) == len(files.files[side]) and ends[-1] == len(ids) - 1  # type: ignore[index]
        parts = [tokenizer.decode(part[:-1].tolist()) for part in np.split(ids, ends + 1)[:-1]]
        assert parts == list(files.texts(side))  # type: ignore[arg-type]


def test_an_epoch_has_every_sequence_once_and_the_next_another_order() -> None:
    sequences = Sequences(np.arange(107, dtype=np.int32), length=10, seed=3)
    first = [tuple(sequences[index].tolist()) for index in range(10)]
    second = [tuple(sequences[index].tolist()) for index in range(10, 20)]
    assert sorted(first) == sorted(second) == [tuple(range(start, start + 10)) for start in range(0, 100, 10)]
    assert first != second
    assert tuple(sequences[4].tolist()) == first[4], "any index at any time"


@pytest.mark.parametrize("number", (0, 1))
def test_too_little_text_is_refused(tmp_path: Path, number: int) -> None:
    write_files(tmp_path, number)
    with pytest.raises(ValueError, match="No text file is left for the (train|held-out) side"):
        TextFiles(TextConfig(paths=(str(tmp_path),)))
    with pytest.raises(ValueError, match="has 9 tokens, and one sequence takes 10"):
        Sequences(np.arange(9), 10, 0)


@pytest.mark.parametrize("share", (0.0, 1.0))
def test_one_side_alone_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="held_out_share"):
        TextConfig(held_out_share=share)


def test_the_standard_library_is_there_without_its_tests_and_without_packages() -> None:
    files = TextFiles(TextConfig(max_bytes=0)).files
    names = [path.as_posix() for side in files.values() for path in side]
    assert len(names) > 200
    assert not any("site-packages" in name for name in names)
