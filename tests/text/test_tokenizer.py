"""The tokenizer: every text survives, user text stays text, and transformers reads the same ids from what is saved."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models

from rorqual.text.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer

CORPUS = ["the sum of 12 and 345 is 357, so the answer is 357"] * 20 + ["wait, let me check the sum again"] * 20
TOKENIZER = train_tokenizer(CORPUS, vocab_size=320)
PHRASES = train_tokenizer(CORPUS, vocab_size=320, split_words=False)


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.decode(TOKENIZER.encode(text, allow_special=True)) == text


@given(st.lists(st.one_of(st.text(max_size=5), st.sampled_from(list(SPECIAL_TOKENS.values())))))
def test_text_of_special_tokens_stays_text_unless_allowed(pieces: list[str]) -> None:
    text = "".join(pieces)
    special_ids = set(range(len(SPECIAL_TOKENS)))
    assert special_ids.isdisjoint(TOKENIZER.encode(text))
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    named = {piece for piece in pieces if piece in SPECIAL_TOKENS.values()}
    assert {TOKENIZER.decode([index]) for index in special_ids.intersection(TOKENIZER.encode(text, True))} >= named


def test_special_tokens_come_first_in_their_order() -> None:
    assert [TOKENIZER.special_id(name) for name in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert TOKENIZER.special_tokens == SPECIAL_TOKENS
    with pytest.raises(ValueError, match=r"no special token 'tool'; it has: answer_close"):
        TOKENIZER.special_id("tool")


def test_every_digit_is_one_token() -> None:
    assert [TOKENIZER.decode([index]) for index in TOKENIZER.encode("3457")] == ["3", "4", "5", "7"]
    assert len(TOKENIZER.encode("the sum")) < len("the sum") / 2


def test_phrases_become_tokens_when_words_are_not_split() -> None:
    texts = [f"State the answer to this problem: {n} + {n + 1} =<think>{n}</think>" for n in range(99)]
    phrases = train_tokenizer(texts, vocab_size=360, split_words=False)
    pieces = [phrases.decode([index]) for index in phrases.encode("State the answer to this problem: 12 + 13 =")]
    assert pieces == ["State the answer to this problem: ", "1", "2", " + ", "1", "3", " ="]
    assert len(train_tokenizer(texts, vocab_size=360).encode("State the answer to this problem: 1 + 2 =")) > 9
    assert not any("think" in phrases.decode([index]) for index in range(len(SPECIAL_TOKENS), phrases.vocab_size))


@given(st.text())
def test_any_text_comes_back_from_phrases(text: str) -> None:
    assert PHRASES.decode(PHRASES.encode(text)) == text


def test_skipping_drops_control_tokens_and_keeps_what_was_said() -> None:
    text = "<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜><think>a</think><answer>b</answer><｜end▁of▁sentence｜>"
    ids = TOKENIZER.encode(text, allow_special=True)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode(ids, skip_special=True) == "hi<think>a</think><answer>b</answer>"


def test_bytes_that_are_no_text_decode_to_the_replacement_character() -> None:
    first_byte = TOKENIZER.encode("é")[:1]
    assert TOKENIZER.decode(first_byte) == "\ufffd"


def test_training_is_deterministic_and_bounded(tmp_path: Path) -> None:
    train_tokenizer(iter(CORPUS), vocab_size=320).save(tmp_path / "again")
    TOKENIZER.save(tmp_path / "first")
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (tmp_path / "first/tokenizer.json").read_bytes()
    assert TOKENIZER.vocab_size <= 320
    with pytest.raises(ValueError, match="266"):
        train_tokenizer(CORPUS, vocab_size=265)


@pytest.mark.parametrize("name", ["tokenizer.json", ""])
def test_saved_loads_from_its_file_and_from_its_directory(tmp_path: Path, name: str) -> None:
    TOKENIZER.save(tmp_path)
    loaded = Tokenizer.load(tmp_path / name)
    text = "<think>check 12</think> é"
    assert loaded.encode(text, allow_special=True) == TOKENIZER.encode(text, allow_special=True)
    assert (loaded.vocab_size, loaded.special_tokens) == (TOKENIZER.vocab_size, TOKENIZER.special_tokens)


def test_transformers_reads_the_same_ids(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    TOKENIZER.save(tmp_path)
    from_file = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    from_directory = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "<｜User｜>what is 12 + 345?<｜Assistant｜><think>wait, 日本 \n\n</think> 357<｜end▁of▁sentence｜>"
    ids = TOKENIZER.encode(text, allow_special=True).tolist()
    for theirs in (from_file, from_directory):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids) == text
        assert len(theirs) == TOKENIZER.vocab_size
    assert (from_directory.bos_token_id, from_directory.eos_token_id, from_directory.pad_token_id) == (0, 1, 2)


def test_a_tokenizer_config_names_eos(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    config = {"bos_token": None, "eos_token": {"content": "<｜User｜>"}, "pad_token": "<｜end▁of▁sentence｜>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.special_id("eos"), loaded.special_id("pad"), loaded.special_id("bos")) == (3, 1, 0)


def test_a_foreign_tokenizer_loads_and_its_own_special_tokens_stay_text(tmp_path: Path) -> None:
    backend = Backend(models.Unigram([("</s>", 0.0), ("a", -1.0), ("<", -2.0), ("/", -2.0), ("s", -2.0), (">", -2.0)]))
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode("a</s>a", allow_special=True).tolist() == [1, 0, 1]
    assert loaded.encode("a</s>a").tolist() == [1, 2, 3, 4, 5, 1]
    assert loaded.special_tokens == {}


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_a_missing_or_corrupt_file_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json.*(Give|again)"):
        Tokenizer.load(tmp_path)


def test_a_config_that_contradicts_the_vocabulary_is_refused(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
    with pytest.raises(ValueError, match="<stop>"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        Tokenizer.load(tmp_path)


def test_a_lone_surrogate_is_refused() -> None:
    for allow_special in (False, True):
        with pytest.raises(ValueError, match="surrogate"):
            TOKENIZER.encode("a\ud800", allow_special=allow_special)


def test_split_special_cuts_only_where_it_is_told() -> None:
    text = "a<think>b<｜User｜>"
    assert TOKENIZER.split_special(text) == ["a", 5, "b", 3]
    assert TOKENIZER.split_special(text, ["<think>"]) == ["a", 5, "b<｜User｜>"]
    assert TOKENIZER.split_special("") == []


@pytest.mark.parametrize("call", range(6))
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_kill_while_saving_leaves_a_whole_tokenizer_or_none(tmp_path: Path, monkeypatch, function, call) -> None:
    """Whatever call the kill falls on: where tokenizer.json lies, both files are there and say what was saved."""
    real, calls = getattr(os, function), []

    def killed(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(os, function, killed)
    try:
        TOKENIZER.save(tmp_path)
        assert len(calls) == {"fsync": 4, "replace": 2}[function]
    except KeyboardInterrupt:
        pass
    if (tmp_path / "tokenizer.json").exists():
        assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == SPECIAL_TOKENS["eos"]
        assert Tokenizer.load(tmp_path).encode("the sum of 12") == TOKENIZER.encode("the sum of 12")
    assert {path.name for path in tmp_path.iterdir()} <= {"tokenizer.json", "tokenizer_config.json"}
    monkeypatch.undo()
    TOKENIZER.save(tmp_path)
    assert Tokenizer.load(tmp_path).special_tokens == SPECIAL_TOKENS
