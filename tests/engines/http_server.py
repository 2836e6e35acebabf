"""A real HTTP server for tests, in a thread: behaves like vLLM, like SGLang, like a plain API, or badly."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

VOCABULARY = 40


class Server:
    """`faults` are answers that the next calls get in place of a right one; `behaviour` holds for all calls."""

    def __init__(self, behaviour: str = "") -> None:
        self.behaviour = behaviour
        self.faults: list[Response] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.in_flight = self.most_in_flight = self.gone = 0
        routes = [("/v1/completions", vllm), ("/generate", sglang), ("/v1/chat/completions", chat)]
        app = Starlette(routes=[Route(path, self._route(answer), methods=["POST"]) for path, answer in routes])
        config = uvicorn.Config(app, port=0, log_level="critical", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"

    def close(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()

    def _route(self, answer: Any) -> Any:
        async def respond(request: Request) -> Response:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            try:
                self.keys.append(request.headers.get("authorization", ""))
                body = await request.json()
                self.bodies.append(body)
                if self.faults:
                    return self.faults.pop(0)
                if self.behaviour == "slow":
                    for _ in range(200):
                        await asyncio.sleep(0.02)
                        if await request.is_disconnected():
                            self.gone += 1
                            break
                if self.behaviour == "pause":
                    await asyncio.sleep(0.03)
                return answer(body, self.behaviour)
            finally:
                self.in_flight -= 1

        return respond


def drawn(prompt: list[int], stops: list[int], seed: int, room: int) -> tuple[list[int], list[float]]:
    """A policy: each token is a hash of seed, position and prompt."""
    ids: list[int] = []
    while len(ids) < room and not (ids and ids[-1] in stops):
        number = hashlib.sha256(f"{seed}|{len(ids)}|{prompt}".encode()).digest()[0]
        ids.append(stops[0] if stops and number % 7 == 0 else number % VOCABULARY)
    return ids, [-0.25 * (1 + token % 5) for token in ids]


def vllm(body: dict[str, Any], behaviour: str) -> Response:
    stops = body["stop_token_ids"]
    ids, logprobs = drawn(body["prompt"], stops, body["seed"], body["max_tokens"])
    reason = "stop" if ids[-1] in stops else "length"
    choice: dict[str, Any] = {
        "index": 0,
        "text": "",
        "finish_reason": reason,
        "logprobs": {"token_logprobs": logprobs, "tokens": [""] * len(ids)},
        "token_ids": ids,
        "prompt_token_ids": body["prompt"],
    }
    if behaviour == "plain":
        del choice["token_ids"], choice["prompt_token_ids"]
    changes: dict[str, dict[str, Any]] = {
        "no logprobs": {"logprobs": None},
        "wrong length": {"logprobs": {"token_logprobs": logprobs[:-1]}},
        "other prompt": {"prompt_token_ids": [0, *body["prompt"]]},
        "null logprob": {"logprobs": {"token_logprobs": [None] * len(ids)}},
        "positive logprob": {"logprobs": {"token_logprobs": [0.5] * len(ids)}},
        "own end": {"token_ids": [1], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "stop"},
        "abort": {"finish_reason": "abort"},
        "no token": {"token_ids": [], "logprobs": {"token_logprobs": []}},
    }
    answer = {"object": "text_completion", "choices": [choice | changes.get(behaviour, {})]}
    return JSONResponse(answer | ({"weight_version": 5} if behaviour == "versioned" else {}))


def sglang(body: dict[str, Any], behaviour: str) -> Response:
    sampling = body["sampling_params"]
    stops = sampling["stop_token_ids"]
    ids, logprobs = drawn(body["input_ids"], stops, sampling["sampling_seed"], sampling["max_new_tokens"])
    meta: dict[str, Any] = {
        "prompt_tokens": len(body["input_ids"]),
        "weight_version": "default",
        "output_token_logprobs": [[value, token, None] for value, token in zip(logprobs, ids, strict=True)],
        "finish_reason": {"type": "stop" if ids[-1] in stops else "length"},
    }
    if behaviour == "no logprobs":
        del meta["output_token_logprobs"]
    return JSONResponse({"text": "", "output_ids": ids[:-1] if behaviour == "wrong length" else ids, "meta_info": meta})


CALL = {"id": "c1", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "2+2"}'}}
USAGE = {"prompt_tokens": 9, "completion_tokens": 7, "completion_tokens_details": {"reasoning_tokens": 3}}


def chat(body: dict[str, Any], behaviour: str) -> Response:
    """Thinks, and says how often it was asked; with tools it calls the calculator before it answers."""
    asked = sum(message["role"] == "user" for message in body["messages"])
    calls = bool(body.get("tools")) and body["messages"][-1]["role"] == "user"
    message: dict[str, Any] = {"role": "assistant", "content": "" if calls else f"answer {asked}"}
    thinking = "reasoning" if behaviour == "reasoning" else "reasoning_content"
    message[thinking] = "let me see"
    if calls:
        message["tool_calls"] = [CALL]
    reason = "tool_calls" if calls else "stop"
    if not body.get("stream"):
        return JSONResponse(
            {"id": "1", "choices": [{"index": 0, "message": message, "finish_reason": reason}], "usage": USAGE}
        )
    return StreamingResponse(_events(message, thinking, reason, behaviour), media_type="text/event-stream")


async def _events(message: dict[str, Any], thinking: str, reason: str, behaviour: str) -> AsyncIterator[str]:
    def event(delta: dict[str, Any], finish: str | None = None) -> str:
        chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        return f"data: {json.dumps(chunk | {'choices': [{'index': 0, 'delta': delta, 'finish_reason': finish}]})}\n\n"

    yield event({"role": "assistant"})
    for piece in ("let ", "me ", "see"):
        yield event({thinking: piece})
    if behaviour == "cut":
        raise ConnectionResetError
    if behaviour == "ends early":
        return
    if behaviour == "broken event":
        yield "data: {not json\n\n"
        return
    if behaviour == "crawl":
        for _ in range(200):
            yield event({"content": "."})
            await asyncio.sleep(0.02)
    for character in message["content"]:
        yield event({"content": character})
    for index, call in enumerate(message.get("tool_calls", ())):
        arguments = call["function"]["arguments"]
        first = {"name": call["function"]["name"], "arguments": ""}
        yield event({"tool_calls": [{"index": index, "id": call["id"], "type": "function", "function": first}]})
        for piece in (arguments[:5], arguments[5:]):
            yield event({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
    yield event({}, reason)
    yield f"data: {json.dumps({'id': '1', 'choices': [], 'usage': USAGE})}\n\n"
    yield "data: [DONE]\n\n"
