"""Published formats, byte for byte: DeepSeek's own golden conversation, and vectors for what it leaves out."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from rorqual.records import Message
from rorqual.text.formats import DEEPSEEK_V32, FORMATS, template_format
from rorqual.text.openai import message_from_openai, tool_from_openai
from tests.text.conversations import DIRECT, GOLDEN, TOKENIZER, V32, encoding

GIVEN = json.loads((GOLDEN / "weather_input.json").read_text())
EXPECTED = (GOLDEN / "weather_output.txt").read_text()
MESSAGES = [message_from_openai(message) for message in GIVEN["messages"]]
TOOLS = [tool_from_openai(tool) for tool in GIVEN["tools"]]
SECOND_USER = 8

V32_VECTORS = json.loads((GOLDEN / "deepseek_v32_vectors.json").read_text())
"""Texts by the rules of DeepSeek's reference encoder, made apart from this library; the golden conversation has none of
these cases. Where that encoder fails (two developer messages), by its rules without the step that fails."""

OLDER_VECTORS = json.loads((GOLDEN / "deepseek_v3_r1_vectors.json").read_text())
"""Texts by the chat templates of DeepSeek-V3 and R1, in cases that those render whole."""


def first_turn_as_it_was_said() -> str:
    """The golden text up to the second question, with the thinking that was in the context until then."""
    text = EXPECTED[: EXPECTED.index("<｜User｜>Thanks!")]
    before, *said = re.split(r"(?<=<｜Assistant｜>)</think>|(?<=\n\n)</think>", text)
    thoughts = [message.thinking for message in MESSAGES[:SECOND_USER] if message.role == "assistant"]
    return before + "".join(f"<think>{a}</think>{b}" for a, b in zip(thoughts, said, strict=True))


def test_the_golden_conversation() -> None:
    rendered = V32.render(MESSAGES, TOOLS)
    assert rendered.text == EXPECTED
    assert rendered.token_ids == TOKENIZER.encode(EXPECTED, allow_special=True)
    said = [index for index, flag in zip(rendered.token_ids, rendered.sampled, strict=True) if flag]
    last_turn = EXPECTED[EXPECTED.index("User is now asking") :]
    results = last_turn[last_turn.index("\n\n<function_results>") : last_turn.index("Got the weather data")]
    assert TOKENIZER.decode(said) == last_turn.replace(results, "")


def test_every_prefix_of_the_golden_conversation() -> None:
    """After each message; until the second question is asked, the thinking of the first turn is there."""
    earlier, previous = first_turn_as_it_was_said(), ""
    for end in range(1, len(MESSAGES) + 1):
        rendered = V32.render(MESSAGES[:end], TOOLS)
        whole = earlier if end <= SECOND_USER else EXPECTED
        assert whole.startswith(rendered.text)
        assert rendered.token_ids == TOKENIZER.encode(rendered.text, allow_special=True)
        assert end - 1 == SECOND_USER or (rendered.text.startswith(previous) and len(rendered.text) > len(previous))
        endings = {"assistant": "<｜end▁of▁sentence｜>", "user": "<｜Assistant｜><think>", "system": "</functions>\n"}
        some_missing = end in (6, 11)
        results = "</result>" if some_missing else "</function_results>\n\n<think>"
        ending = endings.get(MESSAGES[end - 1].role, results)
        assert rendered.text.endswith(ending)
        previous = rendered.text
    assert V32.render(MESSAGES[:SECOND_USER], TOOLS).text == earlier
    assert previous == EXPECTED


@pytest.mark.parametrize("vector", V32_VECTORS, ids=lambda vector: f"{vector['name']}, {vector['mode']}")
def test_vectors_of_v32(vector: dict[str, Any]) -> None:
    messages = [message_from_openai(message) for message in vector["messages"]]
    tools = [tool_from_openai(tool) for tool in vector["tools"]]
    chosen = V32 if vector["mode"] == "thinking" else DIRECT
    rendered = chosen.render(messages, tools, vector["response_format"])
    assert rendered.text == vector["text"]
    assert rendered.token_ids == TOKENIZER.encode(vector["text"], allow_special=True)


@pytest.mark.parametrize("vector", OLDER_VECTORS, ids=lambda vector: f"{vector['name']}, {vector['format']}")
def test_vectors_of_v3_and_r1(vector: dict[str, Any]) -> None:
    rendered = encoding(vector["format"]).render([message_from_openai(message) for message in vector["messages"]])
    assert rendered.text == vector["text"]
    assert rendered.token_ids == TOKENIZER.encode(vector["text"], allow_special=True)


def test_r1_keeps_its_thinking_within_a_turn() -> None:
    messages = [Message(role="user", content="a"), Message(role="assistant", thinking="r\n", content="x")]
    text = encoding("deepseek_r1").render(messages).text
    assert text.endswith("<｜Assistant｜><think>\nr\n</think>x<｜end▁of▁sentence｜>")
    written = encoding("deepseek_r1", open_thinking=False).render(messages).text
    assert written.endswith("<｜Assistant｜><think>r\n</think>x<｜end▁of▁sentence｜>")


def test_formats_are_data() -> None:
    assert {name: form.name for name, form in FORMATS.items()} == {name: name for name in FORMATS}
    assert DEEPSEEK_V32.tools_section in EXPECTED.replace(
        EXPECTED[EXPECTED.index('{"name": "get_datetime"') : EXPECTED.index("\n</functions>")], "{tools}"
    )
    with pytest.raises(ValueError, match="once"):
        template_format("{question} and {question}", begins_with_bos=True)


def test_what_a_format_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="names 'v32'; there are chat, deepseek_r1"):
        encoding("v32")
    with pytest.raises(ValueError, match="no thinking mode"):
        encoding("deepseek_v3", open_thinking=True)
    question = Message(role="user", content="hi")
    with pytest.raises(ValueError, match="no tools"):
        encoding("deepseek_r1").prompt([question], TOOLS)
    with pytest.raises(ValueError, match="no response format"):
        encoding("chat").prompt([question], (), {"type": "object"})
    with pytest.raises(ValueError, match="no developer messages"):
        encoding("chat").prompt([Message(role="developer", content="hi")])
    with pytest.raises(ValueError, match="is empty"):
        V32.prompt([Message(role="developer")])
    with pytest.raises(ValueError, match="no tool calls"):
        encoding("chat").render([question, MESSAGES[2]])
