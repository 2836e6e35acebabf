"""The encoding: exact layout, append-only turns, and parsing that undoes rendering and never fails."""

from __future__ import annotations

from array import array

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.records import Message, ToolSpec
from rorqual.text.encoding import Encoding, EncodingConfig
from rorqual.text.formats import CONVERSATION_TEMPLATE
from rorqual.text.response import join_thinking, parse_response
from rorqual.text.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer

TOKENIZER = train_tokenizer(["what is 4 + 3? the sum of 4 and 3 is 7"] * 9, 300)
PLAIN = Encoding(TOKENIZER)
OPEN = Encoding(TOKENIZER, EncodingConfig(open_thinking=True))
USER = Message(role="user", content="4 + 3 =")
TEXTS = st.text(max_size=30)


def spelled(ids: array[int]) -> str:
    return TOKENIZER.decode(ids)


def test_layout_of_a_prompt() -> None:
    system = Message(role="system", content="Be brief.")
    expected = "<｜begin▁of▁sentence｜>Be brief.<｜User｜>4 + 3 =<｜Assistant｜>"
    assert spelled(PLAIN.prompt([system, USER])) == expected
    assert PLAIN.prompt([system, USER]) == TOKENIZER.encode(expected, allow_special=True)
    assert OPEN.prompt([system, USER]) == TOKENIZER.encode(expected + "<think>", allow_special=True)


def test_tags_in_what_a_user_says_are_text() -> None:
    ids = PLAIN.prompt([Message(role="user", content="<｜Assistant｜><think>")])
    assert [index for index in ids if index < len(SPECIAL_TOKENS)] == [0, 3, 4]


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4), st.booleans())
def test_turns_only_ever_append_and_equal_the_whole_conversation(turns: list[tuple[str, str]], opened: bool) -> None:
    encoding = OPEN if opened else PLAIN
    end = TOKENIZER.special_id("eos")
    messages: list[Message] = []
    ids = array("i")
    for question, answer in turns:
        user = Message(role="user", content=question)
        ids += encoding.follow_up([user], ids[-1]) if messages else encoding.prompt([user])
        said = "</think>" * opened + answer
        ids += array("i", [TOKENIZER.special_id("think_close")] * opened) + TOKENIZER.encode(answer) + array("i", [end])
        messages += [user, Message(role="assistant", content=said.removeprefix("</think>"))]
    whole = encoding.render(messages)
    assert ids == whole.token_ids
    assert sum(whole.sampled) == sum(len(TOKENIZER.encode(answer)) + 1 + opened for _, answer in turns)


def test_a_follow_up_closes_a_turn_that_ended_otherwise() -> None:
    closed = PLAIN.follow_up([USER], TOKENIZER.special_id("eos"))
    assert spelled(closed) == "<｜User｜>4 + 3 =<｜Assistant｜>"
    assert PLAIN.follow_up([USER], TOKENIZER.special_id("answer_close")) == array("i", [1]) + closed


@pytest.mark.parametrize("encoding", [PLAIN, OPEN])
@given(thinking=TEXTS.filter(bool), content=TEXTS)
def test_parsing_undoes_rendering(encoding: Encoding, thinking: str, content: str) -> None:
    message = Message(role="assistant", thinking=thinking, content=content)
    rendered = encoding.render([USER, message])
    ids, sampled = rendered.token_ids, rendered.sampled
    start = sampled.index(1)
    assert ids[:start] == encoding.prompt([USER])
    assert encoding.parse(ids[start:]).message == message


@pytest.mark.parametrize("encoding", [PLAIN, OPEN])
@given(ids=st.lists(st.integers(0, TOKENIZER.vocab_size - 1)))
def test_parsing_never_fails_and_loses_nothing(encoding: Encoding, ids: list[int]) -> None:
    message = encoding.parse(ids).message
    text = ("<think>" if encoding is OPEN else "") + TOKENIZER.decode(ids[:-1] if ids and ids[-1] == 1 else ids)
    assert join_thinking(message) == (text.lstrip() if message.thinking else text)


@pytest.mark.parametrize("text", ["4+3=7", "<think>4+3=7", "a</think>b</think>", "x<think>a</think>", ""])
def test_malformed_thinking_is_content(text: str) -> None:
    message = PLAIN.parse(TOKENIZER.encode(text, allow_special=True)).message
    assert message == Message(role="assistant", content=text)


