"""A chat model behind any OpenAI-compatible endpoint: messages in, a typed reply out.

Failures are typed. `EndpointUnavailable`: the infrastructure failed (429, 5xx, connection, timeout, a stream that was
cut), after all retries. `EndpointRefused`: the request or the key is wrong, and trying again would not help.
`ReplyError`: the server answered with something else than it should. None of them holds the key: it is read from an
environment variable that the config names, and no error keeps the SDK's exception, which knows the request's headers.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from rorqual.contracts import ChatReply, ChatUsage
from rorqual.records import Message, Record, SamplingParams, ToolSpec
from rorqual.text.openai import message_from_openai, message_to_openai
from rorqual.text.streaming import Delta

Answer = TypeVar("Answer")

TRANSIENT_STATUS = frozenset({408, 409, 425, 429})
MAX_MESSAGE_LENGTH = 500


class EndpointUnavailable(ConnectionError):
    """The infrastructure failed. retry_after_s: what the server asked to wait, None when it said nothing."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EndpointRefused(ValueError):
    """The server refuses this request; the same request would be refused again."""


class ReplyError(ValueError):
    """The server's answer is not what its interface promises."""


class EndpointConfig(Record):
    """An OpenAI-compatible server.

    base_url: with its version, as in `http://127.0.0.1:8000/v1`. key_variable: name of the environment variable that
    holds the key; empty for a server that asks for none. timeout_s: longest wait for a connection or for the next
    bytes, so it bounds a whole answer that is not streamed. max_attempts: tries of one call. max_backoff_s: longest
    wait between two of them; a server that asks for more is given up. max_concurrent: calls in flight at a time.
    extra_body: further fields of every request.
    """

    base_url: str
    model: str
    key_variable: str = ""
    timeout_s: float = 120.0
    max_attempts: int = 4
    backoff_s: float = 0.5
    max_backoff_s: float = 30.0
    max_concurrent: int = 16
    extra_body: dict[str, Any] = {}

    def __post_init__(self) -> None:
        """Raises: ValueError naming the field that is out of range."""
        valid = {
            "base_url": self.base_url.startswith(("http://", "https://")),
            "model": bool(self.model),
            "timeout_s": self.timeout_s > 0,
            "max_attempts": self.max_attempts >= 1,
            "backoff_s": self.backoff_s >= 0,
            "max_backoff_s": self.max_backoff_s >= 0,
            "max_concurrent": self.max_concurrent >= 1,
        }
        for name, good in valid.items():
            if not good:
                raise ValueError(f"EndpointConfig.{name} = {getattr(self, name)!r} is out of range.")


