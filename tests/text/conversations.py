"""Tokenizers, encodings and random conversations that the tests of formats share."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from hypothesis import strategies as st

from rorqual.records import Completion, Message, ToolCall, ToolSpec
from rorqual.text.arguments import write_json
from rorqual.text.encoding import Encoding, EncodingConfig
from rorqual.text.formats import FORMATS
from rorqual.text.tokenizer import Tokenizer, train_tokenizer

GOLDEN = Path(__file__).parent / "golden"


def _with_tool_tokens(tokenizer: Tokenizer) -> Tokenizer:
    backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())
    backend.add_special_tokens([mark for mark in FORMATS["deepseek_v3"].marks if "tool" in mark])
    return Tokenizer(backend)


TOKENIZER = _with_tool_tokens(train_tokenizer([(GOLDEN / "weather_output.txt").read_text()] * 3, 700))
"""Knows every control token of every format as one token."""

BARE = Tokenizer(
    tokenizers.Tokenizer.from_str(
        train_tokenizer(["the sum of 4 and 3"] * 9, 300)._backend.to_str().replace("｜DSML｜", "｜none｜")
    )
)
"""Has no token for `｜DSML｜`, so that the tags of calls are plain text."""


def encoding(form: str = "deepseek_v32", tokenizer: Tokenizer = TOKENIZER, **settings: Any) -> Encoding:
    """Of a thinking policy, where the format has a thinking mode."""
    thinking = {} if form == "deepseek_v3" else {"open_thinking": True}
    return Encoding(tokenizer, EncodingConfig(format=form, **thinking | settings))


V32 = encoding()
DIRECT = encoding(open_thinking=False)


def ids_of(text: str) -> array[int]:
    """`text` with every spelled control token as that token: what a policy may draw."""
    return TOKENIZER.encode(text, allow_special=True)


def drawn(ids: Sequence[int]) -> Completion:
    """A completion of these ids, with columns that fit."""
    count = len(ids)
    return Completion(
        request_id="r",
        token_ids=array("i", ids),
        logprobs=array("f", [-0.5] * count),
        entropies=array("f", [0.5] * count),
        kept_mass=array("f", [1.0] * count),
        finish_reason="stop",
        weight_version=1,
    )


def user(text: str) -> Message:
    return Message(role="user", content=text)


def result(call_id: str, text: str = "ok") -> Message:
    return Message(role="tool", content=text, tool_call_id=call_id)


def call(call_id: str, name: str = "find", **arguments: Any) -> ToolCall:
    return ToolCall(id=call_id, name=name, arguments=write_json(arguments))


SPELLED = ["<think>", "</think>", "｜DSML｜", "</｜DSML｜parameter>", "<｜User｜>", "<｜end▁of▁sentence｜>", "<answer>"]
SPELLED += ["\n\n<｜DSML｜function_calls>\n", '" string="true">', "</result>", "<｜tool▁calls▁begin｜>", "\n```"]
TEXTS = st.lists(st.text(max_size=6) | st.sampled_from([*SPELLED, "\n", " ", "é日"]), max_size=4).map("".join)
"""Short texts, many of which spell a tag or a control token."""

NAMES = st.text(st.characters(codec="utf-8", exclude_characters='"`\n'), min_size=1, max_size=6)
VALUES = st.recursive(
    TEXTS | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2),
    max_leaves=4,
)
CALLS = st.lists(
    st.builds(
        ToolCall,
        id=st.just(""),
        name=NAMES,
        arguments=st.dictionaries(NAMES, VALUES, max_size=3).map(write_json),
    ),
    max_size=3,
)
TOOLS = st.lists(
    st.builds(ToolSpec, name=NAMES, description=TEXTS, parameters=st.dictionaries(NAMES, VALUES, max_size=2)),
    max_size=2,
)


@st.composite
def turns(draw: st.DrawFn, with_calls: bool = True) -> list[Message]:
    """A conversation of one to three user turns, each of up to three messages of the policy, all calls answered."""
    messages = [Message(role="system", content=draw(TEXTS))] if draw(st.booleans()) else []
    number = 0
    for _ in range(draw(st.integers(1, 3))):
        messages.append(user(draw(TEXTS)))
        for _ in range(draw(st.integers(0, 2)) if with_calls else 0):
            calls = [
                ToolCall(id=f"c{number + index}", name=each.name, arguments=each.arguments)
                for index, each in enumerate(draw(CALLS.filter(bool)))
            ]
            number += len(calls)
            messages.append(
                Message(role="assistant", thinking=draw(TEXTS), content=draw(TEXTS), tool_calls=tuple(calls))
            )
            messages += [result(each.id, draw(TEXTS)) for each in draw(st.permutations(calls))]
        messages.append(Message(role="assistant", thinking=draw(TEXTS), content=draw(TEXTS)))
    return messages
