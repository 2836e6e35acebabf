"""As a front of another server: thinking that the rule drops stays here, all else goes through, errors are mapped."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import openai
import pytest

from rorqual.rollout.context import ContextConfig
from rorqual.server.context import ContextPolicy
from rorqual.server.limits import ServerLimits
from rorqual.server.upstream import UpstreamBackend, retained
from rorqual.text.openai import message_to_openai
from tests.server.servers import DIRECT, EOS, Served, saying, serving, serving_engine, wait_until
from tests.server.test_context import WINDOW, turn
from tests.text.conversations import V32, user

PAST = [
    {"role": "user", "content": "4 + 3?"},
    {"role": "assistant", "content": "7", "reasoning_content": "four and three", "reasoning": "four and three"},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}], "name": "x"},
    {"role": "assistant", "content": None, "reasoning_content": "look", "tool_calls": [{"id": "a", "odd": 1}]},
]


@contextlib.contextmanager
def front(url: str, **settings: Any) -> Iterator[Served]:
    limits = ServerLimits(**settings.pop("limits", {}))
    given = {"api_key": None, "retention": "since_last_user", "limits": limits, "max_in_flight": 8, **settings}
    with serving(UpstreamBackend(url, **given), limits=limits) as server:
        yield server


class Another:
    """A server that answers what it is told, and remembers what it was asked."""

    def __init__(self) -> None:
        self.status, self.body, self.kind = 200, b"{}", "application/json"
        self.headers: dict[str, str] = {}
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self.pause_seconds, self.broken_pipes = 0.0, 0
        self.breaks_off = False

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        place = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["content-length"]))
                place.asked.append((self.path, dict(self.headers), json.loads(data)))
                self._answer()

            def do_GET(self) -> None:
                place.asked.append((self.path, dict(self.headers), None))
                self._answer()

            def _answer(self) -> None:
                self.send_response(place.status)
                for name, value in {"content-type": place.kind, **place.headers}.items():
                    self.send_header(name, value)
                if place.breaks_off:
                    self.send_header("content-length", "100000")
                self.end_headers()
                try:
                    for start in range(0, len(place.body), 64):
                        time.sleep(place.pause_seconds)
                        self.wfile.write(place.body[start : start + 64])
                        self.wfile.flush()
                except OSError:
                    place.broken_pipes += 1

            def log_message(self, *arguments: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join(5)


@pytest.mark.parametrize(("rule", "kept"), [("since_last_user", [3]), ("all", [1, 3]), ("none", [3])])
def test_only_thinking_is_taken_out(rule: Any, kept: list[int]) -> None:
    shown = retained(PAST, rule)
    for index, (before, after) in enumerate(zip(PAST, shown, strict=True)):
        if index in kept:
            assert after == before
        else:
            assert after == {name: value for name, value in before.items() if "reasoning" not in name}


def test_the_body_goes_on_as_it_came_with_the_key_of_this_server() -> None:
    another = Another()
    another.body = b'{"choices": [], "odd": 1}'
    with another.running() as url, front(url + "/v1/", api_key="upstream-secret") as server:
        body = {"messages": PAST, "model": "m", "vendor_field": {"deep": [1, 2.50]}, "seed": 12345678901234567890}
        headers = {"authorization": "Bearer of-the-client", "cookie": "a=b"}
        answer = httpx.post(server.url + "/v1/chat/completions", json=body, headers=headers)
        assert answer.json() == {"choices": [], "odd": 1}
        httpx.post(server.url + "/v1/completions", json={"prompt": "x"})
        assert httpx.get(server.url + "/v1/models").status_code == 200
    (path, sent, asked), *others = another.asked
    assert path == "/v1/chat/completions"
    assert asked == {**body, "messages": retained(PAST, "since_last_user")}
    assert {name.lower(): value for name, value in sent.items()}["authorization"] == "Bearer upstream-secret"
    assert "of-the-client" not in str(sent)
    assert "a=b" not in str(sent)
    assert [path for path, _, _ in others] == ["/v1/completions", "/v1/models"]


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_through_two_servers_of_ours(stream: bool) -> None:
    with serving_engine(saying("four</think>seven 🐋" + EOS), V32) as behind, front(behind.url) as server:
        asked: dict[str, Any] = {"model": "tiny", "messages": [*PAST[:2], {"role": "user", "content": "sure?"}]}
        if stream:
            with server.client().chat.completions.stream(**asked) as events:
                message = events.get_final_completion().choices[0].message
        else:
            message = server.client().chat.completions.create(**asked).choices[0].message
        assert message.content == "seven 🐋"
        with pytest.raises(openai.BadRequestError, match="the policy speaks next") as caught:
            server.client().chat.completions.create(model="tiny", messages=PAST[:2], stream=stream)
        assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("status", "body", "expected", "words"),
    [
        (400, b'{"error": {"message": "too long", "code": "c"}}', 400, "too long"),
        (404, b'{"message": "no model", "object": "error"}', 404, "no model"),
        (422, b"<html>", 422, "refused with status 422"),
        (429, b'{"error": {"message": "slow down"}}', 429, "slow down"),
        (401, b'{"error": {"message": "bad key sk-123"}}', 502, "its owner"),
        (500, b'Traceback (most recent call last): File "x.py"', 502, "status 500"),
        (503, b'{"error": {"message": "Traceback"}}', 502, "status 503"),
        (302, b"", 502, "status 302"),
        (200, b"<html>", 502, "not JSON"),
    ],
)
def test_what_goes_wrong_behind(status: int, body: bytes, expected: int, words: str) -> None:
    another = Another()
    another.status, another.body, another.headers = (
        status,
        body,
        {"Retry-After": "7", "Location": "http://127.0.0.1:1/"},
    )
    with another.running() as url, front(url) as server:
        answer = httpx.post(server.url + "/v1/chat/completions", json={"messages": PAST})
        assert answer.status_code == expected
        assert words in answer.json()["error"]["message"]
        assert "Traceback" not in answer.text
        assert "sk-123" not in answer.text
        assert answer.headers.get("retry-after") == ("7" if status == 429 else None)


def test_nobody_is_there_and_nobody_answers() -> None:
    with front("http://127.0.0.1:9") as server:
        answer = httpx.post(server.url + "/v1/chat/completions", json={"messages": PAST})
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_failed")
    another = Another()
    another.pause_seconds = 3.0
    with another.running() as url, front(url, limits={"request_timeout_seconds": 1.0}) as server:
        answer = httpx.post(server.url + "/v1/chat/completions", json={"messages": PAST}, timeout=10)
        assert answer.status_code in (503, 504)


def test_a_stream_that_breaks_off_ends_with_an_error() -> None:
    another = Another()
    another.kind, another.body, another.breaks_off = "text/event-stream", b'data: {"choices": []}\n\n', True
    with another.running() as url, front(url) as server:
        answer = httpx.post(server.url + "/v1/chat/completions", json={"messages": PAST, "stream": True})
        events = [line for line in answer.text.split("\n\n") if line]
        assert events[0] == 'data: {"choices": []}'
        assert "broke off" in json.loads(events[-1].removeprefix("data: "))["error"]["message"]


def test_a_client_that_goes_away_is_let_go_behind_too_and_the_queue_is_bounded() -> None:
    another = Another()
    another.kind, another.body, another.pause_seconds = "text/event-stream", b"data: {}\n\n" * 2000, 0.02
    with another.running() as url, front(url, max_in_flight=1) as server:
        with httpx.stream("POST", server.url + "/v1/chat/completions", json={"messages": PAST}) as answer:
            pieces = answer.iter_bytes()
            assert next(pieces)
            refused = httpx.post(server.url + "/v1/chat/completions", json={"messages": PAST})
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
        wait_until(lambda: another.broken_pipes == 1)
        wait_until(lambda: server.backend.load()["requests_upstream"] == 0)


def test_contexts_are_managed_for_a_server_that_does_not() -> None:
    another = Another()
    context = (ContextPolicy(ContextConfig(strategy="discard_all_results"), WINDOW), DIRECT)
    messages = [user("question")] + [message for number in range(6) for message in turn(number, 90)]
    asked = [{**message_to_openai(message), "vendor": index} for index, message in enumerate(messages)]
    with another.running() as url, front(url, context=context) as server:
        assert httpx.post(server.url + "/v1/chat/completions", json={"messages": asked}).status_code == 200
    shown = another.asked[0][2]["messages"]
    assert len(shown) == len(asked)
    assert shown[0] == asked[0]
    assert shown[1::2] == asked[1::2]
    assert "r0 x" not in str(shown)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"messages": 3}', b'{"messages": []}', b'{"messages": [3]}', b'{"messages": [{}]}']
)
def test_hostile_bodies_do_not_go_on(body: bytes) -> None:
    another = Another()
    with another.running() as url, front(url) as server:
        answer = httpx.post(
            server.url + "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert another.asked == []


@pytest.mark.parametrize("url", ["", "ftp://x", "http://", "127.0.0.1:80", "http://user:key@host", "http://h/?q=1"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match="not the address of a server"):
        UpstreamBackend(url, None, "all", ServerLimits(), 1)
