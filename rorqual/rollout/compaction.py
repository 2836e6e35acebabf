"""What becomes of the messages of a context that has grown too long: pure functions, messages -> shorter messages.

A round is a message of the policy that calls tools, with all of its results: it stays whole or goes whole, its thinking
with it. Nothing else is dropped, so the system message and the first user turn always stay; a summary also keeps the
last user turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from rorqual.records import Message
from rorqual.text.retention import USER_ROLES

Strategy = Literal[
    "none",
    "summary",
    "discard_75",
    "discard_75_messages",
    "discard_75_tokens",
    "discard_all",
    "discard_all_results",
    "discard_all_actions",
    "discard_all_recent",
    "parallel_fewest_step",
]
"""The published strategies, and each published reading of those that are ambiguous.

    none                    nothing is ever left out
    summary                 the policy summarises; it goes on from the first and the last user turn and its summary
    discard_75              the oldest rounds go, until three quarters of the *calls* are gone
    discard_75_messages     ... of the messages of rounds
    discard_75_tokens       ... of the tokens of rounds
    discard_all             all rounds go: system, question, and go on
    discard_all_results     calls and thinking stay, the text of results goes ("drop observations")
    discard_all_actions     calls and results go, what was thought and said around them stays, as notes
    discard_all_recent      all rounds but the newest `keep_rounds` go
    parallel_fewest_step    nothing is left out; of several runs, the one with the fewest steps counts
"""

Count = Callable[[Sequence[Message]], int]
"""The tokens of a context."""

LEFT_OUT = "[left out]"
NOTES_HEADING = "\n\nYour notes so far:\n"
SUMMARY_HEADING = "\n\nA summary of your work so far:\n"
DISCARDED_SHARE = 0.75


def discard(strategy: Strategy, messages: Sequence[Message], keep_rounds: int, count: Count) -> tuple[Message, ...]:
    """`messages` without what the strategy leaves out; equal to `messages` where there is nothing to leave out.

    Raises: ValueError for a strategy that does not discard.
    """
    rounds = find_rounds(messages)
    if strategy == "discard_all":
        return _without(messages, rounds)
    if strategy == "discard_all_recent":
        return _without(messages, rounds[: max(len(rounds) - keep_rounds, 0)])
    if strategy == "discard_all_results":
        return _without_results(messages, rounds)
    if strategy == "discard_all_actions":
        return _with_notes(messages, rounds)
    if strategy in ("discard_75", "discard_75_messages", "discard_75_tokens"):
        return _without(messages, rounds[: _oldest_three_quarters(strategy, messages, rounds, count)])
    raise ValueError(f"Strategy {strategy!r} discards nothing.")


def find_rounds(messages: Sequence[Message]) -> list[range]:
    """The places of each round, oldest first."""
    rounds = []
    for start, message in enumerate(messages):
        if message.role == "assistant" and message.tool_calls:
            end = start + 1
            while end < len(messages) and messages[end].role == "tool":
                end += 1
            rounds.append(range(start, end))
    return rounds


def num_calls(messages: Sequence[Message]) -> int:
    return sum(len(message.tool_calls) for message in messages)


# --------------------------------------------------------------------------------------------------------- summaries


def ask_for_summary(messages: Sequence[Message], instruction: str) -> tuple[Message, ...]:
    """The context in which the policy writes its summary."""
    return (*messages, Message(role="user", content=instruction))


def with_summary(messages: Sequence[Message], summary: str) -> tuple[Message, ...]:
    """What the policy goes on from: `messages`, as they were before any summary, up to the first user turn, and the
    last user turn, which carries the summary."""
    turns = [index for index, message in enumerate(messages) if message.role in USER_ROLES]
    head = messages[: turns[0] + 1]
    kept = head if len(turns) == 1 else (*head, messages[turns[-1]])
    return (*kept[:-1], _carrying(kept[-1], SUMMARY_HEADING, summary))


# ------------------------------------------------------------------------------------------------------ last resort


def truncate_results(messages: Sequence[Message], most_tokens: int, count: Count) -> tuple[Message, ...] | None:
    """Cut the longest results, all to one length, so that the context has `most_tokens` at most; None if it cannot.

    Of a result, beginning and end stay. As little is cut as is found by halving the length.
    """
    lengths = [len(message.content) for message in messages if message.role == "tool"]
    shortest, longest = 0, max(lengths, default=0)
    best = None
    while shortest <= longest:
        length = (shortest + longest) // 2
        cut = tuple(_cut(message, length) for message in messages)
        if count(cut) <= most_tokens:
            best, shortest = cut, length + 1
        else:
            longest = length - 1
    return best


def _cut(message: Message, length: int) -> Message:
    """A result of at most `length` characters and the mark, or as it is."""
    if message.role != "tool" or len(message.content) <= length + len(LEFT_OUT):
        return message
    tail = length // 2
    text = message.content
    return _replaced(message, text[: length - tail] + LEFT_OUT + text[len(text) - tail :])


# ---------------------------------------------------------------------------------------------------------- discards


def _without(messages: Sequence[Message], rounds: Sequence[range]) -> tuple[Message, ...]:
    gone = {place for each in rounds for place in each}
    kept = [message for place, message in enumerate(messages) if place not in gone]
    while gone and kept and kept[-1].role == "assistant":  # the policy speaks next, so it cannot have spoken last
        kept.pop()
    return tuple(kept)


def _without_results(messages: Sequence[Message], rounds: Sequence[range]) -> tuple[Message, ...]:
    results = {place for each in rounds for place in each[1:] if len(messages[place].content) > len(LEFT_OUT)}
    return tuple(
        _replaced(message, LEFT_OUT) if place in results else message for place, message in enumerate(messages)
    )


def _with_notes(messages: Sequence[Message], rounds: Sequence[range]) -> tuple[Message, ...]:
    said = [text.strip() for each in rounds for text in (messages[each[0]].thinking, messages[each[0]].content)]
    notes = "\n".join(text for text in said if text)
    kept = _without(messages, rounds)
    last = max((place for place, message in enumerate(kept) if message.role in USER_ROLES), default=None)
    if last is None or not notes:
        return kept
    heading = "\n" if NOTES_HEADING in kept[last].content else NOTES_HEADING
    return (*kept[:last], _carrying(kept[last], heading, notes), *kept[last + 1 :])


def _oldest_three_quarters(
    strategy: Strategy, messages: Sequence[Message], rounds: Sequence[range], count: Count
) -> int:
    """The fewest of the oldest rounds that hold three quarters of what all rounds hold; parallel calls go together."""

    def held(rounds: Sequence[range]) -> int:
        if strategy == "discard_75":
            return sum(len(messages[each[0]].tool_calls) for each in rounds)
        if strategy == "discard_75_messages":
            return sum(len(each) for each in rounds)
        return whole - count(_without(messages, rounds)) if rounds else 0

    whole = count(messages) if strategy == "discard_75_tokens" else 0
    enough = DISCARDED_SHARE * held(rounds)
    few, many = 0, len(rounds)
    while few < many:
        middle = (few + many) // 2
        if held(rounds[:middle]) >= enough:
            many = middle
        else:
            few = middle + 1
    return few


def _carrying(message: Message, heading: str, text: str) -> Message:
    return _replaced(message, message.content + heading + text)


def _replaced(message: Message, content: str) -> Message:
    return msgspec.structs.replace(message, content=content)
