"""Plain text to train a language model on: files, cut into sequences of one length, some of them held out.

Without paths it is the Python standard library's own sources: a few megabytes of real text that every machine has. A
file belongs to one side, decided by its name, so that no part of a held-out file is ever trained on. The files of a
side are laid end to end with an end token between them; a sequence may reach over it.

Shapes: L length of a sequence.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from rorqual.records import Record
from rorqual.text.tokenizer import Tokenizer

Side = Literal["train", "held_out"]


class TextConfig(Record):
    """paths: files, or directories that are searched for files of `suffixes`; empty is the standard library.

    max_bytes: how much is read, file by file in the order of their names' digests; 0 reads all. held_out_share: of the
    files. Raises: ValueError for a share that leaves one side empty.
    """

    paths: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = (".py", ".txt", ".md", ".rst")
    max_bytes: int = 4_000_000
    held_out_share: float = 0.05

    def __post_init__(self) -> None:
        if not 0.0 < self.held_out_share < 1.0:
            raise ValueError(f"TextConfig.held_out_share = {self.held_out_share}; expected more than 0, less than 1.")


class TextFiles:
    """The chosen files of each side. Raises: ValueError for a path that is absent, or too few files for two sides."""

    def __init__(self, config: TextConfig) -> None:
        self.config = config
        self.files: dict[Side, list[Path]] = {"train": [], "held_out": []}
        left = config.max_bytes or float("inf")
        for _, side, path in sorted(_found(config)):
            if left <= 0:
                break
            left -= path.stat().st_size
            self.files[side].append(path)
        for side, files in self.files.items():
            if not files:
                raise ValueError(
                    f"No text file is left for the {side.replace('_', '-')} side. Give more files (text.paths, "
                    "text.max_bytes) or another text.held_out_share."
                )

    def texts(self, side: Side) -> Iterator[str]:
        """The contents, undecodable bytes replaced."""
        for path in self.files[side]:
            yield path.read_text(encoding="utf-8", errors="replace")

    def tokens(self, side: Side, tokenizer: Tokenizer) -> np.ndarray:
        """All tokens of one side, int32, an end token after each file."""
        end = np.array([tokenizer.special_id("eos")], dtype=np.int32)
        parts = [part for text in self.texts(side) for part in (np.asarray(tokenizer.encode(text), np.int32), end)]
        return np.concatenate(parts)


class Sequences:
    """Sequences of `length` tokens, drawn without repetition until all are used, then again in another order."""

    def __init__(self, tokens: np.ndarray, length: int, seed: int) -> None:
        """Raises: ValueError when the text is shorter than one sequence."""
        self.tokens, self.length, self.seed = tokens, length, seed
        self.number = len(tokens) // length
        if not self.number:
            raise ValueError(f"The text has {len(tokens):,} tokens, and one sequence takes {length:,}; give more text.")
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __getitem__(self, index: int) -> np.ndarray:
        """The sequence at `index`, which may exceed their number. [L]"""
        epoch, place = divmod(index, self.number)
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.number)
        start = int(self._order[1][place]) * self.length
        return self.tokens[start : start + self.length]


def _found(config: TextConfig) -> Iterator[tuple[bytes, Side, Path]]:
    """Each file with its place in the order and its side, both decided by its name alone."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for root in [Path(path) for path in config.paths] or [library]:
        if not root.exists():
            raise ValueError(f"text.paths names {root}, which does not exist.")
        for path in [root] if root.is_file() else root.rglob("*"):
            name = path.name if root.is_file() else path.relative_to(root).as_posix()
            if not path.is_file() or (path != root and path.suffix not in config.suffixes):
                continue
            if root == library and name.startswith(("site-packages/", "dist-packages/", "test/")):
                continue
            digest = hashlib.sha256(name.encode()).digest()
            held_out = int.from_bytes(digest[:8], "big") / 2**64 < config.held_out_share
            yield digest[8:], "held_out" if held_out else "train", path
