"""The routes: who may ask, what is counted, and that every answer, errors too, has OpenAI's shape."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from rorqual.server.asgi import (
    JSON,
    ClientGoneError,
    Receive,
    Scope,
    Send,
    header,
    read_all,
    send_body,
    send_reply,
    unless_gone,
)
from rorqual.server.backend import Backend, Reply
from rorqual.server.errors import ApiError
from rorqual.server.limits import ServerLimits
from rorqual.server.metrics import CONTENT_TYPE, Metrics
from rorqual.server.openapi import description
from rorqual.server.protocol import Health

if TYPE_CHECKING:
    from starlette.applications import Starlette

LOG = logging.getLogger("rorqual.server")
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")


class Door:
    """Who may come in. api_key: what `Authorization: Bearer` must hold, None for anybody. local_only: the `Host` must
    be this machine, so that a web page cannot reach a server on loopback under a name of its own."""

    def __init__(self, api_key: str | None, local_only: bool) -> None:
        self._digest = hashlib.sha256(api_key.encode()).digest() if api_key is not None else None
        self._local_only = local_only

    def check(self, scope: Scope) -> None:
        """Raises: ApiError (401, 403)."""
        if self._local_only:
            host = (header(scope, "host") or b"").decode("latin-1")
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name.lower() not in LOOPBACK:
                raise ApiError(403, "This server answers only under the name of its own machine.", code="wrong_host")
        if self._digest is not None and not self._holds_key(header(scope, "authorization") or b""):
            raise ApiError(
                401,
                "The API key is missing or wrong. Send it as `Authorization: Bearer KEY`.",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _holds_key(self, value: bytes) -> bool:
        scheme, _, given = value.partition(b" ")
        same = hmac.compare_digest(hashlib.sha256(given.strip()).digest(), self._digest or b"")
        return same and scheme.lower() == b"bearer"


Handler = Callable[[Scope, Receive], Awaitable[Reply]]


class Endpoint:
    """One route as an ASGI application: door, answer, errors, metrics."""

    def __init__(self, site: Site, route: str, handler: Handler, is_open: bool = False) -> None:
        self._site, self._route, self._handler, self._is_open = site, route, handler, is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun, reply = time.monotonic(), None
        metrics = self._site.metrics
        try:
            try:
                if not self._is_open:
                    self._site.door.check(scope)
                reply = await self._handler(scope, receive)
            except ApiError as error:
                reply = Reply(error.body(), status=error.status, headers=error.headers)
            metrics.requests.labels(self._route, str(reply.status)).inc()
            await send_reply(receive, send, reply, self._site.limits)
        except (ClientGoneError, TimeoutError, OSError):
            metrics.abandoned.inc()
        finally:
            if reply is not None:
                reply.release()
            metrics.request_seconds.observe(time.monotonic() - begun)


class Site:
    """The handlers of all routes over one backend."""

    def __init__(self, backend: Backend, limits: ServerLimits, metrics: Metrics, door: Door) -> None:
        self.backend, self.limits, self.metrics, self.door = backend, limits, metrics, door
        self._openapi = msgspec.json.encode(description())

    async def chat(self, scope: Scope, receive: Receive) -> Reply:
        return await self._ask(scope, receive, self.backend.chat)

    async def complete(self, scope: Scope, receive: Receive) -> Reply:
        return await self._ask(scope, receive, self.backend.complete)

    async def models(self, scope: Scope, receive: Receive) -> Reply:
        return await self.backend.models()

    async def health(self, scope: Scope, receive: Receive) -> Reply:
        failure = self.backend.failure()
        if failure is not None:
            raise ApiError(503, f"The engine has stopped: {failure}", kind="server_error", code="engine_failed")
        return Reply(msgspec.json.encode(Health(status="ok")))

    async def metrics_page(self, scope: Scope, receive: Receive) -> Reply:
        return Reply(self.metrics.page(self.backend.load()), headers={"content-type": CONTENT_TYPE})

    async def openapi(self, scope: Scope, receive: Receive) -> Reply:
        return Reply(self._openapi)

    async def _ask(self, scope: Scope, receive: Receive, answer: Callable[[bytes], Any]) -> Reply:
        media = (header(scope, "content-type") or b"").partition(b";")[0].strip().lower()
        if media != JSON.encode():
            raise ApiError(415, f"The body must be JSON: send `Content-Type: {JSON}`.", code="wrong_content_type")
        body = await read_all(scope, receive, self.limits)
        try:
            reply: Reply = await unless_gone(receive, answer(body), self.limits.request_timeout_seconds)
        except TimeoutError as error:
            seconds = self.limits.request_timeout_seconds
            raise ApiError(
                503, f"No answer within {seconds:g} s; the request was given up.", kind="server_error", code="timeout"
            ) from error
        return reply


def build_app(backend: Backend, limits: ServerLimits, metrics: Metrics, door: Door) -> Starlette:
    """The application. The extra `serve` brings Starlette."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.routing import Route

    site = Site(backend, limits, metrics, door)
    table: Mapping[str, tuple[str, Handler, bool]] = {
        "/v1/chat/completions": ("POST", site.chat, False),
        "/v1/completions": ("POST", site.complete, False),
        "/v1/models": ("GET", site.models, False),
        "/metrics": ("GET", site.metrics_page, False),
        "/openapi.json": ("GET", site.openapi, False),
        "/health": ("GET", site.health, True),
    }
    routes = [
        Route(path, Endpoint(site, path, handler, is_open), methods=[method])
        for path, (method, handler, is_open) in table.items()
    ]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await backend.start()
        try:
            yield
        finally:
            await backend.close()

    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _wrong_route})
    app.router.redirect_slashes = False
    app.add_middleware(_NoTraceback)
    return app


class _NoTraceback:
    """The last resort: what nobody foresaw is logged, and answered with 500 and no word of how it happened."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def note(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, note)
        except Exception:
            LOG.exception("A request failed in a way that nobody foresaw.")
            if scope["type"] == "http" and not begun:
                error = ApiError(500, "The server failed; its log says why.", kind="server_error", code="internal")
                await send_body(send, 500, error.body(), {"content-type": JSON})


def _wrong_route(request: Any, error: Any) -> Any:
    from starlette.responses import Response

    words = {404: "There is no such route.", 405: "This route has another method."}.get(error.status_code, "Refused.")
    refusal = ApiError(error.status_code, f"{words} See /openapi.json.", code="unknown_route")
    return Response(refusal.body(), status_code=error.status_code, headers=error.headers, media_type=JSON)
