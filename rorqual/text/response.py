"""What a policy wrote, taken apart: `<think>` block, then one answer, in `<answer>` tags or in `\\boxed{}`.

The rules are strict, because a reward stands on them: a tag that occurs twice, out of order or unclosed makes its part
malformed, and a malformed part is None, never a guess.
"""

from __future__ import annotations

import re

from rorqual.records import Message, Record

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"

_BOXED = re.compile(r"\\boxed\s*\{")


class Response(Record):
    """The parts of one response.

    thinking: text inside the one think block, unchanged; None without exactly one well-formed block at the start.
    answer: text of the one answer, stripped; None when there is none, more than one, or an empty one.
    well_formed: a think block, then one answer; around `<answer>` tags nothing but white space.
    `Response(thinking="4+3=7", answer="7", well_formed=True)` comes from `<think>4+3=7</think> <answer>7</answer>`.
    """

    thinking: str | None
    answer: str | None
    well_formed: bool


def parse_response(text: str) -> Response:
    """Take `text` apart. The answer is sought after the think block; in all of a text that has no think tag."""
    parts = split_thinking(text)
    if parts is None:
        has_tag = THINK_OPEN in text or THINK_CLOSE in text
        return Response(thinking=None, answer=None if has_tag else find_answer(text), well_formed=False)
    thinking, rest = parts
    answer = find_answer(rest)
    tagged = ANSWER_OPEN in rest
    tidy = not tagged or (rest.strip().startswith(ANSWER_OPEN) and rest.strip().endswith(ANSWER_CLOSE))
    return Response(thinking=thinking, answer=answer, well_formed=answer is not None and tidy)


def split_thinking(text: str) -> tuple[str, str] | None:
    """(thinking, rest) if `text` starts, white space aside, with its one think block; else None."""
    if text.count(THINK_OPEN) != 1 or text.count(THINK_CLOSE) != 1:
        return None
    before, _, after = text.partition(THINK_OPEN)
    thinking, close, rest = after.partition(THINK_CLOSE)
    return (thinking, rest) if close and not before.strip() else None


def join_thinking(message: Message) -> str:
    """The text that a message was parsed from, white space before its think block aside."""
    return f"{THINK_OPEN}{message.thinking}{THINK_CLOSE}{message.content}" if message.thinking else message.content


def find_answer(text: str) -> str | None:
    """The one answer in `text`: in `<answer>` tags if it has such a tag, else in `\\boxed{}`; None unless just one."""
    if ANSWER_OPEN in text or ANSWER_CLOSE in text:
        if text.count(ANSWER_OPEN) != 1 or text.count(ANSWER_CLOSE) != 1:
            return None
        _, _, after = text.partition(ANSWER_OPEN)
        answer, close, _ = after.partition(ANSWER_CLOSE)
        return answer.strip() or None if close else None
    return find_boxed(text)


def find_boxed(text: str) -> str | None:
    """Content of the one `\\boxed{...}` in `text`, nested braces included; None unless there is exactly one, closed."""
    starts = [match.end() for match in _BOXED.finditer(text)]
    if len(starts) != 1:
        return None
    depth, position = 1, starts[0]
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 2  # an escaped brace is a character of the answer, not a bracket
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[starts[0] : position].strip() or None
        position += 1
    return None
