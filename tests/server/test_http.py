"""What the server refuses: wrong keys, hosts, bodies and fields; always in OpenAI's format, never by a traceback."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from schemathesis import checks
from schemathesis.specs.openapi import checks as openapi_checks

from rorqual.server.local import LocalBackend
from rorqual.server.run import ServerConfig, is_loopback, listen
from tests.server.servers import EOS, Served, local_engine, saying, serving, serving_engine, wait_until

ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "4 + 3"}], "max_tokens": 4}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def tiny() -> Iterator[Served]:
    with serving_engine(local_engine(), max_body_bytes=200_000, body_timeout_seconds=1.0, max_new_tokens=64) as server:
        yield server


def check_error(answer: httpx.Response, status: int, words: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert "Traceback" not in answer.text
    assert 'File "' not in answer.text
    return error


def ask(server: Served, path: str = CHAT, **changes: Any) -> httpx.Response:
    body = {**ASKED, **changes} if path == CHAT else {"prompt": "4", "max_tokens": 4, **changes}
    return httpx.post(server.url + path, content=json.dumps(body), headers={"content-type": "application/json"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"messages": []}, "Expected `array` of length >= 1"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "wizard"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the policy speaks next"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "tool", "tool_call_id": "a", "content": "x"}]},
            "call",
        ),
        ({"messages": [{"role": "user", "content": "x " * 2000}]}, "window of 512"),
        ({"temperature": -1}, ">= 0.0"),
        ({"top_p": 1.5}, "<= 1.0"),
        ({"n": 0}, ">= 1"),
        ({"n": 17}, "at most 16"),
        ({"max_tokens": 0}, ">= 1"),
        ({"max_tokens": 65}, "at most 64"),
        ({"max_tokens": "many"}, "Expected `int"),
        ({"seed": 2**70}, ""),
        ({"stop": [""]}, "length >= 1"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, ""),
        ({"tool_choice": "required"}, "no tools that are offered"),
        ({"response_format": {"type": "xml"}}, "xml"),
    ],
)
def test_what_is_wrong_is_said(tiny: Served, changes: dict[str, Any], words: str) -> None:
    error = check_error(ask(tiny, **changes), 400, words)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": []}, ""),
        ({"prompt": [1, "a"]}, "mixes"),
        ({"prompt": [[]]}, "empty"),
        ({"prompt": [10**6]}, "vocabulary"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": ["a"] * 17}, "at most 16"),
    ],
)
def test_what_is_wrong_with_a_completion_is_said(tiny: Served, changes: dict[str, Any], words: str) -> None:
    check_error(ask(tiny, "/v1/completions", **changes), 400, words)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b"[" * 90_000,
        b'{"messages":' + b"[" * 90_000,
        b'{"messages": [{"role": "user", "content": "x"}], "tools": [{"function": {"name": "f", "parameters": '
        + b'{"a":' * 3000
        + b"1"
        + b"}" * 3000
        + b"}}]}",
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 10_000 + b"}",
    ],
)
def test_hostile_bodies(tiny: Served, body: bytes) -> None:
    for path in (CHAT, "/v1/completions"):
        answer = httpx.post(tiny.url + path, content=body, headers={"content-type": "application/json"})
        check_error(answer, 400, "")


def test_bodies_are_bounded_in_size_and_time(tiny: Served) -> None:
    check_error(ask(tiny, messages=[{"role": "user", "content": "x" * 300_000}]), 413, "larger than 200000")

    def pieces() -> Iterator[bytes]:
        for _ in range(300):
            yield b"[" * 1000

    answer = httpx.post(tiny.url + CHAT, content=pieces(), headers={"content-type": "application/json"})
    check_error(answer, 413, "larger")
    with socket.create_connection(("127.0.0.1", int(tiny.url.rpartition(":")[2])), timeout=10) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        slow.sendall(b"Content-Length: 100\r\n\r\n{")
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")


def test_routes_and_methods(tiny: Served) -> None:
    check_error(httpx.get(tiny.url + "/v2/none"), 404, "no such route")
    check_error(httpx.get(tiny.url + CHAT), 405, "another method")
    check_error(ask(tiny, model="gpt-99"), 404, "tiny")
    plain = httpx.post(tiny.url + CHAT, content=json.dumps(ASKED), headers={"content-type": "text/plain"})
    check_error(plain, 415, "application/json")
    assert httpx.get(tiny.url + "/health").json() == {"status": "ok"}


def test_a_page_of_another_site_cannot_ask(tiny: Served) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example:80", ""):
        check_error(httpx.get(tiny.url + "/v1/models", headers={"host": host}), 403, "own machine")
    for host in ("localhost:99", "127.0.0.1", "[::1]:80", "LOCALHOST"):
        assert httpx.get(tiny.url + "/v1/models", headers={"host": host}).status_code == 200


def test_the_key_is_asked_for_everywhere_but_in_health(caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    with serving_engine(local_engine()) as server:
        backend = server.backend
    with serving(_again(backend), api_key="secret-key-1") as server:
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            assert httpx.get(server.url + path, headers=_key("secret-key-1")).status_code == 200
            for headers in ({}, _key("secret-key-2"), _key("secret-key-"), {"authorization": "Basic secret-key-1"}):
                answer = httpx.get(server.url + path, headers=headers)
                assert check_error(answer, 401, "API key")["code"] == "invalid_api_key"
        assert httpx.post(server.url + CHAT, content=b"{").status_code == 401
        assert httpx.get(server.url + "/health").status_code == 200
        assert server.client(api_key="secret-key-1").chat.completions.create(model="", **ASKED).choices
    assert "secret-key" not in caplog.text + "".join(capfd.readouterr())


def _again(backend: Any) -> LocalBackend:
    """A backend like one whose server has ended."""
    return LocalBackend(backend.policy, backend.thread.engine, backend.num_slots, backend.limits, backend.metrics)


def _key(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_metrics_count(tiny: Served) -> None:
    before = _metric(tiny, "rorqual_generated_tokens_total")
    refused = _metric(tiny, 'rorqual_requests_total{route="/v1/chat/completions",status="400"}')
    used = ask(tiny).json()["usage"]["completion_tokens"]
    ask(tiny, n=0)
    assert _metric(tiny, "rorqual_generated_tokens_total") == before + used
    assert _metric(tiny, 'rorqual_requests_total{route="/v1/chat/completions",status="400"}') == refused + 1
    assert _metric(tiny, "rorqual_requests_in_engine") == 0


def _metric(server: Served, name: str) -> float:
    lines = httpx.get(server.url + "/metrics").text.splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + " ")), 0.0)


def test_weights_that_fail_are_an_error_and_the_server_goes_on() -> None:
    model = local_engine()
    with serving_engine(model) as server:
        good = model.model.lm_head.weight.data.clone()
        model.model.lm_head.weight.data.fill_(torch.nan)
        check_error(ask(server), 500, "NaN or infinite")
        with httpx.stream("POST", server.url + CHAT, json={**ASKED, "stream": True}) as answer:
            events = [line for line in answer.iter_lines() if line]
        assert json.loads(events[-1].removeprefix("data: "))["error"]["type"] == "server_error"
        model.model.lm_head.weight.data.copy_(good)
        assert ask(server).status_code == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_dies_says_so() -> None:
    engine = saying("ok" + EOS, pause_seconds=0.05)
    with serving_engine(engine) as server:
        engine.error = KeyError("a mistake in the engine")
        check_error(ask(server), 500, "stopped")
        wait_until(lambda: not server.backend.thread._thread.is_alive())
        check_error(ask(server), 500, "stopped")
        check_error(httpx.get(server.url + "/health"), 503, "stopped")


def test_what_nobody_foresaw_is_500_without_a_word_of_how(tiny: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(body: bytes) -> None:
        raise KeyError("a private matter")

    monkeypatch.setattr(tiny.backend, "chat", broken)
    answer = ask(tiny)
    check_error(answer, 500, "its log says why")
    assert "private" not in answer.text


@pytest.mark.parametrize(
    ("settings_of_server", "words"),
    [
        ({"host": "0.0.0.0"}, "--api-key-file"),
        ({"host": "192.168.1.5"}, "other machines"),
        ({"port": 70000}, "--port"),
        ({"api_key": " "}, "empty"),
    ],
)
def test_what_cannot_be_served(settings_of_server: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ServerConfig(**settings_of_server)
    assert ServerConfig().host == "127.0.0.1"
    assert [is_loopback(host) for host in ("localhost", "::1", "127.9.9.9", "0.0.0.0", "example.com")] == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_a_port_that_is_taken() -> None:
    with listen(ServerConfig(port=0)) as taken, pytest.raises(ValueError, match="Choose another --port"):
        listen(ServerConfig(port=taken.getsockname()[1]))


CHECKS = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.negative_data_rejection,
]
"""Not that whatever fits the schema is accepted: a conversation that nobody can continue fits it."""


def fuzz(server: Served, max_examples: int) -> int:
    """Bodies that the description allows and bodies that it does not, against every route; how many there were."""
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    count = 0
    for each in schema.get_all_operations():
        operation = each.ok()
        good = operation.as_strategy()
        bad = operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)

        @settings(max_examples=max_examples, suppress_health_check=list(HealthCheck), database=None)
        @given(case=good | bad if operation.body else good)
        def attack(case: Any) -> None:
            nonlocal count
            count += 1
            answer = case.call(base_url=server.url, timeout=20)
            assert "Traceback" not in answer.text
            case.validate_response(answer, checks=CHECKS)

        attack()
    return count


def test_bodies_made_from_the_description(tiny: Served) -> None:
    begun = time.monotonic()
    assert fuzz(tiny, 20) > 30
    assert time.monotonic() - begun < 60


@pytest.mark.slow
def test_many_bodies_made_from_the_description(tiny: Served) -> None:
    assert fuzz(tiny, 400) > 600
