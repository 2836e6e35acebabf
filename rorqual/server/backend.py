"""What stands behind the routes: a policy of ours, or another server; both are asked in the same way."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from rorqual.server.errors import ApiError


@dataclass(frozen=True)
class Reply:
    """An answer: all of it, or its server-sent events as they come.

    release: frees what the answer holds; whoever has sent the answer, or given it up, calls it, once or more.
    """

    body: bytes | AsyncGenerator[bytes, None]
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    release: Callable[[], None] = lambda: None


class Backend(Protocol):
    """Every method raises ApiError for what is refused. Cancelling a call, or closing a stream, frees what it holds."""

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def chat(self, body: bytes) -> Reply: ...

    async def complete(self, body: bytes) -> Reply: ...

    async def models(self) -> Reply: ...

    def failure(self) -> str | None:
        """Why nothing can be answered any more; None while all is well."""
        ...

    def load(self) -> Mapping[str, float]:
        """Numbers for the metrics: what is in flight now."""
        ...


def event(record: object) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(record) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def error_event(error: ApiError) -> bytes:
    """The last event of a stream that fails after it has begun."""
    return b"data: " + error.body() + b"\n\n"
