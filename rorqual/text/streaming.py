"""The parser of text that is still being written: what is certain is given at once, as deltas.

Joined deltas are what `parsing.parse` makes of the whole text, wherever the text was cut. So a delta never takes back
an earlier one, and text that may still turn out to be a tag waits. A call is given when it is whole. A format that
judges the thinking as one block cannot know before the end whether it is thinking; there, such a text comes at the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from rorqual.records import Record, ToolCall
from rorqual.text.detokenize import Detokenizer, Piece
from rorqual.text.parsing import CallReader, Grammar, Parsed, Transcript, find_block, find_thinking, parse
from rorqual.text.response import THINK_CLOSE, THINK_OPEN
from rorqual.text.tokenizer import Tokenizer


class Delta(Record):
    """What became certain: more thinking, more content, whole calls."""

    thinking: str = ""
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.thinking or self.content or self.tool_calls)


class StreamParser:
    """Feed it pieces of text, then `finish`. `eos` is left out where text from elsewhere ends with it."""

    def __init__(self, grammar: Grammar, transcript: Transcript | None = None, eos: str = "") -> None:
        self._grammar = grammar
        self._transcript = transcript or Transcript()
        self._eos = eos
        self._state: Literal["start", "thinking", "content", "calls", "rest"] = "start"
        self._position = 0
        self._searched = 0
        self._reader: CallReader | None = None
        self._given: list[Delta] = []

    def feed_text(self, text: str) -> Delta:
        """What `text` makes certain."""
        return self.feed([Piece(text, False)])

    def feed(self, pieces: Iterable[Piece]) -> Delta:
        """What `pieces` make certain."""
        self._transcript.extend(pieces)
        found: list[Delta] = []
        while self._advance(found):
            pass
        delta = join_deltas(found)
        if delta:
            self._given.append(delta)
        return delta

    def finish(self) -> tuple[Delta, Parsed]:
        """The last delta, and the whole: nothing follows.

        Raises: AssertionError when the deltas so far are not the beginning of the whole; it never does.
        """
        self._transcript.text = self._transcript.text.removesuffix(self._eos)
        parsed = parse(self._transcript, self._grammar)
        said, given = parsed.message, join_deltas(self._given)
        if not (
            said.thinking.startswith(given.thinking)
            and said.content.startswith(given.content)
            and said.tool_calls[: len(given.tool_calls)] == given.tool_calls
        ):
            raise AssertionError(f"The deltas {given} are not the beginning of {said}.")
        last = Delta(
            thinking=said.thinking[len(given.thinking) :],
            content=said.content[len(given.content) :],
            tool_calls=said.tool_calls[len(given.tool_calls) :],
        )
        return last, parsed

    # ------------------------------------------------------------------------------------------------------ states

    def _advance(self, found: list[Delta]) -> bool:
        """One state further; False when more text is needed."""
        steps = {
            "start": self._start,
            "thinking": self._thinking,
            "content": self._content,
            "calls": self._calls,
            "rest": self._rest,
        }
        return steps[self._state](found)

    def _start(self, found: list[Delta]) -> bool:
        text = self._transcript.text
        if self._grammar.format.thinking == "one_block":
            begun = text.lstrip()
            if self._grammar.opened or THINK_OPEN.startswith(begun) or begun.startswith(THINK_OPEN):
                return False
            self._state = "rest"
            return True
        may_open = not self._grammar.opened and self._grammar.format.policy_opens_thinking
        if may_open and THINK_OPEN.startswith(text) and text != THINK_OPEN:
            return False
        start, end, body = find_thinking(self._transcript, self._grammar)
        self._state = "content" if end == body else "thinking"
        self._position = self._searched = start
        return True

    def _thinking(self, found: list[Delta]) -> bool:
        end = self._transcript.find(THINK_CLOSE, self._searched)
        if end < 0:
            found.append(Delta(thinking=self._take(self._certain(THINK_CLOSE))))
            return False
        found.append(Delta(thinking=self._take(end)))
        self._position = self._searched = end + len(THINK_CLOSE)
        self._state = "content"
        return True

    def _content(self, found: list[Delta]) -> bool:
        calls = self._grammar.format.calls
        block = find_block(self._transcript, self._grammar, self._searched)
        if block < 0:
            found.append(Delta(content=self._take(self._certain(calls.block_open if calls else ""))))
            return False
        found.append(Delta(content=self._take(block)))
        self._reader = CallReader(self._transcript, self._grammar, block)
        self._state = "calls"
        return True

    def _calls(self, found: list[Delta]) -> bool:
        reader, calls = self._reader, self._grammar.format.calls
        if reader is None or calls is None:
            raise AssertionError("unreachable: the block of calls is open")
        if not self._may_be_whole(reader, calls.call_close, calls.block_close):
            return False
        while call := reader.read():
            found.append(Delta(tool_calls=(call,)))
        self._position = reader.position
        if reader.state == "reading":
            return False
        self._state = "rest"
        return True

    def _may_be_whole(self, reader: CallReader, *tags: str) -> bool:
        """Whether a closing tag has come since the last look; without one there is nothing new to read."""
        start = max(self._searched, reader.position)
        self._searched = max(start, len(self._transcript.text) - max(map(len, tags)))
        return any(self._transcript.text.find(tag, start) >= 0 for tag in tags)

    def _rest(self, found: list[Delta]) -> bool:
        found.append(Delta(content=self._take(self._certain(""))))
        return False

    def _take(self, end: int) -> str:
        """The text up to `end`, which is now given."""
        text = self._transcript.text[self._position : end]
        self._position = max(self._position, end)
        self._searched = self._position
        return text

    def _certain(self, tag: str) -> int:
        """Where the text ends that cannot be the beginning of `tag`, nor of the token that ends it."""
        text = self._transcript.text
        if self._eos and text.endswith(self._eos):
            return len(text) - len(self._eos)
        return len(text) - max(_overlap(text, tag), _overlap(text, self._eos))


class TokenStream:
    """The same for token ids as they are drawn. A stop token is left out where it is the last."""

    def __init__(self, tokenizer: Tokenizer, grammar: Grammar, silent_stops: frozenset[int]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._parser = StreamParser(grammar, Transcript(grammar.protected, controls=set()))
        self._silent_stops = silent_stops
        self._held: list[int] = []

    def feed(self, ids: Iterable[int]) -> Delta:
        """What `ids` make certain."""
        waiting = [*self._held, *ids]
        self._held = waiting[-1:] if waiting and waiting[-1] in self._silent_stops else []
        return self._parser.feed(self._detokenizer.feed(waiting[: len(waiting) - len(self._held)]))

    def finish(self) -> tuple[Delta, Parsed]:
        """The last delta, and the whole."""
        before = self._parser.feed(self._detokenizer.finish())
        last, parsed = self._parser.finish()
        return join_deltas([before, last]), parsed


def join_deltas(deltas: Iterable[Delta]) -> Delta:
    """One delta that says what several say."""
    parts = list(deltas)
    return Delta(
        thinking="".join(each.thinking for each in parts),
        content="".join(each.content for each in parts),
        tool_calls=tuple(call for each in parts for call in each.tool_calls),
    )


def _overlap(text: str, tag: str) -> int:
    """Length of the longest true beginning of `tag` that `text` ends with."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:size])), 0)
