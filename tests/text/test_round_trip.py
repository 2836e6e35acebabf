"""Encode, parse, encode: for random conversations that spell every tag there is, nothing is lost and no id changes."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.records import Message, ToolSpec
from rorqual.text.arguments import read_object, write_json
from rorqual.text.encoding import Encoding
from tests.text.conversations import DIRECT, TOKENIZER, TOOLS, V32, encoding, turns

KEEPING = encoding(retention="all")
R1 = encoding("deepseek_r1")
V3 = encoding("deepseek_v3")


def check(chosen: Encoding, messages: list[Message], tools: list[ToolSpec]) -> None:
    """Each message of the policy comes back from the ids that it is rendered as, behind the prompt before it."""
    parsed: list[Message] = []
    for index, message in enumerate(messages):
        if message.role == "assistant":
            prompt = chosen.prompt(messages[:index], tools)
            rendered = chosen.render(messages[: index + 1], tools)
            assert rendered.token_ids[: len(prompt)] == prompt
            said = rendered.token_ids[len(prompt) :]
            reading = chosen.parse(said, after_results=messages[index - 1].role == "tool")
            kinds = {problem.kind for problem in reading.problems}
            assert not kinds, reading.problems
            parsed.append(with_ids_of(message, reading.message))
        else:
            parsed.append(message)
    expected = messages if chosen is not DIRECT and chosen is not V3 else [without_thinking(each) for each in messages]
    assert parsed == expected
    assert chosen.render(parsed, tools) == chosen.render(expected, tools)


def with_ids_of(original: Message, parsed: Message) -> Message:
    """Formats have no ids of calls; the parser numbers them."""
    assert [call.id for call in parsed.tool_calls] == [f"call_{index}" for index in range(len(parsed.tool_calls))]
    calls = [
        msgspec.structs.replace(call, id=first.id)
        for call, first in zip(parsed.tool_calls, original.tool_calls, strict=True)
    ]
    return msgspec.structs.replace(parsed, tool_calls=tuple(calls))


def without_thinking(message: Message) -> Message:
    return msgspec.structs.replace(message, thinking="")


@settings(max_examples=400, deadline=None)
@given(turns(), TOOLS)
def test_v32(messages: list[Message], tools: list[ToolSpec]) -> None:
    check(V32, messages, tools)


@settings(max_examples=100, deadline=None)
@given(turns(), TOOLS)
@pytest.mark.parametrize("chosen", [DIRECT, KEEPING], ids=["without thinking", "keeping all thinking"])
def test_modes_of_v32(chosen: Encoding, messages: list[Message], tools: list[ToolSpec]) -> None:
    check(chosen, [without_thinking(each) for each in messages] if chosen is DIRECT else messages, tools)


@settings(max_examples=100, deadline=None)
@given(turns())
@pytest.mark.parametrize("chosen", [R1, V3], ids=["deepseek_r1", "deepseek_v3"])
def test_older_formats(chosen: Encoding, messages: list[Message]) -> None:
    check(chosen, [without_thinking(each) for each in messages] if chosen is V3 else messages, [])


@pytest.mark.slow
@settings(max_examples=4000, deadline=None)
@given(turns(), TOOLS, st.sampled_from([V32, DIRECT, KEEPING]))
def test_many(messages: list[Message], tools: list[ToolSpec], chosen: Encoding) -> None:
    check(chosen, [without_thinking(each) for each in messages] if chosen is DIRECT else messages, tools)


@settings(max_examples=120, deadline=None)
@given(turns(), TOOLS)
def test_only_the_format_writes_control_tokens(messages: list[Message], tools: list[ToolSpec]) -> None:
    """Whatever users, tools and the policy spell: control tokens are those of the conversation without text."""
    assert controls_of(messages, tools) == controls_of(*silenced(messages, tools))


def controls_of(messages: list[Message], tools: list[ToolSpec]) -> list[int]:
    return [index for index in V32.render(messages, tools).token_ids if index in TOKENIZER.control_tokens]


def silenced(messages: list[Message], tools: list[ToolSpec]) -> tuple[list[Message], list[ToolSpec]]:
    """The same conversation in which texts are empty; arguments keep their number and kind."""
    empty = []
    for message in messages:
        calls = []
        for call in message.tool_calls:
            arguments = dict.fromkeys(map(str, range(len(read_object(call.arguments)))), 0)
            calls.append(msgspec.structs.replace(call, name="", arguments=write_json(arguments)))
        empty.append(msgspec.structs.replace(message, content="", thinking="", tool_calls=tuple(calls)))
    return empty, [ToolSpec(name="", description="", parameters={}) for _ in tools]
