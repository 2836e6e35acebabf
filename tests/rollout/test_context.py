"""Context management: what each strategy leaves out, and what holds whatever the policy and its tools do."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.records import Message, ToolSpec
from rorqual.rollout.compaction import LEFT_OUT, Strategy, discard, find_rounds, truncate_results, with_summary
from rorqual.rollout.context import ContextConfig, ContextManager, Decision
from rorqual.text.conversation import Conversation
from rorqual.text.encoding import Encoding
from tests.text.conversations import V32, call, drawn, encoding, ids_of, result, user
from tests.text.test_parsing import CLOSE, END, GOOD, OPEN

TOOLS = (ToolSpec(name="find", description="Find.", parameters={}),)
SYSTEM = Message(role="system", content="Be brief.")
QUESTION = user("where is x?")
STRATEGIES = get_args(Strategy)
REWRITING = [name for name in STRATEGIES if ContextConfig(strategy=name).rewrites]


def rounds(*sizes: int, text: str = "ok") -> list[Message]:
    """Rounds of so many calls each, the calls of the i-th are named `i.0`, `i.1`..."""
    messages = []
    for i, size in enumerate(sizes):
        calls = tuple(call(f"{i}.{k}") for k in range(size))
        messages.append(Message(role="assistant", thinking=f"thought {i}", tool_calls=calls))
        messages += [result(each.id, text) for each in calls]
    return messages


def calls_of(messages: tuple[Message, ...]) -> str:
    return " ".join(each.id for message in messages for each in message.tool_calls)


def length(messages: object) -> int:
    return sum(10 + len(message.content) for message in messages)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("strategy", "sizes", "left"),
    [
        ("discard_75", (1, 1, 1, 1, 1, 1, 1, 1), "6.0 7.0"),
        ("discard_75", (1, 1, 1), ""),
        ("discard_75", (1, 3, 1), "2.0"),
        ("discard_75", (2, 2, 1), "2.0"),
        ("discard_75", (1,), ""),
        ("discard_75_messages", (1, 1, 6, 1), "3.0"),
        ("discard_75_messages", (6, 1, 1), "2.0"),
        ("discard_75_tokens", (1, 1, 1, 1), "3.0"),
        ("discard_all", (1, 2, 1), ""),
        ("discard_all_results", (1, 2), "0.0 1.0 1.1"),
        ("discard_all_actions", (1, 2), ""),
        ("discard_all_recent", (1, 2, 1, 1), "2.0 3.0"),
        ("discard_all_recent", (1, 2), "0.0 1.0 1.1"),
    ],
)
def test_what_each_reading_leaves_out(strategy: Strategy, sizes: tuple[int, ...], left: str) -> None:
    messages = [SYSTEM, QUESTION, *rounds(*sizes, text="a long result of a tool")]
    kept = discard(strategy, messages, keep_rounds=2, count=length)
    assert calls_of(kept) == left
    assert kept[0] == SYSTEM
    assert kept[1].content.startswith(QUESTION.content)


def test_a_large_old_result_weighs_by_its_tokens() -> None:
    messages = [QUESTION, *rounds(1, 1, 1, 1)]
    messages[2] = result("0.0", "long " * 40)
    assert calls_of(discard("discard_75_tokens", messages, 0, length)) == "1.0 2.0 3.0"
    assert calls_of(discard("discard_75", messages, 0, length)) == "3.0"


def test_results_go_and_thoughts_stay_or_the_other_way_round() -> None:
    messages = [QUESTION, *rounds(1, 1, text="a long result of a tool")]
    shown = discard("discard_all_results", messages, 0, length)
    assert [message.content for message in shown if message.role == "tool"] == [LEFT_OUT] * 2
    assert [message.thinking for message in shown if message.role == "assistant"] == ["thought 0", "thought 1"]
    assert discard("discard_all_results", shown, 0, length) == shown, "there is nothing more to leave out"
    (noted,) = discard("discard_all_actions", messages, 0, length)
    assert noted.content == "where is x?\n\nYour notes so far:\nthought 0\nthought 1"
    (again,) = discard("discard_all_actions", [noted, *rounds(1)], 0, length)
    assert again.content == noted.content + "\nthought 0"


def test_answers_and_user_turns_stay() -> None:
    answer = Message(role="assistant", content="It is x.")
    messages = [SYSTEM, QUESTION, *rounds(1), answer, user("and y?"), *rounds(1, 1)]
    assert discard("discard_all", messages, 0, length) == (SYSTEM, QUESTION, answer, user("and y?"))
    trailing = [QUESTION, answer, *rounds(1)]
    assert discard("discard_all", trailing, 0, length) == (QUESTION,), "the policy speaks next"
    assert discard("discard_all", [QUESTION], 0, length) == (QUESTION,)
    kept = with_summary(messages, "y is near x")
    assert [message.role for message in kept] == ["system", "user", "user"]
    assert (kept[1], kept[2].content) == (QUESTION, "and y?\n\nA summary of your work so far:\ny is near x")


def test_what_discards_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="discards nothing"):
        discard("summary", [QUESTION], 0, length)


def test_the_longest_results_are_cut_to_one_length_and_no_further_than_needed() -> None:
    texts = ["short", "a" * 100 + "z" * 100, "b" * 50 + "y" * 50]
    messages = [QUESTION, *[result(str(i), text) for i, text in enumerate(texts)]]
    whole = length(messages)
    cut = truncate_results(messages, whole - 60, length)
    assert cut is not None
    assert whole - 62 <= length(cut) <= whole - 60
    assert cut[1].content == "short"
    assert cut[2].content.startswith("aaaa") and cut[2].content.endswith("zzzz") and LEFT_OUT in cut[2].content
    assert cut[3] == messages[3]
    assert truncate_results(messages, whole, length) == tuple(messages)
    assert truncate_results(messages, 20, length) is None
    assert truncate_results([QUESTION], 5, length) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"threshold": 0.0},
        {"threshold": 1.0},
        {"reserve_tokens": 0},
        {"max_resets": -1},
        {"summary_tokens": 0},
        {"keep_rounds": -1},
        {"parallel_runs": 1},
        {"summary_instruction": ""},
    ],
)
def test_settings_out_of_range_are_named(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"ContextConfig.{next(iter(changes))} ="):
        ContextConfig(**changes)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------- with conversations that go on


class Player:
    """A policy that calls `find` as often as it is told, and a manager that is asked before each of its turns."""

    def __init__(self, config: ContextConfig, window: int, chosen: Encoding = V32) -> None:
        self.chosen, self.manager = chosen, ContextManager(config, window)
        self.conversation = Conversation(chosen, [SYSTEM, QUESTION], TOOLS)
        self.num_summaries = 0
        self.num_drawn = 0

    def decide(self) -> Decision:
        decision = self.manager.before_call(self.conversation)
        while decision.kind == "summary":
            assert 0 < decision.max_new_tokens <= self.manager.window - self.conversation.num_tokens
            text = f"so</think>s{self.num_summaries}" if self.chosen.config.open_thinking else f"s{self.num_summaries}"
            completion = drawn(ids_of(text + END)[: decision.max_new_tokens])
            self.num_drawn += len(completion.token_ids)
            self.num_summaries += 1
            said = self.conversation.append_aside(completion).message
            decision = self.manager.take_summary(self.conversation, said.content or said.thinking)
        return decision

    def play(self, sizes: list[tuple[int, int]]) -> int:
        """One turn of `num_calls` calls with results of `num_words` words for each of `sizes`; the turns that were
        played before there was no room."""
        for turn, (num_calls, num_words) in enumerate(sizes):
            decision = self.decide()
            self.check(decision)
            text = "look</think>" * self.chosen.config.open_thinking
            ids = ids_of(text + OPEN + "\n".join([GOOD] * num_calls) + CLOSE + END)
            if decision.kind == "overflow" or decision.max_new_tokens < len(ids):
                return turn
            self.num_drawn += len(ids)
            calls = self.conversation.append_sampled(drawn(ids)).message.tool_calls
            self.conversation.append([result(each.id, "word " * num_words) for each in calls])
        return len(sizes)

    def check(self, decision: Decision) -> None:
        conversation, manager = self.conversation, self.manager
        context = conversation.context_messages
        assert context[0] == SYSTEM
        assert context[1].content.startswith(QUESTION.content), "the first user turn survives"
        assert conversation.num_tokens + decision.max_new_tokens <= manager.window or decision.kind == "overflow"
        whole = [message for each in find_rounds(context) for message in context[each.start : each.stop]]
        assert [message for message in context if message.role in ("assistant", "tool")] == whole
        for each in find_rounds(context):
            asked = [one.id for one in context[each.start].tool_calls]
            assert [context[place].tool_call_id for place in each[1:]] == asked, "calls and results go together"


SIZES = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 60)), max_size=12)
EMPTY = len(V32.prompt([SYSTEM, QUESTION], TOOLS))


@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("strategy", REWRITING)
@given(sizes=SIZES, room=st.integers(60, 500))
def test_whatever_happens_the_window_holds_and_every_event_is_accounted_for(
    strategy: Strategy, sizes: list[tuple[int, int]], room: int
) -> None:
    config = ContextConfig(strategy=strategy, summary_tokens=20, keep_rounds=1, max_resets=3)
    player = Player(config, EMPTY + room)
    rewrites: list[tuple[tuple[int, int], object]] = []
    asked: int | None = None
    rewrite = player.conversation.rewrite

    def watched(messages: object, reason: object) -> None:
        before = player.conversation.num_tokens
        rewrite(messages, reason)  # type: ignore[arg-type]
        rewrites.append(((before, len(V32.prompt(player.conversation.context_messages, TOOLS))), reason))

    player.conversation.rewrite = watched  # type: ignore[method-assign, assignment]
    player.play(sizes)
    events = player.manager.events
    assert sum(event.kind != "truncation" for event in events) <= 3
    expected = []
    for (before, after), reason in rewrites:
        if reason == "summary" and asked is None:
            asked = before  # this rewrite asks for the summary, the next one goes on from it
        else:
            expected.append((before if asked is None else asked, after))
            asked = None
    assert [(event.tokens_before, event.tokens_after) for event in events] == expected
    assert sum(segment.num_sampled for segment in player.conversation.segments()) == player.num_drawn


@pytest.mark.parametrize("strategy", REWRITING)
def test_a_task_too_long_for_the_window_is_played_to_its_end(strategy: Strategy) -> None:
    player = Player(ContextConfig(strategy=strategy, summary_tokens=20, keep_rounds=1), EMPTY + 800)
    num_turns = player.play([(1, 30)] * 40)
    assert num_turns < 40 if strategy == "discard_all_results" else num_turns == 40, "calls that stay fill the window"
    kinds = {event.kind for event in player.manager.events}
    assert kinds >= {next(kind for kind in ("summary", "discard_75", "discard_all") if strategy.startswith(kind))}
    reasons = {segment.break_reason for segment in player.conversation.segments()} - {None}
    assert reasons == kinds
    assert all(event.tokens_before > player.manager.limit for event in player.manager.events)


@pytest.mark.parametrize("strategy", ["none", "parallel_fewest_step"])
def test_without_management_the_context_only_grows_until_it_is_full(strategy: Strategy) -> None:
    player = Player(ContextConfig(strategy=strategy), EMPTY + 300)
    assert player.play([(1, 30)] * 40) < 40
    assert player.manager.events == ()
    assert len(player.conversation.segments()) == 1


def test_nothing_happens_up_to_the_threshold_and_a_reset_above_it() -> None:
    for extra, num_events in [(0, 0), (1, 1)]:
        player = Player(ContextConfig(strategy="discard_all"), 10_000)
        player.play([(1, 5)])
        player.manager.limit = player.conversation.num_tokens - extra
        assert player.decide().kind == "call"
        assert len(player.manager.events) == num_events
    (event,) = player.manager.events
    assert (event.kind, event.turn, event.num_calls_before, event.num_calls_after) == ("discard_all", 1, 1, 0)
    assert (event.tokens_before, event.tokens_after) == (player.manager.limit + 1, EMPTY)


def test_the_limit_on_resets_holds() -> None:
    player = Player(ContextConfig(strategy="discard_all", max_resets=2), EMPTY + 300)
    assert player.play([(1, 30)] * 40) < 40
    assert [event.kind for event in player.manager.events].count("discard_all") == 2


def test_a_result_larger_than_the_window_is_cut_as_the_last_resort() -> None:
    player = Player(ContextConfig(strategy="discard_all_recent", keep_rounds=1, reserve_tokens=100), EMPTY + 400)
    assert player.play([(1, 5), (2, 3000)]) == 2
    decision = player.decide()
    assert (decision.kind, decision.max_new_tokens >= 100) == ("call", True)
    assert [event.kind for event in player.manager.events] == ["discard_all", "truncation"]
    assert LEFT_OUT in player.conversation.context_messages[-1].content
    unmanaged = Player(ContextConfig(), EMPTY + 400)
    assert unmanaged.play([(1, 5), (2, 3000)]) == 2
    assert unmanaged.decide() == Decision(kind="overflow", max_new_tokens=0)


def test_a_summary_of_what_does_not_fit_is_asked_with_truncated_results_and_replaces_the_one_before() -> None:
    player = Player(ContextConfig(strategy="summary", summary_tokens=30), EMPTY + 400)
    assert player.play([(1, 3000), (1, 3000)]) == 2
    assert player.decide().kind == "call"
    assert player.conversation.context_messages[1].content == "where is x?\n\nA summary of your work so far:\ns1"
    asked = player.conversation.segments()[1]
    assert asked.break_reason == "summary"
    assert len(asked.token_ids) <= player.manager.window
    assert "s0" not in [message.content for message in player.conversation.messages], "a summary is no message"


def test_a_summary_comes_when_it_is_asked_for_and_only_then() -> None:
    player = Player(ContextConfig(strategy="summary", summary_tokens=30), EMPTY + 400)
    with pytest.raises(ValueError, match="No summary"):
        player.manager.take_summary(player.conversation, "s")
    player.play([(1, 300)])
    assert player.manager.before_call(player.conversation).kind == "summary"
    with pytest.raises(ValueError, match="has not been given"):
        player.manager.before_call(player.conversation)


@pytest.mark.parametrize("form", ["deepseek_v32", "thinkless", "all", "none"])
def test_inside_a_segment_the_context_only_grows(form: str) -> None:
    settings = {"deepseek_v32": {}, "thinkless": {"open_thinking": False}}.get(form, {"retention": form})
    player = Player(ContextConfig(strategy="discard_75"), EMPTY + 700, encoding(**settings))
    seen: list[tuple[int, list[int]]] = []
    append = player.conversation.append

    def watched(messages: object) -> None:
        before, num_segments = player.conversation.prompt_ids.tolist(), len(player.conversation._chain)
        append(messages)  # type: ignore[arg-type]
        if len(player.conversation._chain) == num_segments:
            assert player.conversation.prompt_ids.tolist()[: len(before)] == before
            seen.append((num_segments, before))

    player.conversation.append = watched  # type: ignore[method-assign, assignment]
    assert player.play([(1, 30)] * 30) == 30
    assert bool(seen) == (form != "none")
