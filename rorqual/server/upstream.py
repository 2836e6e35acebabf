"""Another OpenAI-compatible server behind the routes: this one decides which past thinking it is shown.

The client's body goes on as it came but for that; the answer comes back byte by byte. What the other server says about
its own troubles stays here, but for refusals in OpenAI's format, which are the client's to read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from rorqual.server.backend import Reply, error_event
from rorqual.server.context import ContextPolicy
from rorqual.server.errors import ApiError, failed, invalid, overloaded
from rorqual.server.limits import ServerLimits
from rorqual.text.encoding import Encoding
from rorqual.text.openai import message_from_openai, message_to_openai, tool_from_openai
from rorqual.text.retention import Retention, kept_thinking

if TYPE_CHECKING:
    import httpx

THINKING = ("reasoning_content", "reasoning")
CONNECT_SECONDS = 10.0
MAX_ANSWER_BYTES = 64 * 2**20


class UpstreamBackend:
    """Implements `backend.Backend` over HTTP. The extra `serve` brings httpx.

    url: of the other server, up to and without `/v1` or with it. api_key: its key, sent to it alone. context: how
    contexts are managed, with the encoding that counts their tokens; None leaves them as they are.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None,
        retention: Retention,
        limits: ServerLimits,
        max_in_flight: int,
        context: tuple[ContextPolicy, Encoding] | None = None,
    ) -> None:
        """Raises: ValueError for anything but an http(s) address."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise ValueError(f"--upstream {url!r} is not the address of a server; give one like http://127.0.0.1:8000.")
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._retention, self._limits, self._context = retention, limits, context
        self._max_in_flight, self._in_flight = max_in_flight, 0
        self._client: httpx.AsyncClient | None = None

    async def start(self) -> None:
        import httpx

        timeout = httpx.Timeout(self._limits.request_timeout_seconds, connect=CONNECT_SECONDS)
        pool = httpx.Limits(max_connections=None, max_keepalive_connections=self._max_in_flight)
        self._client = httpx.AsyncClient(timeout=timeout, limits=pool, headers=self._headers)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    def failure(self) -> str | None:
        return None

    def load(self) -> Mapping[str, float]:
        return {"requests_upstream": self._in_flight}

    async def chat(self, body: bytes) -> Reply:
        request = _read_object(body)
        messages: Any = request.get("messages")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise invalid("`messages` must be a list of messages.", param="messages")
        if not 0 < len(messages) <= self._limits.max_messages:
            raise invalid(f"{len(messages)} messages; give 1 to {self._limits.max_messages}.", param="messages")
        if self._context is not None:
            messages = await asyncio.to_thread(managed, messages, request.get("tools"), *self._context)
        request["messages"] = retained(messages, self._retention)
        return await self._forward("/chat/completions", msgspec.json.encode(request))

    async def complete(self, body: bytes) -> Reply:
        return await self._forward("/completions", msgspec.json.encode(_read_object(body)))

    async def models(self) -> Reply:
        return await self._forward("/models", None)

    # ---------------------------------------------------------------------------------------------------------- HTTP

    async def _forward(self, path: str, body: bytes | None) -> Reply:
        """Raises: ApiError: 429 when too much is in flight, 502 and 504 for an upstream that fails."""
        import httpx

        if self._client is None:
            raise failed("The server has not started.", status=503)
        if self._in_flight >= self._max_in_flight:
            raise overloaded(1)
        request = self._client.build_request("POST" if body is not None else "GET", self._base + path, content=body)
        self._in_flight += 1
        passed_on = False
        try:
            response = await self._client.send(request, stream=True)
            try:
                if response.headers.get("content-type", "").startswith("text/event-stream") and response.is_success:
                    passed_on = True
                    return Reply(self._events(response), release=_Release(self, response))
                return _answer(response, await _read_bounded(response))
            finally:
                if not passed_on:
                    await response.aclose()
        except httpx.TimeoutException as error:
            raise failed("The server behind this one did not answer in time.", status=504) from error
        except httpx.HTTPError as error:
            raise failed(f"The server behind this one cannot be reached ({type(error).__name__}).", 502) from error
        finally:
            if not passed_on:
                self._in_flight -= 1

    async def _events(self, response: httpx.Response) -> AsyncGenerator[bytes, None]:
        import httpx

        try:
            async for data in response.aiter_bytes():
                yield data
        except httpx.HTTPError as error:
            words = f"\n\nThe server behind this one broke off ({type(error).__name__})."
            yield b"\n\n" + error_event(failed(words.strip(), status=502))

    def left(self) -> None:
        self._in_flight -= 1


class _Release:
    """Ends a stream that goes through, once."""

    def __init__(self, backend: UpstreamBackend, response: httpx.Response) -> None:
        self._backend, self._response = backend, response
        self._task: asyncio.Task[None] | None = None

    def __call__(self) -> None:
        if self._task is None:
            self._backend.left()
            self._task = asyncio.ensure_future(self._response.aclose())


def retained(messages: Sequence[dict[str, Any]], retention: Retention) -> list[dict[str, Any]]:
    """The messages without the thinking that the rule drops; nothing else is touched.

    Raises: ApiError for a message that is none.
    """
    try:
        records = [message_from_openai(_text_only(message)) for message in messages]
    except (ValueError, RecursionError, TypeError, AttributeError) as error:
        raise invalid(str(error), param="messages") from error
    kept = kept_thinking(retention, records)
    return [
        message if keep else {name: value for name, value in message.items() if name not in THINKING}
        for message, keep in zip(messages, kept, strict=False)
    ]


def managed(
    messages: Sequence[dict[str, Any]], tools: Any, context: ContextPolicy, encoding: Encoding
) -> list[dict[str, Any]]:
    """The messages that the policy sees; those that stay are as they came.

    Raises: ApiError for messages or tools that cannot be encoded, and where no room is left.
    """
    try:
        records = [message_from_openai(message) for message in messages]
        specs = [tool_from_openai(tool) for tool in tools or ()]
        seen = context.seen(encoding, records, specs)
    except (ValueError, RecursionError, TypeError, AttributeError) as error:
        raise invalid(str(error), param="messages") from error
    came = {id(record): message for record, message in zip(records, messages, strict=True)}
    return [came[id(each)] if id(each) in came else message_to_openai(each) for each in seen]


def _text_only(message: Mapping[str, Any]) -> dict[str, Any]:
    """What the rule looks at; images and the like pass by."""
    return {name: message[name] for name in ("role", *THINKING) if message.get(name) is not None}


def _read_object(body: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(f"The body is not JSON that can be read: {str(error)[:200]}.") from error
    if not isinstance(value, dict):
        raise invalid("The body must be one JSON object.")
    return value


async def _read_bounded(response: httpx.Response) -> bytes:
    body = bytearray()
    async for data in response.aiter_bytes():
        body += data
        if len(body) > MAX_ANSWER_BYTES:
            raise failed(f"The server behind this one answered with more than {MAX_ANSWER_BYTES} bytes.", status=502)
    return bytes(body)


def _answer(response: httpx.Response, body: bytes) -> Reply:
    """What the client gets of a whole answer. Raises: ApiError for one that is not for its eyes."""
    status = response.status_code
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        value = None
    if response.is_success:
        if not isinstance(value, dict):
            raise failed("The server behind this one answered with something that is not JSON.", status=502)
        return Reply(body)
    if status in (401, 403):
        raise failed("The server behind this one refuses this server's key; its owner must look at it.", status=502)
    if not 400 <= status < 500:
        raise failed(f"The server behind this one failed with status {status}.", status=502)
    said = value.get("error", value) if isinstance(value, dict) else {}
    said = said if isinstance(said, dict) else {"message": said}
    words = said.get("message")
    wait = response.headers.get("retry-after", "")
    raise ApiError(
        status,
        words[:2000] if isinstance(words, str) else f"The server behind this one refused with status {status}.",
        kind=_text(said.get("type")) or ("rate_limit_error" if status == 429 else "invalid_request_error"),
        code=_text(said.get("code")),
        param=_text(said.get("param")),
        headers={"Retry-After": wait if wait.isdigit() else "1"} if status == 429 else {},
    )


def _text(value: Any) -> str | None:
    return value[:200] if isinstance(value, str) else None
