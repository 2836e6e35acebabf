"""A chat model and a token engine against a real server that behaves well and badly."""

from __future__ import annotations

import asyncio
import time
import traceback
from array import array
from collections.abc import Callable, Iterator

import pytest
from starlette.responses import JSONResponse, Response

from rorqual.contracts import ChatReply
from rorqual.engines.http import EndpointConfig, EndpointRefused, EndpointUnavailable, HttpChatModel, ReplyError
from rorqual.engines.http_tokens import HttpEngine, HttpEngineConfig
from rorqual.records import GenerateRequest, Message, SamplingParams, ToolSpec
from rorqual.text.streaming import Delta, join_deltas
from tests.engines.http_server import Server, drawn

KEY = "sk-secret-of-this-test"
HELLO = (Message(role="user", content="hello"),)
CALCULATOR = ToolSpec(name="calculator", description="Add.", parameters={"type": "object", "properties": {}})


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(behaviour: str = "") -> Server:
        servers.append(Server(behaviour))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def config(server: Server, **changes: object) -> EndpointConfig:
    fields = {"base_url": server.url, "model": "m", "timeout_s": 5.0, "backoff_s": 0.01} | changes
    return EndpointConfig(**fields)  # type: ignore[arg-type]


def ask(server: Server, tools: tuple[ToolSpec, ...] = (), **changes: object) -> ChatReply:
    async def call() -> ChatReply:
        model = HttpChatModel(config(server, **changes))
        try:
            return await model.complete(HELLO, tools, SamplingParams(max_new_tokens=8, seed=4))
        finally:
            await model.close()

    return asyncio.run(call())


def streamed(server: Server, tools: tuple[ToolSpec, ...] = (), **changes: object) -> tuple[list[Delta], ChatReply]:
    async def call() -> list[Delta | ChatReply]:
        model = HttpChatModel(config(server, **changes))
        try:
            return [each async for each in model.stream(HELLO, tools)]
        finally:
            await model.close()

    *deltas, reply = asyncio.run(call())
    assert isinstance(reply, ChatReply)
    return [each for each in deltas if isinstance(each, Delta)], reply


@pytest.mark.parametrize("behaviour", ["", "reasoning"])
def test_a_reply_is_typed_and_the_stream_says_the_same(serve, behaviour: str) -> None:
    server = serve(behaviour)
    for tools in ((), (CALCULATOR,)):
        whole = ask(server, tools)
        deltas, reply = streamed(server, tools)
        assert whole.message.thinking == "let me see"
        assert (whole.message, whole.usage, whole.finish_reason) == (reply.message, reply.usage, reply.finish_reason)
        joined = join_deltas(deltas)
        assert (joined.thinking, joined.content) == (reply.message.thinking, reply.message.content)
        assert joined.tool_calls == reply.message.tool_calls
        assert whole.usage is not None
        assert (whole.usage.prompt_tokens, whole.usage.reasoning_tokens) == (9, 3)
        assert len(deltas) > 3, "it comes in pieces"
    assert whole.message.tool_calls[0].arguments == '{"expression": "2+2"}'
    assert whole.finish_reason == "tool_calls"
    assert {"max_tokens": 8, "seed": 4}.items() <= server.bodies[0].items()
    assert "top_k" not in server.bodies[0], "a plain API knows no such field"


def busy(status: int, **headers: str) -> Response:
    return JSONResponse({"error": {"message": f"busy {KEY}"}}, status, headers=headers)


def test_infrastructure_failures_are_retried_and_bad_requests_are_not(serve) -> None:
    server = serve()
    server.faults = [busy(500), busy(503), busy(429)]
    assert ask(server).message.content == "answer 1"
    assert len(server.bodies) == 4
    server.faults = [busy(500)] * 9
    with pytest.raises(EndpointUnavailable, match="answered 500"):
        ask(server, max_attempts=3)
    assert len(server.bodies) == 7
    for status in (400, 401, 404, 422):
        server.faults, calls = [busy(status)], len(server.bodies)
        with pytest.raises(EndpointRefused, match=f"answered {status}"):
            ask(server)
        assert len(server.bodies) == calls + 1


