"""Context management: what the policy still sees when its context has grown too long. One object for all callers.

    decision = manager.before_call(conversation)
    while decision.kind == "summary":
        text = (what the policy draws for the conversation's context, `decision.max_new_tokens` at most)
        decision = manager.take_summary(conversation, text)
    decision.kind == "call": draw the next turn, `decision.max_new_tokens` at most; "overflow": there is no room for it

Rollouts, evaluations and the server all do this before each turn. The manager decides and rewrites; it samples nothing,
waits for nothing and knows no tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from rorqual.records import BreakReason, ContextEvent, Message, Record
from rorqual.rollout.compaction import (
    Strategy,
    ask_for_summary,
    discard,
    num_calls,
    truncate_results,
    with_summary,
)

SUMMARY_INSTRUCTION = (
    "Your context is almost full. Summarise what you have done so far, what you have found, and what is still open. "
    "You will go on from the question and this summary alone."
)


Reset = Literal["summary", "discard_75", "discard_all", "truncation"]


class ContextConfig(Record):
    """How a context that has grown too long is made shorter.

    strategy: see `compaction.Strategy`. threshold: the share of the window above which it acts, before a call.
    reserve_tokens: room that a call must have; with less, results are truncated, as the last resort of every strategy
    that changes the context at all. max_resets: how often the strategy may act in one conversation. keep_rounds: newest
    rounds that `discard_all_recent` keeps. summary_tokens: most tokens of a summary; half of the window above the
    threshold at most. parallel_runs: runs of `parallel_fewest_step`.
    """

    strategy: Strategy = "none"
    threshold: float = 0.8
    reserve_tokens: int = 1
    max_resets: int = 32
    keep_rounds: int = 3
    summary_tokens: int = 1024
    summary_instruction: str = SUMMARY_INSTRUCTION
    parallel_runs: int = 4

    def __post_init__(self) -> None:
        """Raises: ValueError naming the field that is out of range."""
        ranges = {
            "threshold": 0.0 < self.threshold < 1.0,
            "reserve_tokens": self.reserve_tokens >= 1,
            "max_resets": self.max_resets >= 0,
            "keep_rounds": self.keep_rounds >= 0,
            "summary_tokens": self.summary_tokens >= 1,
            "summary_instruction": bool(self.summary_instruction),
            "parallel_runs": self.parallel_runs >= 2,
        }
        for name, valid in ranges.items():
            if not valid:
                raise ValueError(f"ContextConfig.{name} = {getattr(self, name)!r} is out of range.")

    @property
    def rewrites(self) -> bool:
        """Whether the strategy ever changes a context."""
        return self.strategy not in ("none", "parallel_fewest_step")


class ManagedContext(Protocol):
    """What is managed; `text.conversation.Conversation` is one."""

    @property
    def messages(self) -> tuple[Message, ...]:
        """All that was said."""
        ...

    @property
    def context_messages(self) -> tuple[Message, ...]:
        """What is in the context."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens of the context, up to where the policy speaks."""
        ...

    def count(self, messages: Sequence[Message]) -> int:
        """Tokens that the context has after `rewrite(messages)`."""
        ...

    def rewrite(self, messages: Sequence[Message], reason: BreakReason) -> None:
        """Go on from `messages`."""
        ...


class Decision(Record):
    """What the caller does next with the conversation, and how many tokens may be drawn: 0 for an overflow."""

    kind: Literal["call", "summary", "overflow"]
    max_new_tokens: int


class ContextManager:
    """Manages one conversation. `events`: what it has done so far, for the trajectory."""

    def __init__(self, config: ContextConfig, window: int) -> None:
        """window: most tokens of a context, the completion included."""
        self.config, self.window = config, window
        self.limit = int(config.threshold * window)
        self.events: tuple[ContextEvent, ...] = ()
        self._num_resets = 0
        self._before_summary: tuple[int, tuple[Message, ...]] | None = None

    def before_call(self, conversation: ManagedContext) -> Decision:
        """Make room if there is need and a way, and say what to do. It is the policy's turn.

        Raises: ValueError while a summary is awaited.
        """
        if self._before_summary is not None:
            raise ValueError("The summary that was asked for has not been given; `take_summary` comes first.")
        config = self.config
        if conversation.num_tokens > self.limit and config.rewrites and self._num_resets < config.max_resets:
            if config.strategy == "summary":
                return self._ask_for_summary(conversation)
            self._discard(conversation)
        return self._call_or_overflow(conversation)

    def take_summary(self, conversation: ManagedContext, summary: str) -> Decision:
        """Go on from what the policy wrote when it was asked to. Raises: ValueError when it was not."""
        if self._before_summary is None:
            raise ValueError("No summary was asked for.")
        before, context = self._before_summary
        self._before_summary = None
        self._num_resets += 1
        self._rewrite(conversation, with_summary(conversation.messages, summary.strip()), "summary", before, context)
        return self._call_or_overflow(conversation)

    def _ask_for_summary(self, conversation: ManagedContext) -> Decision:
        context, before = conversation.context_messages, conversation.num_tokens
        room = min(self.config.summary_tokens, max((self.window - self.limit) // 2, 1))
        asked: tuple[Message, ...] | None = ask_for_summary(context, self.config.summary_instruction)
        if conversation.count(asked or ()) > self.window - room:
            asked = truncate_results(asked or (), self.window - room, conversation.count)
        if asked is None:
            return self._call_or_overflow(conversation)
        self._before_summary = (before, context)
        conversation.rewrite(asked, "summary")
        return Decision(kind="summary", max_new_tokens=min(self.config.summary_tokens, self._room(conversation)))

    def _discard(self, conversation: ManagedContext) -> None:
        strategy, context = self.config.strategy, conversation.context_messages
        kept = discard(strategy, context, self.config.keep_rounds, conversation.count)
        if kept != context:
            self._num_resets += 1
            reason: Reset = "discard_75" if strategy.startswith("discard_75") else "discard_all"
            self._rewrite(conversation, kept, reason, conversation.num_tokens, context)

    def _call_or_overflow(self, conversation: ManagedContext) -> Decision:
        reserve = self.config.reserve_tokens
        if self._room(conversation) < reserve and self.config.rewrites:
            context = conversation.context_messages
            cut = truncate_results(context, min(self.limit, self.window - reserve), conversation.count)
            if cut is not None and cut != context:
                self._rewrite(conversation, cut, "truncation", conversation.num_tokens, context)
        room = self._room(conversation)
        return Decision(kind="call", max_new_tokens=room) if room > 0 else Decision(kind="overflow", max_new_tokens=0)

    def _rewrite(
        self,
        conversation: ManagedContext,
        kept: tuple[Message, ...],
        reason: Reset,
        tokens_before: int,
        context: tuple[Message, ...],
    ) -> None:
        conversation.rewrite(kept, reason)
        event = ContextEvent(
            kind=reason,
            turn=sum(message.role == "assistant" for message in conversation.messages),
            tokens_before=tokens_before,
            tokens_after=conversation.num_tokens,
            num_calls_before=num_calls(context),
            num_calls_after=num_calls(kept),
        )
        self.events += (event,)

    def _room(self, conversation: ManagedContext) -> int:
        return self.window - conversation.num_tokens
