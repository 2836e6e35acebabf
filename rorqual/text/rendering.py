"""A conversation -> spans of text: what the format writes, what others wrote, what the policy said.

Spans carry who wrote them, because only a format may write control tokens: the text of a user, a tool or a schema that
spells one stays characters. The strings are those of `text.formats`; this file knows no format by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from rorqual.records import Message, ToolCall, ToolSpec
from rorqual.text.arguments import read_object, write_json
from rorqual.text.formats import CallTags, Format
from rorqual.text.response import THINK_CLOSE, THINK_OPEN, join_thinking
from rorqual.text.retention import USER_ROLES, Retention, kept_thinking


class Span(NamedTuple):
    """A piece of text and who wrote it.

    kind: "format" holds control tokens; "header" too, and is tokenised by itself; "speech" holds those that the format
    lets the policy say; "data" holds none. sampled: it is what the policy says.
    """

    text: str
    kind: Literal["format", "header", "speech", "data"]
    sampled: bool = False


@dataclass(frozen=True)
class Renderer:
    """A format with the tokens and the mode of one encoding.

    opens_thinking: the thinking mode; without it the direct headers stand everywhere. retention: see `text.retention`.
    protected: control tokens that are single tokens, so that a text that spells one is not mistaken for it.
    """

    format: Format
    bos: str
    eos: str
    opens_thinking: bool
    retention: Retention
    protected: frozenset[str] = frozenset()

    @property
    def thinks(self) -> bool:
        """Whether thinking can be in the context at all."""
        return self.format.thinking != "none" and (self.opens_thinking or self.format.policy_opens_thinking)

    def spans(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec] = (),
        response_format: Any = None,
        start: int = 0,
    ) -> Iterator[Span]:
        """The spans of `messages[start:]`, a beginning of conversation before them if `start` is 0.

        Messages before `start` are only looked at. Results that do not answer the last calls one by one are an error,
        except at the end of `messages`, where some may still be missing.
        Raises: ValueError for what the format cannot hold.
        """
        kept = kept_thinking(self.retention, messages)
        if start == 0:
            yield from self._beginning(messages, tools, response_format)
        index = start
        while index < len(messages):
            message = messages[index]
            end = index + 1
            if message.role == "tool":
                while end < len(messages) and messages[end].role == "tool":
                    end += 1
                yield from self._results(messages, index, end, kept[end])
            else:
                self._check_answered(messages, index)
                sections = self._sections(tools, response_format) if index == 0 else []
                yield from self._message(messages, index, kept, sections)
            index = end

    # ------------------------------------------------------------------------------------------------ what is told

    def _beginning(self, messages: Sequence[Message], tools: Sequence[ToolSpec], schema: Any) -> Iterator[Span]:
        if self.format.begins_with_bos:
            yield Span(self.bos, "format")
        if not messages or messages[0].role not in ("system", "developer"):
            yield from self._sections(tools, schema)

    def _sections(self, tools: Sequence[ToolSpec], schema: Any) -> list[Span]:
        spans: list[Span] = []
        if tools:
            lines = "\n".join(write_json(describe_tool(tool)) for tool in tools)
            spans += self._section(self.format.tools_section, "{tools}", lines, "no tools. Use tasks without tools")
        if schema is not None:
            words = "no response format. Ask for it in words"
            spans += self._section(self.format.schema_section, "{schema}", write_json(schema), words)
        return spans

    def _section(self, section: str, place: str, text: str, missing: str) -> list[Span]:
        if not section:
            raise ValueError(f"This encoding has {missing}, or another EncodingConfig.format.")
        before, _, after = section.partition(place)
        return [Span(self.format.section_break + before, "format"), Span(text, "data"), Span(after, "format")]

    def _message(
        self, messages: Sequence[Message], index: int, kept: Sequence[bool], sections: list[Span]
    ) -> Iterator[Span]:
        message = messages[index]
        if message.role == "assistant":
            yield from self._assistant(message, kept[index], self._is_opened(messages, index, kept))
        elif message.role == "system":
            yield Span(message.content, "data")
            yield from sections
        else:
            yield Span(self.format.user, "format")
            if message.role == "developer":
                yield from self._developer(message, sections)
            yield Span(message.content, "data")
            followed = index + 1 < len(messages) and messages[index + 1].role in USER_ROLES
            if not (followed and self.format.joins_user_messages):
                yield Span(self.format.assistant, "format")
                yield from self._header(
                    self.format.user_header.thinking, self.format.user_header.direct, kept[index + 1]
                )

    def _developer(self, message: Message, sections: list[Span]) -> Iterator[Span]:
        if not self.format.developer:
            raise ValueError("This encoding has no developer messages. Use a system message.")
        if not message.content:
            raise ValueError("A developer message is empty; it is a turn of the user and needs text.")
        yield from sections
        yield Span(self.format.developer, "format")

    def _header(self, thinking: str, direct: str, kept: bool) -> Iterator[Span]:
        text = thinking if self.opens_thinking and kept else direct
        tag_at = len(text) - len(text.lstrip("\n"))
        if text[:tag_at]:
            yield Span(text[:tag_at], "format")
        if text[tag_at:]:
            yield Span(text[tag_at:], "header")

    # ------------------------------------------------------------------------------------------------- what is said

    def _is_opened(self, messages: Sequence[Message], index: int, kept: Sequence[bool]) -> bool:
        """Whether the header before the message holds the opening tag of its thinking."""
        after_results = index > 0 and messages[index - 1].role == "tool"
        header = self.format.results_header if after_results else self.format.user_header
        return self.opens_thinking and kept[index] and THINK_OPEN in header.thinking

    def _assistant(self, message: Message, kept: bool, opened: bool) -> Iterator[Span]:
        """Sampled is what can be learned from: a message whose thinking was dropped is not as it was said."""
        sampled = kept if self.thinks else not message.thinking
        for span in self._spoken(message, kept and self.thinks, opened):
            yield span._replace(sampled=sampled)
        yield Span(self.eos, "format", sampled)

    def _spoken(self, message: Message, kept: bool, opened: bool) -> Iterator[Span]:
        if self.format.thinking == "one_block":
            text = join_thinking(message) if kept else message.content
            if opened:  # the header already holds the opening tag
                text = text.removeprefix(THINK_OPEN) if text.startswith(THINK_OPEN) else THINK_CLOSE + text
            yield Span(text, "speech")
        else:
            if kept and (opened or message.thinking):
                yield Span("" if opened else THINK_OPEN, "format")
                yield Span(message.thinking, "data")
                yield Span(THINK_CLOSE, "format")
            yield Span(message.content, "data")
        if message.tool_calls:
            yield from self._calls(message.tool_calls)

    def _calls(self, calls: Sequence[ToolCall]) -> Iterator[Span]:
        tags = self.format.calls
        if tags is None:
            raise ValueError("This encoding has no tool calls. Use tasks without tools.")
        for index, call in enumerate(calls):
            self._check_spelling(call.name, tags.arguments, "name")
            yield Span(tags.separator if index else tags.block_open, "format")
            yield Span(tags.call_open, "format")
            yield Span(call.name, "data")
            yield Span(tags.arguments, "format")
            yield from self._arguments(call, tags)
            yield Span(tags.call_close, "format")
        yield Span(tags.block_close, "format")

    def _arguments(self, call: ToolCall, tags: CallTags) -> Iterator[Span]:
        if tags.parameters is None:
            self._check_spelling(call.arguments, tags.call_close, "arguments")
            yield Span(call.arguments, "data")
            return
        try:
            arguments = read_object(call.arguments)
        except ValueError as error:
            raise ValueError(
                f"The arguments of call {call.id} cannot be written, {error}: give a JSON object."
            ) from error
        for index, (name, value) in enumerate(arguments.items()):
            is_string = isinstance(value, str)
            text = value if is_string else write_json(value)
            self._check_spelling(name, tags.parameters.kind, "argument name")
            self._check_spelling(text, tags.parameters.close, "argument")
            yield Span((tags.parameters.separator if index else "") + tags.parameters.open, "format")
            yield Span(name, "data")
            yield Span(tags.parameters.kind + ("true" if is_string else "false") + tags.parameters.value, "format")
            yield Span(text, "data")
            yield Span(tags.parameters.close, "format")

    def _check_spelling(self, text: str, tag: str, what: str) -> None:
        """Refuse a text that would end early when it is read, because it spells the tag behind it."""
        is_protected = any(mark in tag for mark in self.protected)
        if not is_protected and (text + tag).find(tag) < len(text):
            raise ValueError(
                f"The {what} {text[:80]!r} of a call spells {tag!r}, which would end it. The format has no escape: use "
                "another text, or a tokenizer with the format's control tokens."
            )

    # --------------------------------------------------------------------------------------------------- tool results

    def _results(self, messages: Sequence[Message], first: int, end: int, kept: bool) -> Iterator[Span]:
        tags = self.format.results
        if tags is None:
            raise ValueError("This encoding has no tool messages. Use tasks without tools.")
        calls = messages[first - 1].tool_calls if first and messages[first - 1].role == "assistant" else ()
        ordered = match_results(calls, messages[first:end])
        if len(ordered) < len(calls) and end < len(messages):
            raise ValueError(_missing(calls, ordered))
        for index, result in enumerate(ordered):
            yield Span(tags.separator if index else tags.block_open, "format")
            yield Span(tags.result_open, "format")
            yield Span(result.content, "data")
            yield Span(tags.result_close, "format")
        if len(ordered) == len(calls):
            yield Span(tags.block_close, "format")
            yield from self._header(self.format.results_header.thinking, self.format.results_header.direct, kept)

    def _check_answered(self, messages: Sequence[Message], index: int) -> None:
        before = messages[index - 1] if index else None
        if before is not None and before.role == "assistant" and before.tool_calls:
            raise ValueError(_missing(before.tool_calls, ()))


def match_results(calls: Sequence[ToolCall], results: Sequence[Message]) -> list[Message]:
    """The results in the order of the calls that they name.

    Raises: ValueError for a result without an id, of no such call, or of one that has a result already, and for calls
    that share an id.
    """
    order = {call.id: index for index, call in enumerate(calls)}
    if len(order) < len(calls):
        raise ValueError(f"Calls of one message share an id: {[call.id for call in calls]}. Give each its own.")
    found: dict[int, Message] = {}
    for result in results:
        if result.tool_call_id not in order:
            raise ValueError(
                f"A tool message answers call {result.tool_call_id!r}; the calls before it are {list(order)}. Name "
                "one of them in tool_call_id."
            )
        if found.setdefault(order[result.tool_call_id], result) is not result:
            raise ValueError(f"Call {result.tool_call_id!r} has two results. Give one for each call.")
    return [found[index] for index in sorted(found)]


def describe_tool(tool: ToolSpec) -> dict[str, Any]:
    """A tool as one JSON object, in the order that DeepSeek's own examples have; an empty description is left out."""
    description = {"description": tool.description} if tool.description else {}
    return {"name": tool.name, **description, "parameters": tool.parameters}


def _missing(calls: Sequence[ToolCall], results: Sequence[Message]) -> str:
    answered = {result.tool_call_id for result in results}
    missing = [call.id for call in calls if call.id not in answered]
    return f"Calls {missing} have no result. Give one for each call before anything else is said; an error is one too."