def test_retry_after_is_obeyed_and_a_wait_that_is_too_long_is_not_begun(serve) -> None:
    server = serve()
    server.faults = [busy(429, **{"Retry-After": "0.3"})]
    started = time.monotonic()
    ask(server, backoff_s=0.0)
    assert 0.3 <= time.monotonic() - started < 3.0
    server.faults = [busy(429, **{"Retry-After": "3600"})]
    with pytest.raises(EndpointUnavailable) as caught:
        ask(server)
    assert caught.value.retry_after_s == 3600.0


def test_the_key_is_sent_and_shown_nowhere(serve, monkeypatch) -> None:
    server = serve()
    monkeypatch.setenv("TEST_KEY", KEY)
    ask(server, key_variable="TEST_KEY")
    assert server.keys == [f"Bearer {KEY}"]
    for status in (401, 503):
        server.faults = [busy(status)]
        with pytest.raises((EndpointRefused, EndpointUnavailable)) as caught:
            ask(server, key_variable="TEST_KEY", max_attempts=1)
        shown = "".join(traceback.format_exception(caught.value, chain=True))
        assert "busy ***" in shown
        assert KEY not in shown
        assert caught.value.__context__ is None
        assert caught.value.__cause__ is None
    assert KEY not in repr(config(server, key_variable="TEST_KEY"))
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(ValueError, match="TEST_KEY holds no key"):
        HttpChatModel(config(server, key_variable="TEST_KEY"))


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Response("{not json", media_type="application/json"), ReplyError),
        (Response("<html>", media_type="text/html"), ReplyError),
        (JSONResponse({"choices": []}), ReplyError),
        (JSONResponse({"choices": [{"message": {"content": 7}, "finish_reason": "stop"}]}), ReplyError),
        (JSONResponse([1]), ReplyError),
        (JSONResponse(None), ReplyError),
    ],
)
def test_an_answer_that_is_no_reply_is_a_typed_error(serve, answer: Response, error: type[Exception]) -> None:
    server = serve()
    server.faults = [answer]
    with pytest.raises(error):
        ask(server)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [("cut", EndpointUnavailable), ("ends early", EndpointUnavailable), ("broken event", ReplyError)],
)
def test_a_stream_that_breaks_is_a_typed_error_and_not_retried(serve, behaviour: str, error: type[Exception]) -> None:
    server = serve(behaviour)
    with pytest.raises(error):
        streamed(server)
    assert len(server.bodies) == 1


def test_nobody_listens_and_a_slow_server(serve) -> None:
    server = serve("slow")
    with pytest.raises(EndpointUnavailable, match=r"nothing for 0\.2 s"):
        ask(server, timeout_s=0.2, max_attempts=1)
    with pytest.raises(EndpointUnavailable, match="cannot be reached"):
        ask(server, base_url="http://127.0.0.1:9/v1", max_attempts=2)


def test_calls_in_flight_are_bounded_and_cancelling_ends_them(serve) -> None:
    server = serve("pause")

    async def many() -> None:
        model = HttpChatModel(config(server, max_concurrent=3))
        await asyncio.gather(*(model.complete(HELLO) for _ in range(9)))
        assert server.most_in_flight == 3
        server.behaviour = "slow"
        task = asyncio.create_task(model.complete(HELLO))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in range(100):
            await asyncio.sleep(0.02)
            if server.gone:
                break
        assert server.gone == 1, "the server sees that the client has gone"
        await model.close()

    asyncio.run(many())


def request(name: str = "r", seed: int = 0, **params: float) -> GenerateRequest:
    sampling = SamplingParams(max_new_tokens=9, stop_token_ids=(7,), seed=seed, **params)  # type: ignore[arg-type]
    return GenerateRequest(request_id=name, prompt_ids=array("i", [1, 2]), params=sampling)


