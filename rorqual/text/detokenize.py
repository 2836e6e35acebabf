"""Token ids -> text while they arrive: no half character is ever shown, and control tokens stay apart from text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from rorqual.text.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"


class Piece(NamedTuple):
    """Some text; `is_control` where it is one control token, and not a text that spells one."""

    text: str
    is_control: bool


class Detokenizer:
    """Feed it ids in portions of any size, then `finish`: the pieces join to what the tokenizer makes of all ids.

    A character whose bytes lie in several tokens is given when its last byte is there.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._run: list[int] = []
        self._before = 0
        self._given = 0

    def feed(self, ids: Iterable[int]) -> Iterator[Piece]:
        """The text that `ids` complete. Runs only as far as it is iterated."""
        controls = self._tokenizer.control_tokens
        for token in ids:
            if token in controls:
                yield from self.finish()
                yield Piece(controls[token], True)
            else:
                self._run.append(token)
        text = self._pending()
        if text and not text.endswith(_INCOMPLETE):
            self._before, self._given = self._given, len(self._run)
            yield Piece(text, False)

    def finish(self) -> Iterator[Piece]:
        """What is left when no id follows: bytes that are no character become U+FFFD."""
        text = self._pending()
        self._run, self._before, self._given = [], 0, 0
        if text:
            yield Piece(text, False)

    def _pending(self) -> str:
        """Text of the ids that were not given yet, decoded behind those given last: a decoder may look one back."""
        if self._given == len(self._run):
            return ""
        shown = self._tokenizer.decode(self._run[self._before : self._given])
        return self._tokenizer.decode(self._run[self._before :])[len(shown) :]
