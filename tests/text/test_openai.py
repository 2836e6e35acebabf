"""The OpenAI chat format comes in whole or is refused, and goes out as it came in."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given

from rorqual.records import Message, ToolCall, ToolSpec
from rorqual.text.openai import message_from_openai, message_to_openai, tool_from_openai
from tests.text.conversations import turns

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


@given(turns())
def test_messages_come_back(messages: list[Message]) -> None:
    assert [message_from_openai(message_to_openai(message)) for message in messages] == messages


@pytest.mark.parametrize(
    ("given_message", "expected"),
    [
        ({"role": "user", "content": "a"}, Message(role="user", content="a")),
        ({"role": "assistant", "content": None}, Message(role="assistant")),
        ({"role": "assistant", "reasoning": "r", "reasoning_content": ""}, Message(role="assistant", thinking="r")),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            Message(role="user", content="ab"),
        ),
        (
            {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": {"a": 1}}}]},
            Message(role="assistant", tool_calls=(ToolCall(id="c", name="f", arguments='{"a": 1}'),)),
        ),
        ({"role": "tool", "tool_call_id": "c", "content": "x"}, Message(role="tool", content="x", tool_call_id="c")),
    ],
)
def test_messages(given_message: dict[str, Any], expected: Message) -> None:
    assert message_from_openai(given_message) == expected


@pytest.mark.parametrize(
    ("given_message", "words"),
    [
        ({"content": "a"}, "role None"),
        ({"role": "robot"}, "role 'robot'"),
        ({"role": "assistant", "reasoning": 3}, "reasoning"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "not text"),
        ({"role": "user", "content": 3}, "not text"),
        ({"role": "assistant", "tool_calls": [{"id": "c"}]}, "needs an id"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}, "needs an id"),
    ],
)
def test_what_is_no_message(given_message: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        message_from_openai(given_message)


def test_tools() -> None:
    function = {"name": "f", "description": "F.", "parameters": {"type": "object"}, "strict": True}
    tool = tool_from_openai({"type": "function", "function": function})
    assert tool == ToolSpec(name="f", description="F.", parameters={"type": "object"})
    assert tool_from_openai({"function": {"name": "f"}}) == ToolSpec(name="f", description="", parameters={})
    for wrong, words in [
        ({"type": "web_search"}, "not a function"),
        ({"function": {"description": "x"}}, "no name"),
        ({"function": {"name": "f", "returns": {}}}, "returns"),
        ({"function": {"name": "f", "parameters": [1]}}, "JSON schema"),
    ]:
        with pytest.raises(ValueError, match=words):
            tool_from_openai(wrong)
