"""One conversation as the policy sees it: a chain of segments, each an exact token context that only grows.

    prompt_ids ──► engine ──► append_sampled ──► tools, environment, user ──► append ──► prompt_ids ...

Tool results are appended behind the ids that were sampled, which are never tokenised again. Where retention drops
thinking, or context management rewrites the messages, the context is rendered anew as the next segment, which names the
one before it and the reason. Rollouts, the server and the terminal all hold their conversations here.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from rorqual.records import BreakReason, Completion, Message, Segment, ToolSpec
from rorqual.text.encoding import Encoding
from rorqual.text.parsing import Parsed
from rorqual.text.retention import USER_ROLES
from rorqual.text.segments import GrowingSegment
from rorqual.text.streaming import TokenStream


class Conversation:
    """A conversation in which the policy and the others take turns.

    messages: all that was said, the policy's messages as they were parsed, whatever became of the context.
    context_messages: what the context of the current segment was rendered from, and what was said in it.
    """

    def __init__(
        self,
        encoding: Encoding,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec] = (),
        response_format: Any = None,
    ) -> None:
        """Begin with `messages`, after which the policy speaks. Raises: ValueError as `Encoding.prompt` does."""
        self._encoding = encoding
        self._tools, self._response_format = tuple(tools), response_format
        self.messages: tuple[Message, ...] = tuple(messages)
        self.context_messages: tuple[Message, ...] = ()
        self._chain: list[tuple[GrowingSegment, BreakReason | None]] = []
        self._policy_speaks = True
        self._begin_segment(self.messages, None)

    @property
    def prompt_ids(self) -> array[int]:
        """The context: what the policy's next completion continues."""
        return self._current.token_ids

    @property
    def num_tokens(self) -> int:
        """Tokens of the context."""
        return len(self._current.token_ids)

    def count(self, messages: Sequence[Message]) -> int:
        """Tokens that the context has after `rewrite(messages)`. Raises: ValueError as `Encoding.prompt` does."""
        return len(self._encoding.prompt(messages, self._tools, self._response_format))

    def append_sampled(self, completion: Completion) -> Parsed:
        """What the policy drew for `prompt_ids`; gives it as a message, with what is wrong with it.

        Raises: ValueError when it is not the policy's turn, or the completion breaks the engine's contract.
        """
        if not self._policy_speaks:
            raise ValueError("The policy has just spoken. Append results or a user message before it goes on.")
        parsed = self._encoding.parse(completion.token_ids, **self._reading())
        self._current.append_completion(completion)
        self._policy_speaks = False
        self.messages += (parsed.message,)
        self.context_messages += (parsed.message,)
        return parsed

    def append_aside(self, completion: Completion) -> Parsed:
        """What the policy drew for context management: a summary. It counts as sampled, and is no message.

        It stays the policy's turn; `rewrite` comes before it goes on.
        Raises: ValueError as `append_sampled` does.
        """
        if not self._policy_speaks:
            raise ValueError("The policy has just spoken. Append results or a user message before it goes on.")
        parsed = self._encoding.parse(completion.token_ids, **self._reading())
        self._current.append_completion(completion)
        return parsed

    def stream(self) -> TokenStream:
        """Reads the policy's next completion while it is drawn, as `append_sampled` will read it."""
        return self._encoding.stream(**self._reading())

    def append(self, messages: Sequence[Message]) -> None:
        """What answers the policy: results for all of its calls, user messages, or both in this order.

        No message at all changes nothing.
        Raises: ValueError, and then nothing has changed, for messages that cannot follow, or when it is the policy's
        turn.
        """
        if not messages:
            return
        if self._policy_speaks:
            raise ValueError("It is the policy's turn; its completion comes first.")
        calls = self.context_messages[-1].tool_calls
        ids = self._encoding.follow_up(messages, self.prompt_ids[-1], calls)
        if self._encoding.rewrites(messages):
            is_user_turn = any(message.role in USER_ROLES for message in messages)
            self._begin_segment((*self.context_messages, *messages), "new_user" if is_user_turn else "tool_results")
        else:
            self._current.append_given(ids)
            self.context_messages += tuple(messages)
        self.messages += tuple(messages)
        self._policy_speaks = True

    def rewrite(self, messages: Sequence[Message], reason: BreakReason) -> None:
        """Go on from `messages` in a new segment, at the policy's turn: what context management makes of the context.

        Raises: ValueError, and then nothing has changed, as `Encoding.prompt` does, and when the policy has just
        spoken.
        """
        if not self._policy_speaks:
            raise ValueError("The policy has just spoken. Append what answers it before the context is rewritten.")
        self._begin_segment(tuple(messages), reason)

    def segments(self) -> tuple[Segment, ...]:
        """Every segment in which something was sampled; each names the one before it as its parent."""
        sampled = [(growing, reason) for growing, reason in self._chain if growing.has_sampled]
        return tuple(
            growing.segment(index - 1, reason) if index else growing.segment()
            for index, (growing, reason) in enumerate(sampled)
        )

    @property
    def _current(self) -> GrowingSegment:
        return self._chain[-1][0]

    def _begin_segment(self, messages: tuple[Message, ...], reason: BreakReason | None) -> None:
        ids = self._encoding.prompt(messages, self._tools, self._response_format)
        if not ids:
            raise ValueError("The messages are encoded as no token at all; a policy needs one to start from.")
        growing = GrowingSegment()
        growing.append_given(ids)
        self._chain.append((growing, reason))
        self.context_messages = messages

    def _reading(self) -> dict[str, Any]:
        turn = sum(message.role == "assistant" for message in self.messages)
        after_results = self.context_messages[-1].role == "tool"
        return {"tools": self._tools or None, "after_results": after_results, "call_prefix": f"call_{turn}_"}
