"""Text <-> token ids, on the `tokenizers` library: load any `tokenizer.json`, or train a small byte-level BPE.

Text that a user wrote can never turn into control tokens: `encode` reads `<｜User｜>` or `<think>` in a text as
plain characters unless it is told otherwise.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS: dict[str, str] = {
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "pad": "<｜▁pad▁｜>",
    "user": "<｜User｜>",
    "assistant": "<｜Assistant｜>",
    "think_open": "<think>",
    "think_close": "</think>",
    "dsml": "｜DSML｜",
    "answer_open": "<answer>",
    "answer_close": "</answer>",
}
"""Name -> text, in the order of their ids in a tokenizer that is trained here (bos 0, eos 1, pad 2, as in DeepSeek-V3).

All but the answer tags are the control tokens of DeepSeek-V3.2; the answer tags are the R1-Zero template's.
"""

_KEPT_IN_TEXT = frozenset({"think_open", "think_close", "dsml", "answer_open", "answer_close"})
"""Tokens that are part of what is said: `decode(skip_special=True)` keeps them, as DeepSeek's tokenizer does."""

_CONFIG_KEYS = {"bos": "bos_token", "eos": "eos_token", "pad": "pad_token"}


class Tokenizer:
    """A tokenizer with named special tokens.

    special_tokens: name -> text, of those names in `SPECIAL_TOKENS` that this vocabulary has; a
    `tokenizer_config.json` beside the `tokenizer.json` decides what bos, eos and pad are.
    control_tokens: id -> text of every token that plain text never becomes, those special tokens among them.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str] | None = None) -> None:
        """Raises: ValueError when a named special token is not in the vocabulary."""
        self._backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        known = {name: text for name, text in SPECIAL_TOKENS.items() if text in vocabulary}
        self.special_tokens: dict[str, str] = known | dict(special_tokens or {})
        missing = {name: text for name, text in self.special_tokens.items() if text not in vocabulary}
        if missing:
            raise ValueError(f"Special tokens {missing} are not in the vocabulary. Name tokens that it holds.")
        self._special_names = {name: int(vocabulary[text]) for name, text in self.special_tokens.items()}
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        self._control = {token.content: index for index, token in backend.get_added_tokens_decoder().items()}
        self.control_tokens: dict[int, str] = {index: text for text, index in self._control.items()}
        self._plain = _without_added_tokens(backend)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json`, or the one in a directory. Raises: ValueError naming the file and what to do."""
        file = Path(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise ValueError(
                f"There is no tokenizer at {file}. Give a tokenizer.json or a directory that holds one; a checkpoint "
                "downloaded from Hugging Face has it beside its weights."
            )
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception for bad content
            raise ValueError(
                f"{file} is not a readable tokenizer.json ({type(error).__name__}: {error}). Download or save it again."
            ) from error
        return cls(backend, _configured_special_tokens(file.with_name("tokenizer_config.json")))

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `transformers` loads too.

        Each file is whole or absent, and `tokenizer.json` comes last: where it lies, the tokenizer is complete.
        """
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= {key: self.special_tokens[name] for name, key in _CONFIG_KEYS.items() if name in self.special_tokens}
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        _write_whole(folder / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2) + "\n")
        _write_whole(folder / "tokenizer.json", self._backend.to_str(pretty=True))

    def to_json(self) -> str:
        """The text of its `tokenizer.json`, for other libraries that read one."""
        return str(self._backend.to_str())

    def encode(self, text: str, allow_special: bool = False) -> array[int]:
        """Token ids of `text`, nothing added. `allow_special` turns the text of a special token into its id.

        Raises: ValueError for a lone surrogate, which no byte sequence stands for.
        """
        if allow_special:
            return self._encode_with(self._backend, text)
        ids = self._encode_with(self._plain, text)
        return ids if self._special_ids.isdisjoint(ids) else self._encode_apart(text)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. `skip_special` drops the control tokens."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def special_id(self, name: str) -> int:
        """Id of the special token called `name`. Raises: ValueError naming those that this tokenizer has."""
        if name not in self.special_tokens:
            have = ", ".join(sorted(self.special_tokens)) or "none"
            raise ValueError(f"This tokenizer has no special token {name!r}; it has: {have}.")
        return self._special_names[name]

    def split_special(self, text: str, only: Collection[str] | None = None) -> list[str | int]:
        """`text` cut at its special tokens (those in `only`, if given): each of them as its id, the rest as text."""
        wanted = [token for token in self._control if only is None or token in only]
        if not wanted:
            return [text] if text else []
        longest_first = sorted(wanted, key=len, reverse=True)
        parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
        return [self._control[part] if part in wanted else part for part in parts if part]

    @property
    def _special_ids(self) -> set[int]:
        return set(self._control.values())

    def _encode_with(self, backend: tokenizers.Tokenizer, text: str) -> array[int]:
        try:
            return array("i", backend.encode(text, add_special_tokens=False).ids)
        except (UnicodeEncodeError, TypeError) as error:
            raise ValueError(f"The text holds a lone surrogate, so it is not Unicode text: {error}.") from error

    def _encode_apart(self, text: str) -> array[int]:
        """For models that can spell a special token themselves (Unigram): break each after its first character."""
        ids = array("i")
        for part in re.split("|".join(f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in self._control), text):
            ids.extend(self._encode_with(self._plain, part))
        return ids


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, min_frequency: int = 2, split_words: bool = True
) -> Tokenizer:
    """Train a byte-level BPE: special tokens first, then the 256 bytes, then merges. Every digit is its own token.

    Single digits keep place values aligned, which small models need for arithmetic. Special tokens in `texts` are cut
    out, so that no merge is spent on them. Training is deterministic.
    split_words: whether a token may not reach over a space. Without, the fixed phrases of a narrow corpus become single
    tokens, and its documents several times shorter (as in SuperBPE, arXiv 2503.13423).
    Raises: ValueError when `vocab_size` has no room for the special tokens and the bytes.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise ValueError(f"vocab_size = {vocab_size} is too small: special tokens and bytes alone need {smallest}.")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    marks = re.compile("|".join(map(re.escape, SPECIAL_TOKENS.values())))
    backend.train_from_iterator((part for text in texts for part in marks.split(text) if part), trainer)
    return Tokenizer(_with_spoken_tokens(backend))


def _write_whole(file: Path, text: str) -> None:
    """Write beside the place, flush to the disk, then rename into it: a killed process leaves no half file."""
    temporary = file.with_name(f".tmp-{file.name}")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def _with_spoken_tokens(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer, in which skipping special tokens spares `_KEPT_IN_TEXT`; a trainer marks them all."""
    state = json.loads(backend.to_str())
    spoken = {SPECIAL_TOKENS[name] for name in _KEPT_IN_TEXT}
    for token in state["added_tokens"]:
        token["special"] = token["content"] not in spoken
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def _without_added_tokens(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer, blind to special tokens."""
    state = json.loads(backend.to_str())
    state["added_tokens"] = []
    state["post_processor"] = None
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def _configured_special_tokens(file: Path) -> dict[str, str]:
    """bos, eos and pad as `tokenizer_config.json` names them. Raises: ValueError for a file that is not JSON."""
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}). Download or save it again.") from error
    found = {name: config.get(key) for name, key in _CONFIG_KEYS.items()}
    texts = {name: value["content"] if isinstance(value, dict) else value for name, value in found.items()}
    return {name: text for name, text in texts.items() if text}
