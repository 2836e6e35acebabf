"""From the tokens of one choice to what its client gets: parsed, cut at stop strings, counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rorqual.records import Alternatives, ToolCall, ToolSpec
from rorqual.server.protocol import (
    ChoiceLogprobs,
    ChosenLogprob,
    CompletionTokensDetails,
    FinishReason,
    TextLogprobs,
    TokenLogprob,
    Usage,
)
from rorqual.text.detokenize import Detokenizer
from rorqual.text.encoding import Encoding
from rorqual.text.streaming import Delta, join_deltas
from rorqual.text.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"


class StopStrings:
    """Cuts a growing text before the stop string that is complete first, the longest if several are.

    The result does not depend on the pieces that the text comes in.
    What may turn out to be the beginning of a stop string waits for what follows.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The text that `text` makes certain; nothing after a stop string."""
        if self.found:
            return ""
        text = self._held + text
        found = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.found, self._held = True, ""
            return text[: min(found)[1]]
        waiting = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - waiting :]
        return text[: len(text) - waiting]

    def finish(self) -> str:
        """What waits, when no text follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest true beginning of `stop` that `text` ends with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


class ChatReader:
    """Reads one choice of a chat. Stop strings count in the content alone, not in thinking and not in calls.

    one_call: the answer ends with its first call. stopped: a stop string or the one call was found, so nothing more is
    wanted. thinking, calls: what was given so far.
    """

    def __init__(
        self,
        encoding: Encoding,
        tools: Sequence[ToolSpec],
        after_results: bool,
        call_prefix: str,
        stops: Sequence[str],
        one_call: bool = False,
    ) -> None:
        self._tokenizer = encoding.tokenizer
        self._stream = encoding.stream(tools=tools or None, after_results=after_results, call_prefix=call_prefix)
        self._stops, self._one_call = StopStrings(stops), one_call
        names = self._tokenizer.special_tokens
        self._close_id = self._tokenizer.special_id("think_close") if "think_close" in names else None
        self._closed_at: int | None = None
        self.num_tokens = 0
        self.thinking = ""
        self.calls: list[ToolCall] = []

    @property
    def stopped(self) -> bool:
        return self._stops.found or (self._one_call and bool(self.calls))

    @property
    def stop_reason(self) -> FinishReason:
        return "stop" if self._stops.found else "tool_calls"

    def feed(self, ids: Sequence[int]) -> Delta:
        """What these tokens make certain."""
        if self._closed_at is None and self._close_id is not None and self._close_id in ids:
            self._closed_at = self.num_tokens + list(ids).index(self._close_id)
        self.num_tokens += len(ids)
        return self._cut(self._stream.feed(ids))

    def finish(self, end: Literal["stop", "length"]) -> tuple[Delta, FinishReason]:
        """The last delta, and why it is the last."""
        last = self._cut(self._stream.finish()[0])
        if not self.stopped:
            last = join_deltas([last, Delta(content=self._stops.finish())])
        return last, "tool_calls" if self.calls and end == "stop" and not self._stops.found else end

    def num_reasoning_tokens(self) -> int:
        """Tokens before the `</think>`, if there is thinking; where that is no token, those of the thinking's text."""
        if not self.thinking:
            return 0
        if self._closed_at is not None:
            return self._closed_at
        return min(self.num_tokens, len(self._tokenizer.encode(self.thinking)))

    def _cut(self, delta: Delta) -> Delta:
        if self.stopped:
            return Delta()
        content = self._stops.feed(delta.content)
        calls = () if self._stops.found else delta.tool_calls[: 1 if self._one_call else None]
        if calls and not self.calls:
            content += self._stops.finish()
        self.thinking += delta.thinking
        self.calls += calls
        return Delta(thinking=delta.thinking, content=content, tool_calls=calls)


class TextReader:
    """Reads one choice of a plain completion: its text up to a stop string or a stop token."""

    def __init__(self, tokenizer: Tokenizer, stop_token_ids: Sequence[int], stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop_token_ids = frozenset(stop_token_ids)
        self._stops = StopStrings(stops)
        self.num_tokens = 0

    @property
    def stopped(self) -> bool:
        return self._stops.found

    def feed(self, ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        self.num_tokens += len(ids)
        shown = [token for token in ids if token not in self._stop_token_ids]
        return self._stops.feed("".join(piece.text for piece in self._detokenizer.feed(shown)))

    def finish(self) -> str:
        """The rest."""
        last = self._stops.feed("".join(piece.text for piece in self._detokenizer.finish()))
        return last if self.stopped else last + self._stops.finish()


def chat_logprobs(tokenizer: Tokenizer, ids: Sequence[int], noted: Alternatives | None) -> ChoiceLogprobs | None:
    """Log-probs of tokens under the model's own distribution, in OpenAI's shape for chats."""
    if noted is None:
        return None
    entries = []
    for place, (token, logprob) in enumerate(zip(ids, noted.logprobs, strict=True)):
        row = slice(place * noted.num, (place + 1) * noted.num)
        best = [
            _entry(tokenizer, other, value)
            for other, value in zip(noted.ids[row], noted.top_logprobs[row], strict=True)
        ]
        own = _entry(tokenizer, token, logprob)
        entries.append(ChosenLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=best))
    return ChoiceLogprobs(content=entries)


def text_logprobs(
    tokenizer: Tokenizer, ids: Sequence[int], noted: Alternatives | None, offset: int
) -> TextLogprobs | None:
    """The same in the shape for completions; `offset` is where the first token's text begins."""
    if noted is None:
        return None
    tokens = [tokenizer.decode([token]) for token in ids]
    offsets = [offset + sum(map(len, tokens[:place])) for place in range(len(tokens))]
    best = [
        {
            tokenizer.decode([noted.ids[place]]): _finite(noted.top_logprobs[place])
            for place in range(first * noted.num, (first + 1) * noted.num)
        }
        for first in range(len(ids))
    ]
    logprobs = [_finite(value) for value in noted.logprobs]
    return TextLogprobs(tokens=tokens, token_logprobs=logprobs, top_logprobs=best, text_offset=offsets)


def usage(num_prompt: int, num_drawn: int, num_reasoning: int) -> Usage:
    return Usage(
        prompt_tokens=num_prompt,
        completion_tokens=num_drawn,
        total_tokens=num_prompt + num_drawn,
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=num_reasoning),
    )


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> TokenLogprob:
    text = tokenizer.decode([token])
    partial = _INCOMPLETE in text
    return TokenLogprob(token=text, logprob=_finite(logprob), bytes=None if partial else list(text.encode()))


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what is next to impossible."""
    return max(logprob, -9999.0)
