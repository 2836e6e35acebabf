"""HTTP at the level of ASGI: bounded bodies, answers to readers of any speed, and clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, MutableMapping
from typing import Any

from rorqual.server.backend import Reply
from rorqual.server.errors import ApiError
from rorqual.server.limits import ServerLimits

Scope = MutableMapping[str, Any]
AsgiMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[AsgiMessage]]
Send = Callable[[AsgiMessage], Awaitable[None]]

JSON = "application/json"


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


def header(scope: Scope, name: str) -> bytes | None:
    """The first value of a header, None where there is none."""
    return next((value for key, value in scope["headers"] if key == name.encode()), None)


async def read_all(scope: Scope, receive: Receive, limits: ServerLimits) -> bytes:
    """The body. Raises: ApiError for one that is too large (413) or too slow (408), ClientGoneError."""
    declared = header(scope, "content-length")
    if declared is not None and declared.isdigit() and int(declared) > limits.max_body_bytes:
        raise _too_large(limits)
    try:
        async with asyncio.timeout(limits.body_timeout_seconds):
            return await _collect(receive, limits)
    except TimeoutError as error:
        raise ApiError(408, f"The body did not arrive within {limits.body_timeout_seconds:g} s.") from error


async def _collect(receive: Receive, limits: ServerLimits) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        body += message.get("body", b"")
        if len(body) > limits.max_body_bytes:
            raise _too_large(limits)
        if not message.get("more_body", False):
            return bytes(body)


def _too_large(limits: ServerLimits) -> ApiError:
    return ApiError(413, f"The body is larger than {limits.max_body_bytes} bytes.", code="body_too_large")


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Any], timeout_seconds: float) -> Any:
    """What `work` returns; it is cancelled when the client goes away or the time is up.

    Raises: ClientGoneError, and TimeoutError, after the work has ended.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(receive))
    try:
        done, _ = await asyncio.wait({task, gone}, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        raise ClientGoneError if gone in done else TimeoutError
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_reply(receive: Receive, send: Send, reply: Reply, limits: ServerLimits) -> None:
    """All of an answer. Raises: ClientGoneError when its reader goes away, or refuses the next piece for too long."""
    if isinstance(reply.body, bytes):
        await send_body(send, reply.status, reply.body, {"content-type": JSON, **reply.headers})
        return
    headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store", **reply.headers}
    await send({"type": "http.response.start", "status": reply.status, "headers": _raw(headers)})
    try:
        await unless_gone(receive, _send_events(send, reply.body, limits), limits.request_timeout_seconds)
    except TimeoutError as error:
        raise ClientGoneError from error


async def _send_events(send: Send, events: AsyncGenerator[bytes, None], limits: ServerLimits) -> None:
    async with contextlib.aclosing(events):
        async for data in events:
            async with asyncio.timeout(limits.send_timeout_seconds):
                await send({"type": "http.response.body", "body": data, "more_body": True})
    async with asyncio.timeout(limits.send_timeout_seconds):
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def send_body(send: Send, status: int, body: bytes, headers: Mapping[str, str]) -> None:
    """An answer that is whole."""
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": _raw({"content-length": str(len(body)), **headers}),
        }
    )
    await send({"type": "http.response.body", "body": body})


def _raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