def test_with_opened_thinking_the_reward_sees_a_well_formed_response() -> None:
    ids = TOKENIZER.encode("4+3=7</think> <answer>7</answer><｜end▁of▁sentence｜>", allow_special=True)
    assert parse_response(join_thinking(OPEN.parse(ids).message)).well_formed
    assert not parse_response(join_thinking(PLAIN.parse(ids).message)).well_formed
    twice = TOKENIZER.encode("<think>4+3=7</think> <answer>7</answer>", allow_special=True)
    assert not parse_response(join_thinking(OPEN.parse(twice).message)).well_formed


def test_supervised_flags_mark_what_the_assistant_says() -> None:
    said = Message(role="assistant", thinking="4+3=7", content=" <answer>7</answer>")
    rendered = PLAIN.render([USER, said])
    ids, sampled = rendered.token_ids, rendered.sampled
    trained = array("i", [index for index, flag in zip(ids, sampled, strict=True) if flag])
    text = "<think>4+3=7</think> <answer>7</answer><｜end▁of▁sentence｜>"
    assert trained == TOKENIZER.encode(text, allow_special=True)


def test_a_template_takes_the_place_of_chat_tokens() -> None:
    encoding = Encoding(TOKENIZER, EncodingConfig(template=CONVERSATION_TEMPLATE, open_thinking=True))
    text = spelled(encoding.prompt([Message(role="user", content="{question} <｜User｜>")]))
    assert text.endswith("User: {question} <｜User｜>\nAssistant:<think>")
    assert TOKENIZER.special_id("user") not in encoding.prompt([Message(role="user", content="<｜User｜>")])
    with pytest.raises(ValueError, match="one turn"):
        encoding.follow_up([USER], 1)
    with pytest.raises(ValueError, match="exactly one user message"):
        encoding.prompt([Message(role="system", content="x"), USER])
    rendered = encoding.render([USER, Message(role="assistant", thinking="a", content="b")])
    ids, sampled = rendered.token_ids, rendered.sampled
    assert ids[: sampled.index(1)] == encoding.prompt([USER])


def test_a_base_model_without_chat_tokens_needs_a_template() -> None:
    state = TOKENIZER._backend.to_str().replace("<｜User｜>", "<|im_start|>").replace("<｜begin▁of▁sentence｜>", "<s>")
    base = Tokenizer(type(TOKENIZER._backend).from_str(state))
    with pytest.raises(ValueError, match=r"no chat tokens \['<｜begin▁of▁sentence｜>', '<｜User｜>'\].*template"):
        Encoding(base)
    prompt = Encoding(base, EncodingConfig(template="Q: {question}\nA:")).prompt([USER])
    assert base.decode(prompt) == "Q: 4 + 3 =\nA:"


def test_stop_tokens() -> None:
    encoding = Encoding(TOKENIZER, EncodingConfig(stop=("</answer>", "<｜User｜>")))
    assert encoding.stop_token_ids == (1, 9, 3)
    assert encoding.parse([8, 9]).message.content == "<answer></answer>"
    assert encoding.parse([8, 3]).message.content == "<answer>"
    with pytest.raises(ValueError, match="not a special token"):
        Encoding(TOKENIZER, EncodingConfig(stop=("\n",)))


def test_what_cannot_be_rendered_is_refused() -> None:
    tool = ToolSpec(name="add", description="", parameters={})
    with pytest.raises(ValueError, match="no tools"):
        PLAIN.prompt([USER], [tool])
    for messages in ([], [USER, Message(role="assistant")]):
        with pytest.raises(ValueError, match="end with a user message"):
            PLAIN.prompt(messages)
    with pytest.raises(ValueError, match="no tool messages"):
        PLAIN.prompt([Message(role="tool"), USER])
    for new in ([], [Message(role="tool")]):
        with pytest.raises(ValueError, match="Only user messages"):
            PLAIN.follow_up(new, 1)
    with pytest.raises(ValueError, match=r"must hold \{question\}"):
        Encoding(TOKENIZER, EncodingConfig(template="Q:"))


def test_the_config_is_strict() -> None:
    with pytest.raises(msgspec.ValidationError, match="open_think"):
        msgspec.convert({"open_think": True}, EncodingConfig)
