"""Needles: real text around one line and its question, everything decided by seed and number."""

from __future__ import annotations

import re

import numpy as np
import pytest

from rorqual.text.needle import NeedleConfig, NeedleDocument, Needles, words_of
from rorqual.text.tokenizer import Tokenizer, train_tokenizer

LINES = "\n".join(f"value_{number} = {number * 7} + {number % 5}" for number in range(400))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([LINES], 400)


@pytest.fixture(scope="module")
def text(tokenizer: Tokenizer) -> np.ndarray:
    return np.array(tokenizer.encode(LINES)[:600], dtype=np.int32)


def line_of(document: NeedleDocument, num_key: int, tokenizer: Tokenizer) -> list[int]:
    """The tokens of the last question and its answer, from the line break on."""
    head = len(tokenizer.encode("\n")) + num_key + len(tokenizer.encode(" ="))
    return document.ids[np.flatnonzero(document.answer)[0] - head :].tolist()


@pytest.mark.parametrize("depth", (0, 25, 50, 100))
def test_a_document_is_its_text_with_the_line_at_its_depth_and_the_question_at_the_end(
    tokenizer: Tokenizer, text: np.ndarray, depth: int
) -> None:
    needles = Needles(NeedleConfig(key_tokens=3, value_tokens=4, documents_per_depth=1), tokenizer, seed=1)
    document = needles.measured(text, 3, depth)
    assert len(document.ids) == len(text) and document.ids.dtype == np.int32
    assert np.flatnonzero(document.answer).tolist() == list(range(len(text) - 4, len(text)))
    line = line_of(document, 3, tokenizer)
    assert re.fullmatch(r"\n( ?[A-Za-z]+){3} =( ?[A-Za-z]+){4}", tokenizer.decode(line))
    needle = np.array([*line, *tokenizer.encode("\n")])
    place = next(i for i in range(len(text)) if np.array_equal(document.ids[i : i + len(needle)], needle))
    room = len(text) - len(needle) - len(line)
    assert place == round(room * depth / 100)
    rest = np.concatenate((document.ids[:place], document.ids[place + len(needle) :]))
    assert np.array_equal(rest[:room], text[:room])


def test_words_are_single_tokens_of_letters(tokenizer: Tokenizer) -> None:
    words = [tokenizer.decode([index]) for index in words_of(tokenizer)]
    assert {"a", "Z", "value"} <= set(words) and all(word.strip().isalpha() for word in words)
    assert not {"1", " =", "\n"} & set(words)


def test_the_seed_and_the_number_decide_everything(tokenizer: Tokenizer, text: np.ndarray) -> None:
    config = NeedleConfig(share=0.3)
    one, same, other = (Needles(config, tokenizer, seed) for seed in (5, 5, 6))
    chosen = [index for index in range(2000) if one.chosen(index)]
    assert chosen == [index for index in range(2000) if same.chosen(index)]
    assert chosen != [index for index in range(2000) if other.chosen(index)]
    assert len(chosen) / 2000 == pytest.approx(0.3, abs=0.03)
    first = one.training(text, 7).ids
    assert np.array_equal(first, same.training(text, 7).ids)
    for unlike in (one.training(text, 8), other.training(text, 7), one.measured(text, 7, 50)):
        assert not np.array_equal(first, unlike.ids)


def test_training_needles_lie_at_every_depth(tokenizer: Tokenizer, text: np.ndarray) -> None:
    needles = Needles(NeedleConfig(share=1.0), tokenizer, seed=0)
    starts = [int(np.argmax(needles.training(text, index).ids != text)) / len(text) for index in range(200)]
    histogram, _ = np.histogram(starts, bins=4, range=(0.0, 1.0))
    assert histogram.min() > 25


def test_many_needles_are_all_asked_for_in_another_order(tokenizer: Tokenizer, text: np.ndarray) -> None:
    config = NeedleConfig(share=1.0, needles_per_document=8)
    document = Needles(config, tokenizer, seed=0).training(text, 0)
    assert len(document.ids) == len(text)
    answers = np.flatnonzero(document.answer).reshape(8, 3)
    head = len(tokenizer.encode("\n")) + 2 + len(tokenizer.encode(" ="))
    starts = (answers[:, 0] - head).tolist()
    assert starts == list(range(starts[0], len(text), head + 3)), "one question behind the other, up to the end"
    lines = [document.ids[start : start + head + 3].tolist() for start in starts]
    ids = document.ids.tolist()
    places = [next(i for i in range(len(ids)) if ids[i : i + len(line)] == line) for line in lines]
    assert max(places) < starts[0] and places != sorted(places)
    assert max(places) - min(places) > len(ids) / 3, "they lie apart"


def test_weights_are_of_the_answer_alone_or_of_it_more(tokenizer: Tokenizer, text: np.ndarray) -> None:
    document = Needles(NeedleConfig(value_tokens=4, documents_per_depth=1), tokenizer, seed=0).measured(text, 0, 10)
    alone = document.weights(of_text=0.0, of_answer=1.0)
    assert np.flatnonzero(alone).tolist() == list(range(len(text) - 4, len(text)))
    assert set(document.weights(1.0, 20.0)[:-4]) == {1.0} and set(document.weights(1.0, 20.0)[-4:]) == {20.0}


def test_a_text_too_short_is_refused(tokenizer: Tokenizer, text: np.ndarray) -> None:
    with pytest.raises(ValueError, match="A text of 12 tokens cannot hold 1 needles"):
        Needles(NeedleConfig(documents_per_depth=1), tokenizer, 0).measured(text[:12], 0, 50)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("share", 1.5),
        ("needles_per_document", 0),
        ("answer_weight", 0.0),
        ("key_tokens", 0),
        ("value_tokens", 0),
        ("documents_per_depth", -1),
        ("depths", (0, 101)),
        ("depths", (5, 5)),
    ],
)
def test_settings_out_of_range(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"NeedleConfig.{field} = .* is out of range"):
        NeedleConfig(**{field: value})  # type: ignore[arg-type]


def test_no_share_draws_nothing(tokenizer: Tokenizer) -> None:
    needles = Needles(NeedleConfig(), tokenizer, 0)
    assert not any(needles.chosen(index) for index in range(100))
