"""Refusals in OpenAI's error format: what went wrong is said in words, and never by a traceback."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class ApiError(Exception):
    """An answer that is an error. kind and code are OpenAI's `type` and `code`; param names the field concerned."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """`{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}`."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The client must change the request before it sends it again."""
    return ApiError(400, message, code=code, param=param)


def unsupported(message: str, param: str) -> ApiError:
    """A field that this server knows and does not implement; it is never ignored, since the answer would differ."""
    return ApiError(400, message, code="unsupported_parameter", param=param)


def overloaded(seconds: int) -> ApiError:
    """As many requests wait as may wait."""
    return ApiError(
        429,
        f"The server is busy and its queue is full. Try again in {seconds} s.",
        kind="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": str(seconds)},
    )


def failed(message: str, status: int = 500) -> ApiError:
    """The server, or what it stands in front of, could not answer."""
    return ApiError(status, message, kind="server_error", code="engine_failed" if status == 500 else "upstream_failed")
