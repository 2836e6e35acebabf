"""A needle in real text: a line `KEY = VALUE` somewhere in a document whose end asks for the value again.

    ... text ...  |KEY_qzt = 4821|  ... text ...  KEY_qzt = 4821
                   at its depth                   the question, and behind it the answer

A model that attends to all its text finds it at any depth; what a selection of keys loses shows as a depth at which the
answer goes wrong. A small model learns the task only from such documents, so they can be mixed into what it trains on.
Everything follows from the seed and the document's number.

Shapes: L length of a document.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

import numpy as np

from rorqual.records import Record
from rorqual.text.tokenizer import Tokenizer

Stream = int
"""Which of the independent sequences of documents: training, or what is measured."""

TRAINING: Stream = 0
MEASURED: Stream = 1


class NeedleConfig(Record):
    """share: of the training sequences that hold a needle, at a random depth. answer_weight: of the answer's tokens in
    the loss of these, 1 for all others; a value is a few tokens among thousands. key_letters and value_digits: how long
    both are.

    documents_per_depth: how many are measured at each of `depths`, in percent of the text; 0 measures none.
    Raises: ValueError naming the field that is out of range.
    """

    share: float = 0.0
    answer_weight: float = 1.0
    key_letters: int = 3
    value_digits: int = 4
    documents_per_depth: int = 0
    depths: tuple[int, ...] = (0, 25, 50, 75, 100)

    def __post_init__(self) -> None:
        valid = {
            "share": 0.0 <= self.share <= 1.0,
            "answer_weight": self.answer_weight > 0.0,
            "key_letters": self.key_letters >= 1,
            "value_digits": self.value_digits >= 1,
            "documents_per_depth": self.documents_per_depth >= 0,
            "depths": len(set(self.depths)) == len(self.depths) and all(0 <= depth <= 100 for depth in self.depths),
        }
        for name, holds in valid.items():
            if not holds:
                raise ValueError(f"NeedleConfig.{name} = {getattr(self, name)!r} is out of range.")


@dataclass(frozen=True)
class NeedleDocument:
    """ids: all tokens, [L]. num_answer: so many of them, at the end, are the value that is asked for."""

    ids: np.ndarray
    num_answer: int

    def weights(self, of_text: float, of_answer: float) -> np.ndarray:
        """One for each token: [L]."""
        weights = np.full(len(self.ids), of_text, dtype=np.float32)
        weights[-self.num_answer :] = of_answer
        return weights


class Needles:
    """Documents with a needle, as long as the text that they are made from."""

    def __init__(self, config: NeedleConfig, tokenizer: Tokenizer, seed: int) -> None:
        self.config, self.tokenizer, self.seed = config, tokenizer, seed
        self._break, self._equals = (tokenizer.encode(text) for text in ("\n", " = "))

    def chosen(self, index: int) -> bool:
        """Whether the training sequence at `index` holds a needle."""
        return self.config.share > 0.0 and self._dice(TRAINING, index).random() < self.config.share

    def training(self, text: np.ndarray, index: int) -> NeedleDocument:
        """A document of the training sequence at `index`, the needle at a random depth."""
        dice = self._dice(TRAINING, index)
        dice.random()  # The draw that chose it.
        return self._document(text, float(dice.random()), dice)

    def measured(self, text: np.ndarray, index: int, depth: int) -> NeedleDocument:
        """A document to be measured; depth: in percent of the text in front of the question."""
        return self._document(text, depth / 100, self._dice(MEASURED, index))

    def _document(self, text: np.ndarray, depth: float, dice: np.random.Generator) -> NeedleDocument:
        """Raises: ValueError for a text too short to hold needle and question."""
        key = "KEY_" + "".join(dice.choice(list(string.ascii_lowercase), self.config.key_letters))
        value = self.tokenizer.encode("".join(dice.choice(list(string.digits), self.config.value_digits)))
        asked = np.array([*self._break, *self.tokenizer.encode(key), *self._equals, *value], dtype=np.int32)
        needle = np.concatenate((asked, np.array(self._break, dtype=np.int32)))
        room = len(text) - len(needle) - len(asked)
        if room < 0:
            raise ValueError(
                f"A text of {len(text)} tokens cannot hold a needle of {len(needle)} and a question of {len(asked)}; "
                "raise sequence_length, or lower needle.key_letters and needle.value_digits."
            )
        place = round(depth * room)
        ids = np.concatenate((text[:place], needle, text[place:room], asked)).astype(np.int32)
        return NeedleDocument(ids, len(value))

    def _dice(self, stream: Stream, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, stream, index))
