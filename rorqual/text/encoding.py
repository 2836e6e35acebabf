"""Messages -> token ids with the mask of what was said, and what the policy wrote -> a message.

    <bos> system [tools] <user> question <assistant> [<think>]    a prompt; what follows is sampled
    results, <user> question <assistant> [<think>]                what is appended to the ids that were sampled

The strings are those of a format (`text.formats`). `render` gives text, ids and mask of any conversation at once; text
that was sampled is never tokenised again, so `follow_up` gives only what comes behind it (`text.conversation`).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from rorqual.records import IntArray, Message, Record, ToolCall, ToolSpec
from rorqual.text.detokenize import Detokenizer
from rorqual.text.formats import FORMATS, Format, template_format
from rorqual.text.parsing import Grammar, Parsed, Transcript, parse
from rorqual.text.rendering import Renderer, Span
from rorqual.text.response import THINK_OPEN
from rorqual.text.retention import USER_ROLES, Retention, rewrites_context
from rorqual.text.streaming import TokenStream
from rorqual.text.tokenizer import SPECIAL_TOKENS, Tokenizer


class EncodingConfig(Record):
    """How a conversation becomes tokens.

    format: a name in `text.formats.FORMATS`. open_thinking: the thinking mode; the prompt ends with the format's
    thinking header, so that the policy starts inside its reasoning. retention: which past thinking stays; None is the
    format's own rule. template: text with `{question}` in place of a format, for a base model; one turn only.
    stop: further special tokens, by their text, that end a completion as the end-of-sentence token does.
    """

    format: str = "chat"
    open_thinking: bool = False
    retention: Retention | None = None
    template: str = ""
    stop: tuple[str, ...] = ()


class Rendered(Record):
    """A conversation in full. `sampled` is 1 on what the assistant says and can be learned from; ids and flags are
    one each a token. A message whose thinking was left out is 0: it was not said in this context."""

    text: str
    token_ids: IntArray
    sampled: IntArray


class Encoding:
    """Renders and parses for one tokenizer and one config."""

    def __init__(self, tokenizer: Tokenizer, config: EncodingConfig | None = None) -> None:
        """Raises: ValueError for an unknown format, a tokenizer without a token that is needed, a template without
        `{question}`, or a thinking mode for a format that has none."""
        self.tokenizer = tokenizer
        self.config = config or EncodingConfig()
        self.format = _format(self.config, tokenizer)
        if self.config.open_thinking and THINK_OPEN not in self.format.user_header.thinking:
            raise ValueError(f"The format {self.format.name} has no thinking mode. Leave open_thinking out.")
        names = tokenizer.special_tokens
        controls = frozenset(tokenizer.control_tokens.values())
        self._protected = controls & {*self.format.marks, *self.format.spoken}
        self._renderer = Renderer(
            format=self.format,
            bos=names.get("bos", ""),
            eos=names.get("eos", ""),
            opens_thinking=self.config.open_thinking,
            retention=self.config.retention or self.format.retention,
            protected=self._protected,
        )
        self._format_parts: dict[str, list[str | int]] = {}
        self.stop_token_ids = (tokenizer.special_id("eos"), *map(self._stop_id, self.config.stop))
        self._silent_stops = frozenset(
            index for index in self.stop_token_ids if tokenizer.control_tokens.get(index) not in self.format.spoken
        )

    # ------------------------------------------------------------------------------------------- messages -> tokens

    def render(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), response_format: Any = None
    ) -> Rendered:
        """Text, ids and mask of a conversation, whoever speaks last. `response_format` is a JSON schema.

        Tools and schema stand in the leading system or developer message; without one, in an empty system message.
        Raises: ValueError for what the format cannot hold: see `text.rendering`.
        """
        if self.format.single_turn:
            _check_single_turn(messages)
        spans = [span for span in self._renderer.spans(messages, tools, response_format) if span.text]
        ids, sampled = self._ids(spans)
        return Rendered(text="".join(span.text for span in spans), token_ids=ids, sampled=sampled)

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), response_format: Any = None
    ) -> array[int]:
        """Ids of a conversation up to where the policy speaks; it must end with a user message or all results.

        Raises: ValueError as `render` does, for an empty conversation, and for one that ends otherwise.
        """
        if self.format.single_turn and len(messages) != 1:
            _refuse_turns(messages)
        _check_turn(messages)
        return self.render(messages, tools, response_format).token_ids

    def follow_up(self, messages: Sequence[Message], last_token_id: int, calls: Sequence[ToolCall] = ()) -> array[int]:
        """Ids that come between what was sampled last, which ended with `last_token_id`, and the policy's next turn.

        messages: results for all of the policy's `calls`, user messages, or both in this order. Whether what was
        sampled may stay as it is, `rewrites` says.
        Raises: ValueError in template mode, for no message at all, and for messages that cannot follow.
        """
        if self.format.single_turn:
            raise ValueError("A template holds one turn. Leave EncodingConfig.template empty for several turns.")
        num_results = next((i for i, message in enumerate(messages) if message.role != "tool"), len(messages))
        wrong = any(message.role not in USER_ROLES for message in messages[num_results:])
        if not messages or wrong or (num_results and not calls):
            follows = "results, then user messages" if calls else "user messages"
            raise ValueError(f"Only {follows} can follow, got {[message.role for message in messages]}.")
        whole = [Message(role="assistant", tool_calls=tuple(calls)), *messages]
        _check_turn(whole)
        ended = last_token_id == self.tokenizer.special_id("eos")
        closing = [] if ended else [Span(self._renderer.eos, "format")]
        return self._ids([*closing, *self._renderer.spans(whole, start=1)])[0]

    def rewrites(self, arriving: Sequence[Message]) -> bool:
        """Whether `arriving` makes past thinking leave the context, so that it must be rendered anew."""
        return self._renderer.thinks and rewrites_context(self._renderer.retention, arriving)

    # ------------------------------------------------------------------------------------------- tokens -> messages

    def parse(
        self,
        completion_ids: Sequence[int],
        tools: Sequence[ToolSpec] | None = None,
        after_results: bool = False,
        call_prefix: str = "call_",
    ) -> Parsed:
        """What the policy wrote, as a message with what is wrong with it. Never raises.

        tools: those there are; a call of another is a problem, with None no call is. after_results: the completion
        follows tool results, where some formats have another header. call_prefix: the ids of calls are this and 0, 1...
        """
        ids = list(completion_ids)
        if ids and ids[-1] in self._silent_stops:
            ids.pop()
        detokenizer = Detokenizer(self.tokenizer)
        grammar = self.grammar(tools, after_results, call_prefix)
        transcript = Transcript.of_pieces([*detokenizer.feed(ids), *detokenizer.finish()], self._protected)
        return parse(transcript, grammar)

    def stream(
        self, tools: Sequence[ToolSpec] | None = None, after_results: bool = False, call_prefix: str = "call_"
    ) -> TokenStream:
        """The same for ids as they are drawn."""
        return TokenStream(self.tokenizer, self.grammar(tools, after_results, call_prefix), self._silent_stops)

    def grammar(
        self, tools: Sequence[ToolSpec] | None = None, after_results: bool = False, call_prefix: str = "call_"
    ) -> Grammar:
        """How a completion is read; arguments as in `parse`. `text.parsing.parse_text` takes it for text alone."""
        header = self.format.results_header if after_results else self.format.user_header
        return Grammar(
            format=self.format,
            opened=self.config.open_thinking and THINK_OPEN in header.thinking,
            tools=None if tools is None else frozenset(tool.name for tool in tools),
            call_prefix=call_prefix,
            protected=self._protected,
        )

    # ----------------------------------------------------------------------------------------------- text -> tokens

    def _ids(self, spans: Iterable[Span]) -> tuple[array[int], array[int]]:
        """Ids and flags. Neighbouring plain text is tokenised as one, up to where the policy starts or stops."""
        ids, flags, plain = array("i"), array("b"), list[str]()
        flag = 0

        def flush() -> None:
            if plain:
                ids.extend(self.tokenizer.encode("".join(plain)))
                plain.clear()
            flags.extend([flag] * (len(ids) - len(flags)))

        for span in spans:
            if span.sampled != flag or span.kind == "header":
                flush()
                flag = int(span.sampled)
            for part in self._parts(span):
                if isinstance(part, str):
                    plain.append(part)
                else:
                    flush()
                    ids.append(part)
        flush()
        return ids, flags

    def _parts(self, span: Span) -> list[str | int]:
        """Control tokens as their ids, other text as it is."""
        if span.kind == "data":
            return [span.text]
        if span.kind == "speech":
            return self.tokenizer.split_special(span.text, self.format.spoken) if self.format.spoken else [span.text]
        if span.text not in self._format_parts:
            self._format_parts[span.text] = self.tokenizer.split_special(span.text)
        return self._format_parts[span.text]

    def _stop_id(self, text: str) -> int:
        parts = self.tokenizer.split_special(text)
        if len(parts) != 1 or not isinstance(parts[0], int):
            raise ValueError(f"EncodingConfig.stop names {text!r}, which is not a special token of this tokenizer.")
        return parts[0]


def _format(config: EncodingConfig, tokenizer: Tokenizer) -> Format:
    if config.template:
        return template_format(config.template, begins_with_bos="bos" in tokenizer.special_tokens)
    if config.format not in FORMATS:
        raise ValueError(f"EncodingConfig.format names {config.format!r}; there are {', '.join(sorted(FORMATS))}.")
    form = FORMATS[config.format]
    controls = set(tokenizer.control_tokens.values())
    missing = [SPECIAL_TOKENS[name] for name in ("bos", "eos") if name not in tokenizer.special_tokens]
    missing += [text for text in (form.user, form.assistant) if text not in controls]
    if missing:
        raise ValueError(
            f"The tokenizer has no chat tokens {missing}. Set EncodingConfig.template for a base model without them."
        )
    return form


def _check_turn(messages: Sequence[Message]) -> None:
    """Raises: ValueError unless the policy speaks next."""
    if messages and messages[-1].role in USER_ROLES:
        return
    asked = next((message for message in reversed(messages) if message.role != "tool"), None)
    num_results = next((i for i, message in enumerate(reversed(messages)) if message.role != "tool"), len(messages))
    if num_results == 0 or asked is None:
        raise ValueError("A prompt must end with a user message or with tool results: the policy speaks next.")
    if num_results < len(asked.tool_calls):
        raise ValueError(
            f"{len(asked.tool_calls)} calls have {num_results} results. Give one for each; an error is one."
        )


def _check_single_turn(messages: Sequence[Message]) -> None:
    if [message.role for message in messages] not in (["user"], ["user", "assistant"]):
        _refuse_turns(messages)


def _refuse_turns(messages: Sequence[Message]) -> None:
    roles = [message.role for message in messages]
    raise ValueError(f"A template takes exactly one user message, got {roles}. Put instructions into the template.")
