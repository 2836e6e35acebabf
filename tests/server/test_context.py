"""Context management for clients that send everything each time: as a rollout would have managed it."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from rorqual.records import Message, ToolCall
from rorqual.rollout.context import ContextConfig, ContextManager
from rorqual.server.context import ContextPolicy
from rorqual.server.errors import ApiError
from rorqual.text.conversation import Conversation
from rorqual.text.openai import message_to_openai
from tests.server.servers import EOS, TOKENIZER, saying, serving_engine
from tests.text.conversations import DIRECT, V32, drawn, ids_of, user

WINDOW = 600


def turn(number: int, size: int) -> list[Message]:
    """A call, and its result of about `size` tokens."""
    call = ToolCall(id=f"c{number}", name="find", arguments=f'{{"n": {number}}}')
    result = Message(role="tool", content=f"r{number} " + "x" * size, tool_call_id=call.id)
    return [Message(role="assistant", content=f"step {number}", tool_calls=(call,)), result]


def rollout(strategy: str, sizes: list[int]) -> list[tuple[Message, ...]]:
    """What a policy sees before each of its turns, managed while the conversation goes on."""
    conversation = Conversation(DIRECT, [user("question")])
    manager = ContextManager(ContextConfig(strategy=strategy), WINDOW)
    seen = []
    for number, size in enumerate(sizes):
        manager.before_call(conversation)
        seen.append(conversation.context_messages)
        said, result = turn(number, size)
        text = DIRECT.render([user("q"), said]).text.split("</think>")[-1]
        parsed = conversation.append_sampled(drawn(ids_of(text)))
        answered = Message(role="tool", content=result.content, tool_call_id=parsed.message.tool_calls[0].id)
        conversation.append([answered])
    manager.before_call(conversation)
    return [*seen, conversation.context_messages]


def plain(messages: tuple[Message, ...]) -> list[tuple[str, str, int]]:
    """Without the ids of calls, which differ."""
    return [(message.role, message.content, len(message.tool_calls)) for message in messages]


@pytest.mark.parametrize("strategy", ["discard_all", "discard_75", "discard_all_results", "discard_all_actions"])
@pytest.mark.parametrize("sizes", [[90] * 9, [30, 200, 30, 30, 300, 20, 20, 100, 5], [10] * 2])
def test_a_server_shows_what_a_rollout_shows(strategy: str, sizes: list[int]) -> None:
    policy = ContextPolicy(ContextConfig(strategy=strategy), WINDOW)
    managed = rollout(strategy, sizes)
    messages = [user("question")]
    num_shorter = 0
    for number, size in enumerate([*sizes, 0]):
        if len(DIRECT.prompt(managed[number])) >= WINDOW:
            with pytest.raises(ApiError, match="must hold the answer too"):
                policy.seen(DIRECT, messages)
            break
        seen = policy.seen(DIRECT, messages)
        assert plain(seen) == plain(managed[number])
        num_shorter += len(seen) < len(messages) or plain(seen) != plain(tuple(messages))
        messages += turn(number, size)
    assert (num_shorter > 0) == (sum(sizes) > 400)


def test_the_newest_result_is_seen_again_after_a_reset() -> None:
    """Without a replay, every request after the first reset would leave out all results, the newest included."""
    policy = ContextPolicy(ContextConfig(strategy="discard_all"), WINDOW)
    messages = [user("question")] + [message for number in range(7) for message in turn(number, 90)]
    assert len(policy.seen(DIRECT, messages)) > 1
    assert policy.seen(DIRECT, messages)[-1] == messages[-1]


def test_what_cannot_be_served_and_what_does_not_fit() -> None:
    for strategy in ("summary", "parallel_fewest_step"):
        with pytest.raises(ValueError, match="cannot be served"):
            ContextPolicy(ContextConfig(strategy=strategy), WINDOW)
    policy = ContextPolicy(ContextConfig(strategy="discard_all"), 100)
    with pytest.raises(ApiError, match="must hold the answer too"):
        policy.seen(V32, [user("x" * 5000)])


def test_a_served_policy_sees_the_managed_context() -> None:
    engine = saying("ok" + EOS)
    engine.context_window = WINDOW
    policy = ContextPolicy(ContextConfig(strategy="discard_all"), WINDOW)
    with serving_engine(engine, context=policy) as server:
        messages = [user("question")] + [message for number in range(5) for message in turn(number, 90)]
        asked: Any = [message_to_openai(message) for message in messages]
        answer = server.client().chat.completions.create(model="tiny", messages=asked)
        assert answer.usage.prompt_tokens < 0.8 * WINDOW
        shown = TOKENIZER.decode(engine.submitted[0].prompt_ids)
        assert "question" in shown
        assert "r0 x" not in shown
        with pytest.raises(openai.BadRequestError) as caught:
            server.client().chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 5000}])
        assert caught.value.code == "context_length_exceeded"