@pytest.fixture
def engine_on(serve) -> Iterator[Callable[..., tuple[HttpEngine, Server]]]:
    engines: list[HttpEngine] = []

    def start(behaviour: str = "", interface: str = "vllm", **changes: object) -> tuple[HttpEngine, Server]:
        server = serve(behaviour)
        tempered = bool(changes.pop("tempered_logprobs", False))
        engine = HttpEngine(
            HttpEngineConfig(
                endpoint=config(server, **changes), context_window=32, interface=interface, tempered_logprobs=tempered
            )
        )
        engines.append(engine)
        return engine, server

    yield start
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("interface", ["vllm", "sglang"])
def test_a_completion_is_what_the_server_drew(engine_on, interface: str) -> None:
    engine, server = engine_on(interface=interface)
    engine.submit([request(seed=3)])
    (completion,) = engine.step()
    ids, logprobs = drawn([1, 2], [7], 3, 9)
    assert completion.token_ids.tolist() == ids
    assert completion.logprobs.tolist() == logprobs
    assert completion.entropies.tolist() == [-value for value in logprobs]
    assert [1, 2] in (server.bodies[0].get("prompt"), server.bodies[0].get("input_ids"))


@pytest.mark.parametrize(
    ("interface", "behaviour", "words"),
    [
        ("vllm", "plain", "no token ids"),
        ("vllm", "no logprobs", "no log-probs"),
        ("vllm", "wrong length", "ids and"),
        ("vllm", "other prompt", "another prompt"),
        ("vllm", "null logprob", "TypeError"),
        ("vllm", "positive logprob", "above 0"),
        ("vllm", "own end", "stopped at token 1"),
        ("vllm", "abort", "'abort'"),
        ("vllm", "no token", "0 tokens"),
        ("sglang", "no logprobs", "no log-probs"),
        ("sglang", "wrong length", "output_ids"),
    ],
)
def test_an_answer_that_cannot_be_trained_on_fails_alone(engine_on, interface: str, behaviour: str, words: str) -> None:
    engine, server = engine_on(behaviour, interface)
    engine.submit([request("bad")])
    with pytest.raises(ReplyError, match=words) as caught:
        engine.step()
    assert "'bad'" in str(caught.value)
    assert engine.num_unfinished == 0
    server.behaviour = ""
    engine.submit([request("bad")])
    assert len(engine.step()) == 1


def test_sampling_without_behaviour_logprobs_is_refused(engine_on) -> None:
    engine, server = engine_on()
    for params in ({"top_p": 0.9}, {"top_k": 4}, {"min_p": 0.1}, {"temperature": 0.6}):
        with pytest.raises(ValueError, match=r"log-probs are (not )?those"):
            engine.submit([request(**params)])
    assert engine.num_unfinished == 0
    assert server.bodies == []
    engine.submit([request(temperature=0.0)])
    assert set(engine.step()[0].logprobs) == {0.0}
    tempered, _ = engine_on(tempered_logprobs=True)
    tempered.submit([request(temperature=0.6)])
    assert len(tempered.step()) == 1


def test_the_version_is_the_servers_where_it_names_one(engine_on) -> None:
    engine, _ = engine_on("versioned")
    engine.submit([request()])
    assert (engine.step()[0].weight_version, engine.weight_version) == (5, 5)


def test_an_engine_retries_and_cancels(engine_on) -> None:
    engine, server = engine_on()
    server.faults = [busy(500), busy(429)]
    engine.submit([request()])
    assert len(engine.step()) == 1
    server.faults = [busy(500)] * 4
    engine.submit([request("lost")])
    with pytest.raises(EndpointUnavailable, match="'lost'"):
        engine.step()
    server.behaviour = "slow"
    engine.submit([request("slow")])
    time.sleep(0.2)
    engine.cancel()
    assert engine.num_unfinished == 0
    assert engine.step() == []
    server.behaviour = ""
    engine.submit([request("slow")])
    assert [each.request_id for each in engine.step()] == ["slow"]
