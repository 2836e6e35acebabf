"""Many clients at once, some of which go away or read slowly, and a full queue: every slot comes back."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
from array import array
from typing import Any

import httpx
import pytest

from rorqual.records import GenerateRequest, SamplingParams
from rorqual.server.engine_thread import EngineThread
from tests.server.servers import (
    DIRECT,
    ScriptedEngine,
    Served,
    local_engine,
    saying,
    serving_engine,
    wait_until,
)
from tests.text.conversations import ids_of, user

CHAT = "/v1/chat/completions"
LONG = "word " * 400


def body(text: str = "hello", **changes: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **changes}


def is_idle(server: Served) -> bool:
    thread = server.backend.thread
    return thread.num_open == 0 and thread.engine.num_unfinished == 0 and not thread._tickets and not thread._known


async def one_client(client: httpx.AsyncClient, seed: int, plan: random.Random) -> tuple[int, str, str]:
    """Stream an answer, and perhaps leave in the middle or read slowly: (seed, what became of it, its text)."""
    leaves_after = plan.choice([None, None, None, 3])
    pause = plan.choice([0.0, 0.0, 0.01])
    text, count = "", 0
    async with client.stream("POST", CHAT, json=body(f"seed {seed}", seed=seed, max_tokens=24, stream=True)) as answer:
        if answer.status_code != 200:
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) >= 1
            return seed, "refused", ""
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                return seed, "whole", text
            if line:
                choices = json.loads(line.removeprefix("data: "))["choices"]
                text += "".join(choice["delta"].get("content", "") for choice in choices)
                count += 1
                await asyncio.sleep(pause)
            if count == leaves_after:
                return seed, "left", text
    return seed, "cut", text


def test_64_streams_with_leavers_and_slow_readers() -> None:
    """What each client read is what the engine draws for it when it is alone."""
    plan = random.Random(1)
    with serving_engine(local_engine(num_slots=16), num_slots=16, max_waiting=40) as server:

        async def rush() -> list[tuple[int, str, str]]:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=server.url, timeout=30, limits=limits) as client:
                return await asyncio.gather(*(one_client(client, seed, random.Random(seed)) for seed in range(64)))

        outcomes = asyncio.run(rush())
        wait_until(lambda: is_idle(server))
        outcomes += asyncio.run(rush())
        wait_until(lambda: is_idle(server))
    kinds = [kind for _, kind, _ in outcomes]
    assert {"whole", "left", "refused"} == set(kinds)
    assert kinds.count("whole") > 40
    for seed, kind, text in plan.sample([each for each in outcomes if each[1] in ("whole", "left")], 40):
        alone = _alone(seed)
        assert text == alone if kind == "whole" else alone.startswith(text)


def _alone(seed: int) -> str:
    prompt = DIRECT.prompt([user(f"seed {seed}")])
    params = SamplingParams(seed=seed, max_new_tokens=24, stop_token_ids=DIRECT.stop_token_ids)
    request = GenerateRequest(request_id="x", prompt_ids=prompt, params=params)
    return DIRECT.parse(local_engine(1).generate([request])[0].token_ids).message.content


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slots(stream: bool) -> None:
    with serving_engine(saying(LONG, pause_seconds=0.01)) as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        asked = json.dumps(body(stream=stream, n=3)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(address, timeout=10) as client:
            client.sendall(head.encode() + f"Content-Length: {len(asked)}\r\n\r\n".encode() + asked)
            wait_until(lambda: server.backend.thread.engine.num_unfinished == 3)
            if stream:
                assert b"200 OK" in client.recv(1000)
        wait_until(lambda: is_idle(server), 3.0)
        assert len(server.backend.thread.engine.aborted) == 3
        wait_until(lambda: "rorqual_requests_abandoned_total 1.0" in httpx.get(server.url + "/metrics").text)


def test_a_reader_that_stops_reading_is_given_up() -> None:
    """It reads nothing while the answer fills every buffer on the way; a long name makes every event large."""
    engine = ScriptedEngine(lambda request: list(ids_of("word ")) * 4000)
    engine.context_window = 10**6
    with serving_engine(engine, name="tiny" * 5000, send_timeout_seconds=1.0) as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        asked = json.dumps(body(stream=True)).encode()
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(address)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(head.encode() + f"Content-Length: {len(asked)}\r\n\r\n".encode() + asked)
        wait_until(lambda: server.backend.thread.num_open == 1)
        assert httpx.post(server.url + CHAT, json=body(max_tokens=5), timeout=10).status_code == 200
        wait_until(lambda: is_idle(server), 30.0)
        client.close()


def test_a_stop_string_frees_its_slot_at_once() -> None:
    with serving_engine(saying(LONG, pause_seconds=0.005)) as server:
        answer = httpx.post(server.url + CHAT, json=body(stop="word word", n=2), timeout=10).json()
        assert [choice["message"]["content"] for choice in answer["choices"]] == ["", ""]
        wait_until(lambda: is_idle(server), 2.0)
        assert len(server.backend.thread.engine.aborted) == 2


def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    with serving_engine(saying(LONG, pause_seconds=0.005), num_slots=2, max_waiting=1) as server:
        answers: list[httpx.Response] = []

        def ask() -> None:
            answers.append(httpx.post(server.url + CHAT, json=body(max_tokens=60), timeout=20))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        statuses = sorted(answer.status_code for answer in answers)
        assert statuses == [200] * 3 + [429] * 5
        for answer in answers:
            if answer.status_code == 429:
                assert 1 <= int(answer.headers["retry-after"]) <= 60
                assert answer.json()["error"]["code"] == "queue_full"
        assert httpx.post(server.url + CHAT, json=body(n=4), timeout=10).status_code == 400
        assert httpx.post(server.url + CHAT, json=body(max_tokens=2), timeout=10).status_code == 200


def test_an_answer_that_takes_too_long_is_given_up() -> None:
    with serving_engine(saying(LONG, pause_seconds=0.01), request_timeout_seconds=1.0) as server:
        answer = httpx.post(server.url + CHAT, json=body(), timeout=10)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "timeout")
        wait_until(lambda: is_idle(server), 2.0)


def test_a_server_that_ends_tells_those_who_wait() -> None:
    engine = saying(LONG, pause_seconds=0.02)

    async def watch() -> str:
        thread = EngineThread(engine, 4)
        thread.start()
        request = GenerateRequest(
            request_id="x", prompt_ids=array("i", [1]), params=SamplingParams(max_new_tokens=1000)
        )
        with thread.open([request]) as ticket:
            asyncio.get_running_loop().call_later(0.2, thread.close)
            try:
                async for _ in ticket.events():
                    pass
            except Exception as error:  # noqa: BLE001
                return str(error)
        return ""

    assert "shutting down" in asyncio.run(watch())
