"""What the policy wrote -> reasoning, content and tool calls, whatever it wrote.

    thinking </think> content \\n\\n<block> calls </block>

Everything that was written is in exactly one place: the thinking, a call, or the content. Text that breaks the format
is content where it stands, and a `Problem` says what is wrong with it, where, and how it reads. Nothing here raises for
any text: a malformed completion is an outcome of a rollout.

A control token counts only where it was drawn as that token. Text that merely spells one - in a file that the policy
writes, say - is text, so an argument may hold the very tag that closes it. Where there are no tokens, in text from
elsewhere or for a tokenizer without them, every spelling counts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from rorqual.records import Message, Record, ToolCall
from rorqual.text.arguments import read_json, read_object, write_json
from rorqual.text.detokenize import Piece
from rorqual.text.formats import Format, ParameterTags
from rorqual.text.response import THINK_CLOSE, THINK_OPEN, split_thinking

ProblemKind = Literal[
    "unclosed_thinking",
    "malformed_thinking",
    "special_token",
    "unclosed_calls",
    "malformed_call",
    "text_after_calls",
    "bad_json",
    "unknown_tool",
]


class Problem(Record):
    """One thing that is wrong with a completion: `raw` is the text concerned, `position` where it begins.

    unclosed_thinking: no `</think>`; all is thinking. malformed_thinking: not exactly one block, where the format asks
    for one; all is content. special_token: a control token inside a text. unclosed_calls: it ends inside the block of
    calls. malformed_call: tags out of order, or an argument twice. text_after_calls: behind the block of calls.
    bad_json: an argument that should be JSON, kept as a string, or arguments as a whole, kept as they are.
    unknown_tool: the call is kept.
    `Problem(kind="unclosed_thinking", position=0, raw="4+3")`
    """

    kind: ProblemKind
    position: int
    raw: str


class Parsed(Record):
    """A message, and what is wrong with it; `text` is all of what was written, without the token that ended it."""

    message: Message
    text: str
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Grammar:
    """How to read a completion.

    opened: it begins inside the thinking. tools: names of the tools there are, None if any name will do.
    call_prefix: ids of calls are this and their index. protected: control tokens that are single tokens.
    """

    format: Format
    opened: bool
    tools: frozenset[str] | None = None
    call_prefix: str = "call_"
    protected: frozenset[str] = frozenset()


@dataclass
class Transcript:
    """Text, and where a control token was drawn as such; `controls` is None for text from elsewhere."""

    protected: frozenset[str] = frozenset()
    controls: set[int] | None = None
    text: str = ""

    @classmethod
    def of_pieces(cls, pieces: Iterable[Piece], protected: frozenset[str]) -> Transcript:
        transcript = cls(protected, controls=set())
        transcript.extend(pieces)
        return transcript

    def extend(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            if piece.is_control and self.controls is not None:
                self.controls.add(len(self.text))
            self.text += piece.text

    def holds(self, tag: str, position: int) -> bool:
        """Whether `tag` stands at `position`, its control tokens drawn as such."""
        return self.text.startswith(tag, position) and self._is_drawn(tag, position)

    def find(self, tag: str, start: int, end: int | None = None) -> int:
        """Where `tag` first stands as a whole from `start` on, -1 if nowhere."""
        position = self.text.find(tag, start, end)
        while position >= 0 and not self._is_drawn(tag, position):
            position = self.text.find(tag, position + 1, end)
        return position

    def _is_drawn(self, tag: str, position: int) -> bool:
        if self.controls is None:
            return True
        return all(position + offset in self.controls for offset in _offsets(tag, self.protected))


@lru_cache(maxsize=1024)
def _offsets(tag: str, marks: frozenset[str]) -> tuple[int, ...]:
    """Where the marks stand in a tag, in which each stands once at most."""
    return tuple(tag.index(mark) for mark in marks if mark in tag)


def parse_text(text: str, grammar: Grammar, eos: str = "") -> Parsed:
    """Parse text from elsewhere, in which every spelling of a tag counts; one `eos` at its end is left out."""
    return parse(Transcript(text=text.removesuffix(eos)), grammar)


def parse(transcript: Transcript, grammar: Grammar) -> Parsed:
    """Take a whole completion apart; the token that ended it is not part of `transcript`."""
    if grammar.format.thinking == "one_block":
        return _parse_one_block(transcript, grammar)
    text = transcript.text
    start, end, body = find_thinking(transcript, grammar)
    if end < 0:
        problems = [Problem(kind="unclosed_thinking", position=start, raw=text[start:])]
        problems += special_tokens(transcript, grammar.format.marks, start, len(text))
        return Parsed(message=Message(role="assistant", thinking=text[start:]), text=text, problems=tuple(problems))
    block = find_block(transcript, grammar, body)
    content_end = block if block >= 0 else len(text)
    problems = special_tokens(transcript, grammar.format.marks, start, end)
    problems += special_tokens(transcript, grammar.format.marks, body, content_end)
    content, calls = text[body:content_end], list[ToolCall]()
    if block >= 0:
        reader = CallReader(transcript, grammar, block)
        while call := reader.read():
            calls.append(call)
        content += text[reader.position :]
        problems += [*reader.problems, *reader.ending()]
    message = Message(role="assistant", thinking=text[start:end], content=content, tool_calls=tuple(calls))
    return Parsed(message=message, text=text, problems=tuple(problems))


def find_thinking(transcript: Transcript, grammar: Grammar) -> tuple[int, int, int]:
    """(start, end, body): where the thinking begins and ends, and what follows begins; end is -1 while it is open."""
    start = 0
    if not grammar.opened:
        if not (grammar.format.policy_opens_thinking and transcript.holds(THINK_OPEN, 0)):
            return 0, 0, 0
        start = len(THINK_OPEN)
    end = transcript.find(THINK_CLOSE, start)
    return start, end, end + len(THINK_CLOSE)


def find_block(transcript: Transcript, grammar: Grammar, start: int) -> int:
    """Where the block of calls opens from `start` on; -1 if nowhere."""
    return transcript.find(grammar.format.calls.block_open, start) if grammar.format.calls else -1


def special_tokens(transcript: Transcript, marks: Collection[str], start: int, end: int) -> list[Problem]:
    """A problem for each of `marks` that stands in the text from `start` to `end`, in their order."""
    found = []
    for mark in marks:
        position = transcript.find(mark, start, end)
        while position >= 0:
            found.append(Problem(kind="special_token", position=position, raw=mark))
            position = transcript.find(mark, position + len(mark), end)
    return sorted(found, key=lambda problem: problem.position)


def _parse_one_block(transcript: Transcript, grammar: Grammar) -> Parsed:
    """Thinking counts only as one well-formed block at the start; else the content is all of the text, the `<think>` of
    the prompt included, so that `join_thinking` gives what a reward has to judge."""
    text = (THINK_OPEN if grammar.opened else "") + transcript.text
    problems = special_tokens(transcript, grammar.format.marks, 0, len(transcript.text))
    parts = split_thinking(text)
    if parts is None or not parts[0]:
        if parts is None and (THINK_OPEN in text or THINK_CLOSE in text):
            problems.insert(0, Problem(kind="malformed_thinking", position=0, raw=transcript.text))
        message = Message(role="assistant", content=text)
    else:
        message = Message(role="assistant", thinking=parts[0], content=parts[1])
    return Parsed(message=message, text=transcript.text, problems=tuple(problems))


# ------------------------------------------------------------------------------------------------------------- calls


class CallReader:
    """Reads a block of calls that opens at `position`, call by call, also while its text still grows.

    position: start of what is not read yet: behind the last whole call, or behind the block. problems: of whole calls.
    state: "closed" behind the block's last tag, "broken" where no continuation could make the block well formed.
    """

    def __init__(self, transcript: Transcript, grammar: Grammar, position: int) -> None:
        if grammar.format.calls is None:
            raise ValueError(f"The format {grammar.format.name} has no calls to read.")
        self.position = position
        self.state: Literal["reading", "closed", "broken"] = "reading"
        self.problems: list[Problem] = []
        self._transcript, self._grammar, self._tags = transcript, grammar, grammar.format.calls
        self._marks = tuple(
            mark for mark in grammar.format.marks if mark in self._tags.call_open + self._tags.call_close
        )
        self._num_calls = 0

    def read(self) -> ToolCall | None:
        """The next whole call; None when the text ends before it, and when the block is over."""
        if self.state != "reading":
            return None
        cursor = _Cursor(self._transcript, self.position)
        tags = self._tags
        try:
            if self._num_calls == 0:
                cursor.take(tags.block_open)
                cursor.take(tags.call_open)
            elif cursor.take(tags.separator + tags.call_open, tags.block_close) == tags.block_close:
                self.state, self.position = "closed", cursor.position
                return None
            call, problems = self._call(cursor)
        except _EndOfTextError:
            return None
        except _BrokenError:
            self.state = "broken"
            return None
        self.position = cursor.position
        self._num_calls += 1
        self.problems += problems
        return call

    def ending(self) -> list[Problem]:
        """What is wrong with the text behind the calls, once no more of it comes."""
        rest = self._transcript.text[self.position :]
        kinds: dict[str, ProblemKind] = {"reading": "unclosed_calls", "broken": "malformed_call"}
        if self.state == "closed" and not rest:
            return []
        return [Problem(kind=kinds.get(self.state, "text_after_calls"), position=self.position, raw=rest)]

    def _call(self, cursor: _Cursor) -> tuple[ToolCall, list[Problem]]:
        start = cursor.position
        name, _ = cursor.until(self._tags.arguments, self._marks)
        problems = list[Problem]()
        if self._grammar.tools is not None and name not in self._grammar.tools:
            problems.append(Problem(kind="unknown_tool", position=start, raw=name))
        if self._tags.parameters is None:
            arguments, position = cursor.until(self._tags.call_close, self._marks)
            problems += _json_problem(read_object, arguments, position)
        else:
            arguments, found = self._parameters(cursor, self._tags.parameters)
            problems += found
        identity = f"{self._grammar.call_prefix}{self._num_calls}"
        return ToolCall(id=identity, name=name, arguments=arguments), problems

    def _parameters(self, cursor: _Cursor, tags: ParameterTags) -> tuple[str, list[Problem]]:
        """JSON text put together from values as they were written, so that a number keeps its spelling."""
        values: dict[str, str] = {}
        problems = list[Problem]()
        opening = tags.open
        while cursor.take(opening, self._tags.call_close) == opening:
            name, _ = cursor.until(tags.kind, self._marks)
            if name in values:
                raise _BrokenError
            is_string = cursor.take("true" + tags.value, "false" + tags.value).startswith("true")
            text, position = cursor.until(tags.close, self._marks)
            marks = self._grammar.format.marks
            problems += special_tokens(self._transcript, marks, position, position + len(text))
            wrong = [] if is_string else _json_problem(read_json, text, position)
            problems += wrong
            values[name] = write_json(text) if is_string or wrong else text
            opening = tags.separator + tags.open
        return "{" + ", ".join(f"{write_json(name)}: {value}" for name, value in values.items()) + "}", problems


class _EndOfTextError(Exception):
    """The text ends where a well-formed one could go on."""


class _BrokenError(Exception):
    """No continuation makes the text well formed."""


@dataclass
class _Cursor:
    """A place in a transcript that moves forward over what is expected there."""

    transcript: Transcript
    position: int

    def take(self, *tags: str) -> str:
        """Step over that one of `tags` that stands here."""
        for tag in tags:
            if self.transcript.holds(tag, self.position):
                self.position += len(tag)
                return tag
        rest = self.transcript.text[self.position :] if self._is_near_end(tags) else None
        if rest is not None and any(tag.startswith(rest) and tag != rest for tag in tags):
            raise _EndOfTextError
        raise _BrokenError

    def until(self, tag: str, marks: Collection[str]) -> tuple[str, int]:
        """The text before the next `tag`, and where it begins; steps over both.

        One of `marks` before the tag means that a tag is missing, and that the text would reach too far.
        """
        start, end = self.position, self.transcript.find(tag, self.position)
        stop = end if end >= 0 else len(self.transcript.text)
        for mark in marks:
            position = self.transcript.find(mark, start, stop)
            if position >= 0 and not (end < 0 and self._may_become(tag, mark, position)):
                raise _BrokenError
        if end < 0:
            raise _EndOfTextError
        self.position = end + len(tag)
        return self.transcript.text[start:end], start

    def _may_become(self, tag: str, mark: str, position: int) -> bool:
        """Whether `tag`, of which `mark` at `position` is a part, may be what the text ends within."""
        begin = position - tag.find(mark)
        return mark in tag and begin >= self.position and tag.startswith(self.transcript.text[begin:])

    def _is_near_end(self, tags: Collection[str]) -> bool:
        return len(self.transcript.text) - self.position <= max(map(len, tags))


def _json_problem(read: Callable[[str], object], text: str, position: int) -> list[Problem]:
    try:
        read(text)
    except ValueError:
        return [Problem(kind="bad_json", position=position, raw=text)]
    return []
