"""A needle in real text: a line `KEY = VALUE` somewhere in a document whose end asks for the value again.

    ... text ...  north copy = run blue if  ... text ...  north copy = run blue if
                  the needle, at its depth                the question, and behind it the answer

Key and value are random words of the tokenizer, one token each, so that a value cannot be guessed.

A model that attends to all its text finds it at any depth; what a selection of keys loses shows as a depth at which the
answer goes wrong. A small model learns the task only from such documents, so they can be mixed into what it trains on.
Everything follows from the seed and the document's number.

Shapes: L length of a document.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rorqual.records import Record
from rorqual.text.tokenizer import Tokenizer

Stream = int
"""Which of the independent sequences of documents: training, or what is measured."""

TRAINING: Stream = 0
MEASURED: Stream = 1

WORD = re.compile(" ?[A-Za-z]+")


class NeedleConfig(Record):
    """share: of the training sequences that hold needles, `needles_per_document` of them at random depths, all asked
    for at the end in another order. answer_weight: of the answers' tokens in the loss of these, 1 for all others; a
    value is a few tokens among thousands. key_tokens and value_tokens: how long both are.

    documents_per_depth: how many are measured at each of `depths`, in percent of the text, with one needle each; 0
    measures none.
    Raises: ValueError naming the field that is out of range.
    """

    share: float = 0.0
    needles_per_document: int = 1
    answer_weight: float = 1.0
    key_tokens: int = 2
    value_tokens: int = 3
    documents_per_depth: int = 0
    depths: tuple[int, ...] = (0, 25, 50, 75, 100)

    def __post_init__(self) -> None:
        valid = {
            "share": 0.0 <= self.share <= 1.0,
            "needles_per_document": self.needles_per_document >= 1,
            "answer_weight": self.answer_weight > 0.0,
            "key_tokens": self.key_tokens >= 1,
            "value_tokens": self.value_tokens >= 1,
            "documents_per_depth": self.documents_per_depth >= 0,
            "depths": len(set(self.depths)) == len(self.depths) and all(0 <= depth <= 100 for depth in self.depths),
        }
        for name, holds in valid.items():
            if not holds:
                raise ValueError(f"NeedleConfig.{name} = {getattr(self, name)!r} is out of range.")


@dataclass(frozen=True)
class NeedleDocument:
    """ids: all tokens, [L]. answer: True at those of a value that is asked for, [L]."""

    ids: np.ndarray
    answer: np.ndarray

    def weights(self, of_text: float, of_answer: float) -> np.ndarray:
        """One for each token: [L]."""
        return np.where(self.answer, of_answer, of_text).astype(np.float32)


class Needles:
    """Documents with needles, as long as the text that they are made from."""

    def __init__(self, config: NeedleConfig, tokenizer: Tokenizer, seed: int) -> None:
        self.config, self.seed = config, seed
        self._break, self._equals = (list(tokenizer.encode(text)) for text in ("\n", " ="))
        wanted = config.share > 0.0 or config.documents_per_depth > 0
        self._words = words_of(tokenizer) if wanted else np.empty(0, dtype=np.int32)

    def chosen(self, index: int) -> bool:
        """Whether the training sequence at `index` holds needles."""
        return self.config.share > 0.0 and self._dice(TRAINING, index).random() < self.config.share

    def training(self, text: np.ndarray, index: int) -> NeedleDocument:
        """A document of the training sequence at `index`, the needles at random depths."""
        dice = self._dice(TRAINING, index)
        dice.random()  # The draw that chose it.
        return self._document(text, dice.random(self.config.needles_per_document), dice)

    def measured(self, text: np.ndarray, index: int, depth: int) -> NeedleDocument:
        """A document to be measured; depth: in percent of the text in front of the question."""
        return self._document(text, np.array([depth / 100]), self._dice(MEASURED, index))

    def _document(self, text: np.ndarray, depths: np.ndarray, dice: np.random.Generator) -> NeedleDocument:
        """Raises: ValueError for a text too short to hold needles and questions."""
        lines = [self._line(dice) for _ in depths]
        taken = sum(2 * len(key) + 2 * len(value) + len(self._break) for key, value in lines)
        room = len(text) - taken
        if room < 0:
            raise ValueError(
                f"A text of {len(text)} tokens cannot hold {len(lines)} needles with their questions, which take "
                f"{taken}; raise sequence_length, or lower needle.needles_per_document and its lengths."
            )
        parts: list[tuple[Sequence[int] | np.ndarray, bool]] = []
        before = 0
        for depth, (key, value) in sorted(zip(depths.tolist(), lines, strict=True)):
            place = round(depth * room)
            parts += [(text[before:place], False), ([*key, *value, *self._break], False)]
            before = place
        parts.append((text[before:room], False))
        for number in dice.permutation(len(lines)):
            key, value = lines[number]
            parts += [(key, False), (value, True)]
        ids = np.concatenate([np.asarray(part, dtype=np.int32) for part, _ in parts])
        return NeedleDocument(ids, np.repeat([asked for _, asked in parts], [len(part) for part, _ in parts]))

    def _line(self, dice: np.random.Generator) -> tuple[list[int], list[int]]:
        """Tokens of a line up to its value, a line break in front, and of the value."""
        key = dice.choice(self._words, self.config.key_tokens)
        value = dice.choice(self._words, self.config.value_tokens)
        return [*self._break, *key.tolist(), *self._equals], value.tolist()

    def _dice(self, stream: Stream, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, stream, index))


def words_of(tokenizer: Tokenizer) -> np.ndarray:
    """The tokens that are a word: letters of the Latin alphabet, a space in front or none; ascending.

    Raises: ValueError for a tokenizer without two of them.
    """
    found = [index for index in range(tokenizer.vocab_size) if WORD.fullmatch(tokenizer.decode([index]))]
    if len(found) < 2:
        raise ValueError(f"The tokenizer has {len(found)} tokens that are words; needles need two at least.")
    return np.array(found, dtype=np.int32)