class Endpoint:
    """Calls of one server: bounded in number, retried where the infrastructure failed. Belongs to one event loop."""

    def __init__(self, config: EndpointConfig) -> None:
        """Raises: ValueError for a missing extra, or an environment variable that is not set."""
        try:
            import openai
            import tenacity
        except ImportError as error:
            raise ValueError(
                f"An endpoint needs the extra `agents` ({error.name} is missing): pip install 'rorqual[agents]'."
            ) from error
        self.config = config
        self._openai, self._tenacity = openai, tenacity
        key = os.environ.get(config.key_variable, "") if config.key_variable else "none"
        if not key:
            raise ValueError(f"The environment variable {config.key_variable} holds no key; set it, or name another.")
        self._hidden = key if config.key_variable else ""
        self.client = openai.AsyncOpenAI(
            base_url=config.base_url, api_key=key, timeout=config.timeout_s, max_retries=0, organization="", project=""
        )
        self.places = asyncio.Semaphore(config.max_concurrent)

    def __repr__(self) -> str:
        return f"Endpoint({self.config.base_url}, {self.config.model})"

    async def call(self, attempt: Callable[[], Awaitable[Answer]]) -> Answer:
        """What `attempt` gives, tried again while the infrastructure fails. Raises: the three errors of this module."""
        async with self.places:
            return await self.retried(attempt)

    async def retried(self, attempt: Callable[[], Awaitable[Answer]]) -> Answer:
        """The same for who holds one of the `places` already."""
        retrying = self._tenacity.AsyncRetrying(
            stop=self._tenacity.stop_after_attempt(self.config.max_attempts),
            wait=self._wait,
            retry=self._tenacity.retry_if_exception(self._may_retry),
            reraise=True,
        )
        return await retrying(self.once, attempt)

    async def once(self, attempt: Callable[[], Awaitable[Answer]]) -> Answer:
        """What `attempt` gives, its failure as one of the errors of this module."""
        try:
            return await attempt()
        except (self._openai.OpenAIError, ValueError, ConnectionError) as error:
            failure = self._typed(error)
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2", "anyio"):
                raise
            failure = EndpointUnavailable(self._say("The connection was cut", error))
        raise failure  # outside of the handler, so that no context keeps the request and its headers

    async def post(self, url: str, body: dict[str, Any]) -> Any:
        """The JSON that the server answers to `body`; `url` is relative to the base, or whole."""
        return await self.call(lambda: self.client.post(url, cast_to=object, body=body | self.config.extra_body))

    async def close(self) -> None:
        await self.client.close()

    def _may_retry(self, error: BaseException) -> bool:
        asked = getattr(error, "retry_after_s", None)
        return isinstance(error, EndpointUnavailable) and (asked is None or asked <= self.config.max_backoff_s)

    def _wait(self, state: Any) -> float:
        error = state.outcome.exception()
        if error.retry_after_s is not None:
            return float(error.retry_after_s)
        return float(min(self.config.backoff_s * 2 ** (state.attempt_number - 1), self.config.max_backoff_s))

    def _typed(self, error: Exception) -> Exception:
        openai = self._openai
        if isinstance(error, EndpointUnavailable | EndpointRefused | ReplyError):
            return error
        if isinstance(error, openai.APIStatusError):
            said = self._say(f"{self.config.base_url} answered {error.status_code}", error)
            if error.status_code in TRANSIENT_STATUS or error.status_code >= 500:
                return EndpointUnavailable(said, _seconds(error.response.headers.get("retry-after")))
            return EndpointRefused(said)
        if isinstance(error, openai.APITimeoutError):
            return EndpointUnavailable(f"{self.config.base_url} said nothing for {self.config.timeout_s:g} s.")
        if isinstance(error, openai.APIConnectionError | ConnectionError):
            return EndpointUnavailable(self._say(f"{self.config.base_url} cannot be reached", error))
        if isinstance(error, openai.APIError) and not isinstance(error, openai.APIResponseValidationError):
            return EndpointUnavailable(self._say(f"{self.config.base_url} broke off its answer", error))
        return ReplyError(self._say(f"{self.config.base_url} answered with what is not a reply", error))

    def _say(self, what: str, error: Exception) -> str:
        said = str(error).replace(self._hidden, "***") if self._hidden else str(error)
        return f"{what}: {said[:MAX_MESSAGE_LENGTH] or type(error).__name__}"


class HttpChatModel:
    """Implements `contracts.ChatModel` on an endpoint. thinking: None leaves the mode to the server."""

    def __init__(self, config: EndpointConfig) -> None:
        """Raises: ValueError as `Endpoint` does."""
        self.endpoint = Endpoint(config)
        self.thinking: bool | None = None

    async def complete(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), params: SamplingParams | None = None
    ) -> ChatReply:
        """One reply. Cancelling the task closes the connection. Raises: the errors of this module."""
        body = self._body(messages, tools, params)

        async def attempt() -> ChatReply:
            return read_reply(await self.endpoint.client.post("/chat/completions", cast_to=object, body=body))

        return await self.endpoint.call(attempt)

    async def stream(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), params: SamplingParams | None = None
    ) -> AsyncIterator[Delta | ChatReply]:
        """Deltas as they come, the whole reply at last; calls are given when they are whole, with the last delta.

        Only opening the stream is tried again: what was given is not taken back.
        Raises: the errors of this module; EndpointUnavailable for a stream that ends without a finish reason.
        """
        body = self._body(messages, tools, params)
        options = {"stream": True, "stream_options": {"include_usage": True}}
        create = self.endpoint.client.chat.completions.create

        async def start() -> Any:
            return await create(model=body["model"], messages=body["messages"], stream=True, extra_body=body | options)

        joined = _JoinedChunks()
        async with self.endpoint.places:
            chunks = await self.endpoint.retried(start)
            try:
                iterator = chunks.__aiter__()
                while (chunk := await self.endpoint.once(lambda: anext(iterator, None))) is not None:
                    if delta := joined.feed(chunk.model_dump()):
                        yield delta
            finally:
                await chunks.close()
        reply = joined.reply()
        if reply.message.tool_calls:
            yield Delta(tool_calls=reply.message.tool_calls)
        yield reply

    async def close(self) -> None:
        await self.endpoint.close()

    def _body(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec], params: SamplingParams | None
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.endpoint.config.model,
            "messages": [message_to_openai(message) for message in messages],
        }
        if tools:
            body["tools"] = [
                {
                    "type": "function",
                    "function": {"name": t.name, "description": t.description, "parameters": t.parameters},
                }
                for t in tools
            ]
        if params is not None:
            body |= {"temperature": params.temperature, "top_p": params.top_p, "seed": params.seed}
            body["max_tokens"] = params.max_new_tokens
            further = {"top_k": params.top_k, "min_p": params.min_p, "stop_token_ids": list(params.stop_token_ids)}
            body |= {name: value for name, value in further.items() if value}
        if self.thinking is not None:
            body["chat_template_kwargs"] = {"thinking": self.thinking, "enable_thinking": self.thinking}
        return body | self.endpoint.config.extra_body


