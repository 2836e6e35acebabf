"""A conversation only grows inside a segment, and what was sampled stays as it was drawn."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.records import Message, ToolSpec
from rorqual.text.conversation import Conversation
from rorqual.text.encoding import Encoding
from rorqual.text.retention import Retention, kept_thinking, rewrites_context
from rorqual.text.streaming import join_deltas
from tests.text.conversations import DIRECT, SPELLED, TOKENIZER, V32, drawn, encoding, ids_of, result, user
from tests.text.test_parsing import CLOSE, END, GOOD, OPEN

TOOLS = (ToolSpec(name="find", description="Find.", parameters={}),)
CALL = "look</think>" + OPEN + GOOD + CLOSE + END
TWO_CALLS = "look</think>" + OPEN + GOOD + "\n" + GOOD + CLOSE + END
ANSWER = "so</think>It is x." + END


def begun(chosen: Encoding = V32, question: str = "where is x?") -> Conversation:
    return Conversation(chosen, [Message(role="system", content="Be brief."), user(question)], TOOLS)


def say(conversation: Conversation, text: str) -> list[str]:
    """Sample `text`; gives the ids of its calls."""
    parsed = conversation.append_sampled(drawn(ids_of(text)))
    return [call.id for call in parsed.message.tool_calls]


def answer_calls(conversation: Conversation, call_ids: list[str]) -> None:
    conversation.append([result(call_id, f"result of {call_id}") for call_id in call_ids])


def said_so_far(conversation: Conversation) -> array[int]:
    return conversation.prompt_ids[:]


def test_inside_a_user_turn_the_context_only_grows() -> None:
    conversation = begun()
    for text in (CALL, TWO_CALLS, CALL):
        before = conversation.prompt_ids + ids_of(text)
        answer_calls(conversation, say(conversation, text))
        assert conversation.prompt_ids[: len(before)] == before
        assert conversation.prompt_ids == V32.prompt(conversation.messages, TOOLS), "canonical tokens: as if rendered"
    say(conversation, ANSWER)
    (segment,) = conversation.segments()
    sampled = [index for index, flag in zip(segment.token_ids, segment.sampled, strict=True) if flag]
    assert sampled == [*ids_of(CALL), *ids_of(TWO_CALLS), *ids_of(CALL), *ids_of(ANSWER)]
    assert (segment.parent, segment.break_reason) == (None, None)


def test_a_new_user_message_starts_a_segment_without_the_earlier_thinking() -> None:
    conversation = begun()
    answer_calls(conversation, say(conversation, CALL))
    say(conversation, ANSWER)
    conversation.append([user("and y?")])
    text = TOKENIZER.decode(conversation.prompt_ids)
    assert "look" not in text
    assert "result of call_0_0" in text
    assert "where is x?<｜Assistant｜></think>\n\n<｜DSML｜function_calls>" in text
    assert text.endswith("and y?<｜Assistant｜><think>")
    assert conversation.prompt_ids == V32.prompt(conversation.messages, TOOLS)
    say(conversation, ANSWER)
    first, second = conversation.segments()
    assert (second.parent, second.break_reason) == (0, "new_user")
    assert TOKENIZER.decode(first.token_ids).endswith(ANSWER)
    assert second.num_sampled == len(ids_of(ANSWER))


def test_sampled_tokens_are_never_tokenised_again() -> None:
    """Drawn letter by letter, a text has other ids than when it is tokenised; the context keeps what was drawn."""
    letters = array("i", [index for letter in "look at the weather" for index in TOKENIZER.encode(letter)])
    odd = letters + ids_of("</think>" + OPEN + GOOD + CLOSE + END)
    again = ids_of(TOKENIZER.decode(odd))
    assert again != odd, "else this test shows nothing"
    conversation = begun()
    prompt = said_so_far(conversation)
    parsed = conversation.append_sampled(drawn(odd))
    answer_calls(conversation, [call.id for call in parsed.message.tool_calls])
    assert conversation.prompt_ids[: len(prompt + odd)] == prompt + odd
    assert V32.prompt(conversation.messages, TOOLS)[: len(prompt + again)] == prompt + again
    say(conversation, ANSWER)
    (segment,) = conversation.segments()
    assert [i for i, flag in zip(segment.token_ids, segment.sampled, strict=True) if flag] == [*odd, *ids_of(ANSWER)]


def test_a_token_that_was_not_drawn_cannot_be_trained_on() -> None:
    for break_it in ("token", "flag"):
        conversation = begun()
        say(conversation, ANSWER)
        growing = conversation._current
        if break_it == "token":
            growing.token_ids[-2] += 1
        else:
            growing._sampled[0] = 1
        with pytest.raises(AssertionError, match="drawn"):
            conversation.segments()


@pytest.mark.parametrize("text", ["never closed", CALL[:-30], "</think>" + OPEN + "find()", "a<think>b", END])
def test_what_is_malformed_stays_in_the_context_and_the_conversation_goes_on(text: str) -> None:
    conversation = begun()
    prompt, ids = said_so_far(conversation), ids_of(text)
    parsed = conversation.append_sampled(drawn(ids))
    assert parsed.problems or text == END
    calls = parsed.message.tool_calls
    conversation.append([result(call.id) for call in calls] or [user("again, please")])
    say(conversation, ANSWER)
    segments = conversation.segments()
    assert segments[0].token_ids[: len(prompt + ids)] == prompt + ids
    assert sum(segment.num_sampled for segment in segments) == len(ids) + len(ids_of(ANSWER))


def test_results_are_matched_by_id_and_all_must_be_there() -> None:
    ordered, swapped = begun(), begun()
    ids = say(ordered, TWO_CALLS)
    assert say(swapped, TWO_CALLS) == ids == ["call_0_0", "call_0_1"]
    answer_calls(ordered, ids)
    before = said_so_far(swapped), swapped.messages
    for wrong, words in [
        ([result(ids[0])], "2 calls have 1 results"),
        ([result(ids[0]), result(ids[0])], "two results"),
        ([result(ids[0]), result("c9")], "answers call 'c9'"),
        ([result(ids[0]), user("and?")], "have no result"),
        ([user("and?")], "have no result"),
        ([Message(role="system", content="x")], "can follow"),
    ]:
        with pytest.raises(ValueError, match=words):
            swapped.append(wrong)
        assert (swapped.prompt_ids, swapped.messages) == before
    answer_calls(swapped, ids[::-1])
    assert swapped.prompt_ids == ordered.prompt_ids


def test_results_and_a_user_message_may_come_together() -> None:
    conversation = begun()
    (call_id,) = say(conversation, CALL)
    conversation.append([result(call_id), user("and y?")])
    say(conversation, ANSWER)
    assert [segment.break_reason for segment in conversation.segments()] == [None, "new_user"]


@pytest.mark.parametrize(
    ("chosen", "reasons"),
    [
        (V32, [None, "new_user"]),
        (encoding(retention="all"), [None]),
        (encoding(retention="none"), [None, "tool_results", "new_user"]),
        (DIRECT, [None]),
        (encoding("deepseek_r1"), [None, "new_user"]),
    ],
    ids=["since_last_user", "all", "none", "no thinking", "r1"],
)
def test_retention_decides_when_a_segment_ends(chosen: Encoding, reasons: list[str | None]) -> None:
    conversation = Conversation(chosen, [user("where is x?")])
    call = CALL if chosen.config.open_thinking else CALL.partition("</think>")[2]
    if chosen.format.name == "deepseek_r1":
        one = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>find\n```json\n{}\n```<｜tool▁call▁end｜>"
        call = f"look</think><｜tool▁calls▁begin｜>{one}<｜tool▁calls▁end｜>" + END
    call_ids = say(conversation, call)
    assert len(call_ids) == 1
    answer_calls(conversation, call_ids)
    say(conversation, ANSWER if chosen.config.open_thinking else "It is x." + END)
    conversation.append([user("and y?")])
    assert conversation.prompt_ids == chosen.prompt(conversation.messages)
    say(conversation, "so</think>y" + END)
    segments = conversation.segments()
    assert [segment.break_reason for segment in segments] == reasons
    assert [segment.parent for segment in segments] == [None, *range(len(reasons) - 1)]


def test_rewriting_starts_a_segment_and_the_messages_stay() -> None:
    conversation = begun()
    answer_calls(conversation, say(conversation, CALL))
    everything = conversation.messages
    shorter = [*everything[:2]]
    conversation.rewrite(shorter, "discard_all")
    assert conversation.messages == everything
    assert conversation.context_messages == tuple(shorter)
    assert conversation.prompt_ids == V32.prompt(shorter, TOOLS)
    conversation.rewrite([user("in short: where?")], "summary")
    say(conversation, ANSWER)
    assert [segment.break_reason for segment in conversation.segments()] == [None, "summary"]
    with pytest.raises(ValueError, match="just"):
        conversation.rewrite(shorter, "discard_all")


def test_a_segment_in_which_nothing_was_sampled_is_none() -> None:
    conversation = begun()
    assert conversation.segments() == ()
    conversation.rewrite([user("again")], "summary")
    say(conversation, ANSWER)
    conversation.append([user("more")])
    (segment,) = conversation.segments()
    assert (segment.parent, segment.break_reason) == (None, None)
    assert segment.sampled[-1] == 1


def test_turns_are_taken() -> None:
    conversation = begun()
    with pytest.raises(ValueError, match="policy's turn"):
        conversation.append([user("hello?")])
    say(conversation, ANSWER)
    conversation.append([])
    with pytest.raises(ValueError, match="just spoken"):
        conversation.append_sampled(drawn(ids_of(ANSWER)))


def test_a_completion_that_ended_otherwise_is_closed_before_what_follows() -> None:
    conversation = begun(DIRECT)
    cut = ids_of("It is")
    prompt = said_so_far(conversation)
    conversation.append_sampled(drawn(cut))
    conversation.append([user("go on")])
    assert conversation.prompt_ids == prompt + cut + ids_of(f"{END}<｜User｜>go on<｜Assistant｜></think>")
    assert conversation.segments()[0].token_ids == prompt + cut


def test_a_stream_reads_what_will_be_read() -> None:
    conversation = begun()
    stream, ids = conversation.stream(), ids_of(TWO_CALLS)
    deltas = [stream.feed([index]) for index in ids]
    last, parsed = stream.finish()
    assert parsed == conversation.append_sampled(drawn(ids))
    assert join_deltas([*deltas, last]).tool_calls == parsed.message.tool_calls


DROPPING_CHAT = encoding("chat", open_thinking=False, retention="since_last_user")
SAID = st.lists(
    st.sampled_from([*SPELLED, GOOD, OPEN, CLOSE, "\n", "</think>"]) | st.text(max_size=4), min_size=1, max_size=8
).map(lambda pieces: ids_of("".join(pieces) + "x"))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(SAID | st.just(ids_of(TWO_CALLS)), st.booleans()), min_size=1, max_size=6),
    st.sampled_from(
        [V32, DIRECT, encoding(retention="all"), encoding(retention="none"), encoding("chat"), DROPPING_CHAT]
    ),
)
def test_whatever_is_drawn(turns: list[tuple[array[int], bool]], chosen: Encoding) -> None:
    """Tools and users answer whatever a policy draws: its tokens stand in the segments in order, once, no others."""
    conversation = Conversation(chosen, [user("<think>")])
    expected = array("i")
    for ids, is_user_turn in turns:
        before = said_so_far(conversation)
        parsed = conversation.append_sampled(drawn(ids))
        expected += ids
        results = [result(call.id, "</result>") for call in parsed.message.tool_calls]
        arriving = [*results, *([user("<｜User｜>")] if is_user_turn or not results else [])]
        conversation.append(arriving)
        if not chosen.rewrites(arriving):
            assert conversation.prompt_ids[: len(before + ids)] == before + ids
    segments = conversation.segments()
    sampled = [i for each in segments for i, flag in zip(each.token_ids, each.sampled, strict=True) if flag]
    assert sampled == expected.tolist()
    assert [segment.parent for segment in segments] == [None, *range(len(segments) - 1)]


ROLES = {"s": "system", "u": "user", "d": "developer", "a": "assistant", "t": "tool"}


@pytest.mark.parametrize(
    ("retention", "roles", "kept"),
    [
        ("since_last_user", "suatauata", "0000001111"),
        ("since_last_user", "uadata", "0001111"),
        ("since_last_user", "sa", "111"),
        ("since_last_user", "u", "01"),
        ("all", "uaua", "11111"),
        ("none", "uatata", "0000011"),
        ("none", "uatat", "000001"),
        ("none", "uu", "001"),
        ("none", "", "1"),
    ],
)
def test_kept_thinking(retention: Retention, roles: str, kept: str) -> None:
    messages = [Message(role=ROLES[letter]) for letter in roles]  # type: ignore[arg-type]
    assert "".join(str(int(flag)) for flag in kept_thinking(retention, messages)) == kept


def test_what_rewrites_the_context() -> None:
    developer = Message(role="developer", content="x")
    arriving = ([result("c")], [user("x")], [result("c"), developer])
    expected = {"since_last_user": [False, True, True], "all": [False] * 3, "none": [True] * 3}
    for rule, rewritten in expected.items():
        assert [rewrites_context(rule, each) for each in arriving] == rewritten  # type: ignore[arg-type]
        assert not rewrites_context(rule, [])  # type: ignore[arg-type]
