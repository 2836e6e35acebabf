"""`/openapi.json`, made from the records that bodies are read into, so that it cannot say anything else."""

from __future__ import annotations

from typing import Any

import msgspec

from rorqual.server.protocol import (
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    CompletionRequest,
    ErrorAnswer,
    Health,
    ModelList,
    TextCompletion,
)

RECORDS = (
    *(ChatRequest, ChatCompletion, ChatChunk, CompletionRequest, TextCompletion),
    *(ModelList, ErrorAnswer, Health),
)

ERRORS = {
    "400": "The request must be changed.",
    "401": "The API key is missing or wrong.",
    "403": "Asked under a name that is not this machine's.",
    "404": "There is no such model.",
    "408": "The body came too slowly.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "The queue is full; `Retry-After` says when to come again.",
    "500": "The engine failed.",
    "502": "The server behind this one failed.",
    "503": "The server is ending, or the answer took too long.",
    "504": "The server behind this one did not answer in time.",
}


def description() -> dict[str, Any]:
    """OpenAPI 3.1 of all routes."""
    _, components = msgspec.json.schema_components(RECORDS, ref_template="#/components/schemas/{name}")
    stream: dict[str, Any] = {"text/event-stream": {}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Rorqual",
            "version": "1",
            "description": "OpenAI-compatible completions. With `stream` the answer is server-sent events: each "
            "`data:` is a ChatChunk or a TextCompletion, and the last is `[DONE]`.",
        },
        "paths": {
            "/v1/chat/completions": {"post": _operation("chat", "ChatCompletion", "ChatRequest", stream)},
            "/v1/completions": {"post": _operation("complete", "TextCompletion", "CompletionRequest", stream)},
            "/v1/models": {"get": _operation("models", "ModelList")},
            "/health": {"get": _operation("health", "Health", codes=("503",)) | {"security": []}},
            "/metrics": {"get": _operation("metrics", "", codes=("401", "403"))},
            "/openapi.json": {"get": _operation("openapi", "", codes=("401", "403")) | _any_json()},
        },
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(
    name: str, answer: str, body: str = "", stream: dict[str, Any] | None = None, codes: tuple[str, ...] = tuple(ERRORS)
) -> dict[str, Any]:
    content = {"application/json": _ref(answer), **(stream or {})} if answer else {"text/plain": {}}
    errors = {
        code: {"description": ERRORS[code], "content": {"application/json": _ref("ErrorAnswer")}} for code in codes
    }
    operation: dict[str, Any] = {
        "operationId": name,
        "responses": {"200": {"description": "The answer.", "content": content}, **errors},
    }
    if body:
        operation["requestBody"] = {"required": True, "content": {"application/json": _ref(body)}}
    return operation


def _any_json() -> dict[str, Any]:
    answer = {"description": "This description.", "content": {"application/json": {"schema": {"type": "object"}}}}
    errors = {
        code: {"description": ERRORS[code], "content": {"application/json": _ref("ErrorAnswer")}}
        for code in ("401", "403")
    }
    return {"responses": {"200": answer, **errors}}


def _ref(name: str) -> dict[str, Any]:
    return {"schema": {"$ref": f"#/components/schemas/{name}"}}
