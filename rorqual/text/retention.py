"""Which past thinking stays in the context.

    since_last_user   what was thought since the last user or developer message: DeepSeek-V3.2's rule
    all               everything that was thought
    none              nothing but what the policy has just said, or is about to say

Content, calls and results always stay. A rule that drops something rewrites the context, so it ends a segment:
`since_last_user` when a user message arrives, `none` when anything arrives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rorqual.records import Message

Retention = Literal["since_last_user", "all", "none"]

USER_ROLES = ("user", "developer")
"""Roles that begin a user turn."""


def kept_thinking(retention: Retention, messages: Sequence[Message]) -> list[bool]:
    """For each message, and for the one that the policy says next: whether its thinking is in the context.

    One entry more than there are messages. `since_last_user` on user, assistant, user, assistant gives
    [False, False, False, True, True].
    """
    count = len(messages)
    if retention == "all":
        return [True] * (count + 1)
    if retention == "none":
        return [index + 1 == count and messages[index].role == "assistant" for index in range(count)] + [True]
    last_user = max((i for i, message in enumerate(messages) if message.role in USER_ROLES), default=-1)
    return [index > last_user for index in range(count + 1)]


def rewrites_context(retention: Retention, arriving: Sequence[Message]) -> bool:
    """Whether thinking that is in the context must leave it when `arriving` follows what the policy said."""
    if retention == "since_last_user":
        return any(message.role in USER_ROLES for message in arriving)
    return retention == "none" and bool(arriving)