def read_reply(raw: Any) -> ChatReply:
    """The reply that a chat completion is. Raises: ReplyError saying what is missing."""
    try:
        choice = raw["choices"][0]
        message = message_from_openai({"role": "assistant"} | choice["message"])
        return ChatReply(
            message=message, usage=_usage(raw.get("usage")), finish_reason=str(choice["finish_reason"]), raw=raw
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ReplyError(f"The answer is not a chat completion: {type(error).__name__} {error}.") from None


class _JoinedChunks:
    """What the chunks of one stream say together, in the shape of an answer that was not streamed."""

    def __init__(self) -> None:
        self._texts = {"content": "", "reasoning_content": ""}
        self._calls: dict[int, dict[str, Any]] = {}
        self._finish_reason: str | None = None
        self._usage: Any = None
        self._last: dict[str, Any] = {}

    def feed(self, chunk: dict[str, Any]) -> Delta:
        self._last, self._usage = chunk, chunk.get("usage") or self._usage
        if not chunk.get("choices"):
            return Delta()
        choice = chunk["choices"][0]
        delta = choice.get("delta") or {}
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        thinking = delta.get("reasoning_content") or delta.get("reasoning") or ""
        content = delta.get("content") or ""
        self._texts["content"] += content
        self._texts["reasoning_content"] += thinking
        for part in delta.get("tool_calls") or ():
            call = self._calls.setdefault(part["index"], {"id": "", "function": {"name": "", "arguments": ""}})
            function = part.get("function") or {}
            call["id"] = part.get("id") or call["id"]
            call["function"]["name"] += function.get("name") or ""
            call["function"]["arguments"] += function.get("arguments") or ""
        return Delta(thinking=thinking, content=content)

    def reply(self) -> ChatReply:
        if self._finish_reason is None:
            raise EndpointUnavailable("The stream ended before the answer did.")
        message = {**self._texts, "tool_calls": [self._calls[index] for index in sorted(self._calls)]}
        whole = {"choices": [{"message": message, "finish_reason": self._finish_reason}], "usage": self._usage}
        return read_reply({key: value for key, value in self._last.items() if key != "choices"} | whole)


def _usage(raw: Any) -> ChatUsage | None:
    if not raw:
        return None
    completion = raw.get("completion_tokens_details") or {}
    prompt = raw.get("prompt_tokens_details") or {}
    return ChatUsage(
        prompt_tokens=raw.get("prompt_tokens") or 0,
        completion_tokens=raw.get("completion_tokens") or 0,
        reasoning_tokens=completion.get("reasoning_tokens") or raw.get("reasoning_tokens") or 0,
        cached_tokens=prompt.get("cached_tokens") or 0,
    )


def _seconds(retry_after: str | None) -> float | None:
    """The header's number of seconds; a date, which the standard also allows, counts as nothing said."""
    try:
        return max(0.0, float(retry_after)) if retry_after else None
    except ValueError:
        return None
