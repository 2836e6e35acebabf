"""Context management for clients that send the whole conversation each time.

A server keeps nothing between requests, so it replays: before each turn that the policy has taken, the manager decides
what it would have decided then, and the conversation goes on from there. What the policy sees is what it would see in a
rollout under the same config. A summary would have to be drawn anew for every request, so that strategy is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rorqual.records import BreakReason, Message, ToolSpec
from rorqual.rollout.context import ContextConfig, ContextManager
from rorqual.server.errors import invalid
from rorqual.text.encoding import Encoding
from rorqual.text.retention import USER_ROLES

MESSAGE_BYTES = 200
CALL_BYTES = 300
ARGUMENT_FACTOR = 16
"""More than any format writes around a message, a call, and each byte of its arguments; a byte is a token at most."""

REFUSED = ("summary", "parallel_fewest_step")
"""Strategies that need more than the messages: the policy's own words, or several runs."""


@dataclass(frozen=True)
class ContextPolicy:
    """How the contexts of all requests are managed, for a window of so many tokens."""

    config: ContextConfig
    window: int

    def __post_init__(self) -> None:
        """Raises: ValueError for a strategy that a server cannot follow."""
        if self.config.strategy in REFUSED:
            raise ValueError(
                f"--context {self.config.strategy} cannot be served: a server keeps nothing between requests. Choose a "
                "strategy that discards."
            )

    def seen(
        self,
        encoding: Encoding,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec] = (),
        schema: Mapping[str, Any] | None = None,
    ) -> tuple[Message, ...]:
        """What the policy sees of `messages`, after which it speaks.

        Raises: ValueError for messages that cannot be encoded; ApiError (400) where no room is left for an answer.
        """
        context = _Replay(encoding, tools, schema)
        manager = ContextManager(self.config, self.window)
        for index, message in enumerate(messages):
            if message.role == "assistant" and index and messages[index - 1].role in (*USER_ROLES, "tool"):
                self._manage(manager, context)
            context.say(message)
        if not self._manage(manager, context):
            raise invalid(
                f"The context has {context.num_tokens} tokens, and the window of {self.window} must hold the answer "
                "too. Shorten it.",
                param="messages",
                code="context_length_exceeded",
            )
        return context.context_messages

    def _manage(self, manager: ContextManager, context: _Replay) -> bool:
        """Whether there is room for a call, after what the manager has done about it."""
        if context.most_tokens() <= manager.limit:
            return True
        return manager.before_call(context).kind == "call"


class _Replay:
    """Implements `rollout.context.ManagedContext` for messages that are already there."""

    def __init__(self, encoding: Encoding, tools: Sequence[ToolSpec], schema: Mapping[str, Any] | None) -> None:
        self._encoding, self._tools, self._schema = encoding, tools, schema
        self.messages: tuple[Message, ...] = ()
        self.context_messages: tuple[Message, ...] = ()
        self._told = self.count([Message(role="user", content="x")])

    @property
    def num_tokens(self) -> int:
        return self.count(self.context_messages)

    def count(self, messages: Sequence[Message]) -> int:
        return len(self._encoding.prompt(messages, self._tools, self._schema))

    def rewrite(self, messages: Sequence[Message], reason: BreakReason) -> None:
        self.context_messages = tuple(messages)

    def say(self, message: Message) -> None:
        self.messages += (message,)
        self.context_messages += (message,)

    def most_tokens(self) -> int:
        """A bound on `num_tokens` that costs next to nothing."""
        return self._told + sum(map(_most_bytes, self.context_messages))


def _most_bytes(message: Message) -> int:
    calls = sum(CALL_BYTES + ARGUMENT_FACTOR * len(call.arguments) + 4 * len(call.name) for call in message.tool_calls)
    return MESSAGE_BYTES + 4 * (len(message.content) + len(message.thinking)) + calls
