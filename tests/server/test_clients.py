"""The server as OpenAI's own client and curl see it."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from array import array
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest

from rorqual.records import GenerateRequest, SamplingParams
from rorqual.text.encoding import Encoding
from tests.server.servers import DIRECT, EOS, TOKENIZER, Served, local_engine, saying, serving_engine
from tests.text.conversations import V32, ids_of, user

ASKED = [{"role": "user", "content": "What is 4 + 3?"}]
CALLS = (
    "\n\n<｜DSML｜function_calls>\n"
    '<｜DSML｜invoke name="find">\n<｜DSML｜parameter name="query" string="true">sea</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="limit" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    '<｜DSML｜invoke name="find">\n<｜DSML｜parameter name="query" string="true">日本 🐋</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜function_calls>" + EOS
)
FIND = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Find pages.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}, "limit": {"type": "integer"}}},
    },
}


@pytest.fixture(scope="module")
def tiny() -> Iterator[Served]:
    with serving_engine(local_engine()) as server:
        yield server


def expected(prompt: array[int], **params: object) -> list[int]:
    """What the engine draws for a prompt when it is alone."""
    stop = DIRECT.stop_token_ids
    request = GenerateRequest(request_id="x", prompt_ids=prompt, params=SamplingParams(stop_token_ids=stop, **params))
    return list(local_engine().generate([request])[0].token_ids)


def test_models(tiny: Served) -> None:
    (card,) = tiny.client().models.list()
    assert (card.id, card.object) == ("tiny", "model")
    assert card.max_model_len == 512


def test_a_chat_is_what_the_engine_draws(tiny: Served) -> None:
    prompt = DIRECT.prompt([user("What is 4 + 3?")])
    answer = tiny.client().chat.completions.create(
        model="tiny", messages=ASKED, max_completion_tokens=9, seed=5, n=2, temperature=0.8, top_p=0.9
    )
    for index, choice in enumerate(answer.choices):
        ids = expected(prompt, max_new_tokens=9, seed=5 + index, temperature=0.8, top_p=0.9)
        assert choice.message.content == DIRECT.parse(ids).message.content
        assert choice.finish_reason == ("stop" if ids[-1] in DIRECT.stop_token_ids else "length")
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.total_tokens == len(prompt) + answer.usage.completion_tokens


def test_a_stream_says_what_the_whole_says(tiny: Served) -> None:
    asked = {"model": "tiny", "messages": ASKED, "max_tokens": 30, "seed": 9, "n": 3}
    whole = tiny.client().chat.completions.create(**asked)
    parts, ends, used = ["", "", ""], [None] * 3, None
    for chunk in tiny.client().chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        used = chunk.usage or used
        for choice in chunk.choices:
            parts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert parts == [choice.message.content for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert used == whole.usage


def test_asynchronous_clients_share_the_engine(tiny: Served) -> None:
    async def ask_all() -> list[str]:
        async with tiny.async_client() as client:
            asked = [
                client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=8, seed=seed)
                for seed in range(12)
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]

    prompt = DIRECT.prompt([user("What is 4 + 3?")])
    alone = [DIRECT.parse(expected(prompt, max_new_tokens=8, seed=seed)).message.content for seed in range(12)]
    assert asyncio.run(ask_all()) == alone


def test_log_probs(tiny: Served) -> None:
    asked = {"model": "tiny", "messages": ASKED, "max_tokens": 6, "seed": 1, "logprobs": True, "top_logprobs": 3}
    answer = tiny.client().chat.completions.create(**asked)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert sorted((other.logprob for other in entry.top_logprobs), reverse=True) == [
            other.logprob for other in entry.top_logprobs
        ]
        assert entry.logprob <= entry.top_logprobs[0].logprob <= 0
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token
    streamed = [
        entry
        for chunk in tiny.client().chat.completions.create(**asked, stream=True)
        for choice in chunk.choices
        if choice.logprobs
        for entry in choice.logprobs.content
    ]
    assert streamed == entries


def test_completions(tiny: Served) -> None:
    client = tiny.client()
    prompt = [TOKENIZER.special_id("bos"), *TOKENIZER.encode("4 + 3 =")]
    texts = ["4 + 3 =", prompt]
    answers = [
        client.completions.create(model="tiny", prompt=each, max_tokens=7, seed=2, temperature=0.5) for each in texts
    ]
    ids = expected(array("i", prompt), max_new_tokens=7, seed=2, temperature=0.5)
    ids = [token for token in ids if token not in DIRECT.stop_token_ids]
    assert [answer.choices[0].text for answer in answers] == [TOKENIZER.decode(ids)] * 2
    streamed = client.completions.create(
        model="tiny", prompt="4 + 3 =", max_tokens=7, seed=2, temperature=0.5, stream=True, logprobs=1
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == answers[0].choices[0].text
    many = client.completions.create(model="tiny", prompt=["4", "3"], n=2, max_tokens=3, logprobs=2)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert len(many.choices[0].logprobs.tokens) == len(many.choices[0].logprobs.token_logprobs) > 0


class Place(pydantic.BaseModel):
    model_config = {"extra": "forbid"}
    kind: Literal["sea", "land"]
    depth: int
    deep: bool


def test_structured_output_of_a_random_policy_is_what_was_asked_for(tiny: Served) -> None:
    client = tiny.client()
    for seed in range(6):
        answer = client.chat.completions.parse(
            model="tiny", messages=ASKED, max_tokens=300, seed=seed, response_format=Place, top_p=0.95
        )
        assert answer.choices[0].finish_reason == "stop"
        assert isinstance(answer.choices[0].message.parsed, Place)
    answer = client.chat.completions.create(
        model="tiny", messages=ASKED, max_tokens=400, temperature=0.3, response_format={"type": "json_object"}
    )
    text = answer.choices[0].message.content
    assert text.startswith("{")
    assert answer.choices[0].finish_reason == "length" or isinstance(json.loads(text), dict)


def test_thinking_is_free_and_the_answer_is_bound() -> None:
    """The policy thinks until it draws `</think>`; a schema binds what follows, and never what comes before."""
    model = local_engine()
    model.model.lm_head.weight.data[TOKENIZER.special_id("think_close")] *= 4
    ended = 0
    with serving_engine(model, V32) as server:
        for seed in range(4):
            answer = server.client().chat.completions.create(
                model="tiny",
                messages=ASKED,
                seed=seed,
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"enum": ["sea", "land"]}},
                },
            )
            message, details = answer.choices[0].message, answer.usage.completion_tokens_details
            if answer.choices[0].finish_reason == "stop":
                ended += 1
                assert json.loads(message.content) in ("sea", "land")
                assert 0 <= details.reasoning_tokens < answer.usage.completion_tokens
    assert ended


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "object", "properties": {"a": {"not": {"type": "string"}}}}, "not"),
        ({"type": "nonsense"}, "nonsense"),
        ({"$ref": "http://127.0.0.1:1/x.json"}, "cannot be enforced"),
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused(tiny: Served, schema: dict, words: str) -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        tiny.client().chat.completions.create(model="tiny", messages=ASKED, response_format=asked)
    assert caught.value.code == "unsupported_schema"


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_and_calls(stream: bool) -> None:
    """What the policy wrote comes apart in the same way, whole and streamed, and goes back in as it came."""
    with serving_engine(saying("Look it up 🐋.</think>I search." + CALLS), V32) as server:
        client = server.client()
        asked = {"model": "tiny", "messages": ASKED, "tools": [FIND], "tool_choice": "auto"}
        if stream:
            with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as events:
                answer = events.get_final_completion()
        else:
            answer = client.chat.completions.create(**asked)
        (choice,) = answer.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "I search."
        assert [call.function.name for call in choice.message.tool_calls] == ["find", "find"]
        assert [json.loads(call.function.arguments) for call in choice.message.tool_calls] == [
            {"query": "sea", "limit": 3},
            {"query": "日本 🐋"},
        ]
        assert answer.usage.completion_tokens_details.reasoning_tokens == len(ids_of("Look it up 🐋."))
        if stream:
            return
        assert choice.message.reasoning_content == choice.message.reasoning == "Look it up 🐋."
        said = choice.message.model_dump()
        results = [{"role": "tool", "tool_call_id": call.id, "content": "ok"} for call in choice.message.tool_calls]
        client.chat.completions.create(model="tiny", messages=[*ASKED, said, *results[::-1]], tools=[FIND])
        engine = server.backend.thread.engine
        first, second = (list(request.prompt_ids) for request in engine.submitted)
        drawn = list(ids_of("Look it up 🐋.</think>I search." + CALLS))
        assert second[: len(first)] == first
        assert TOKENIZER.decode(second[len(first) :]).startswith(TOKENIZER.decode(drawn))


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "open"}}])
@pytest.mark.parametrize("encoding", [DIRECT, V32])
def test_a_random_policy_can_be_made_to_call(choice: Any, encoding: Encoding) -> None:
    """Every answer begins, behind its thinking, with a call of a tool that is offered."""
    engine = local_engine()
    if encoding is V32:
        engine.model.lm_head.weight.data[TOKENIZER.special_id("think_close")] *= 4
    tools: Any = [FIND, {"type": "function", "function": {"name": "open"}}]
    begun = set()
    with serving_engine(engine, encoding) as server:
        for seed in range(6):
            request = {"model": "tiny", "messages": ASKED, "tools": tools, "tool_choice": choice, "seed": seed}
            request |= {"max_tokens": 120, "temperature": 1.0 if encoding is V32 else 5.0}
            (answer,) = server.client().chat.completions.create(**request).choices
            begin = r'\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="(\w+)">\n'
            found = re.match(begin, answer.message.content or "")
            if encoding is V32 and not answer.message.content:
                assert answer.finish_reason == "length"
                continue
            assert found
            begun.add(found[1])
    offered = {"find", "open"} if choice == "required" else {"open"}
    assert begun == offered if encoding is DIRECT else begun and begun <= offered
    with serving_engine(engine, encoding) as server, pytest.raises(openai.BadRequestError, match="'fly' is not one"):
        fly: Any = {"type": "function", "function": {"name": "fly"}}
        server.client().chat.completions.create(model="tiny", messages=ASKED, tools=tools, tool_choice=fly)


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_and_no_more(stream: bool) -> None:
    with serving_engine(saying("I search." + CALLS)) as server:
        asked: Any = {"model": "tiny", "messages": ASKED, "tools": [FIND], "parallel_tool_calls": False}
        if stream:
            with server.client().chat.completions.stream(**asked) as events:
                (choice,) = events.get_final_completion().choices
        else:
            (choice,) = server.client().chat.completions.create(**asked).choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "I search."
        (call,) = choice.message.tool_calls
        assert json.loads(call.function.arguments) == {"query": "sea", "limit": 3}


def test_past_thinking_is_kept_by_the_formats_rule() -> None:
    with serving_engine(saying("ok</think>ok" + EOS), V32) as server:
        past = [*ASKED, {"role": "assistant", "content": "7", "reasoning_content": "four and three"}]
        server.client().chat.completions.create(model="tiny", messages=[*past, {"role": "user", "content": "Sure?"}])
        (request,) = server.backend.thread.engine.submitted
        assert "four and three" not in TOKENIZER.decode(request.prompt_ids)
        assert TOKENIZER.decode(request.prompt_ids).endswith("<think>")


@pytest.mark.parametrize(
    ("switch", "thinks"),
    [
        ({"thinking": {"type": "enabled"}}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"chat_template_kwargs": {"thinking": True}}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "high"}, True),
        ({}, False),
    ],
)
def test_thinking_is_turned_on_and_off(switch: dict, thinks: bool) -> None:
    with serving_engine(saying("four</think>7" + EOS)) as server:
        answer = server.client().chat.completions.create(model="tiny", messages=ASKED, extra_body=switch)
        message = answer.choices[0].message
        assert message.content == ("7" if thinks else "four</think>7")
        assert getattr(message, "reasoning_content", None) == ("four" if thinks else None)
        contradiction = {"thinking": {"type": "enabled"}, "reasoning_effort": "none"}
        with pytest.raises(openai.BadRequestError, match="on and off"):
            server.client().chat.completions.create(model="tiny", messages=ASKED, extra_body=contradiction)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("stop", "said"), [("END", "one two "), (["x", "wo", "two"], "one "), ("absent", None)])
def test_a_stop_string_is_found_wherever_tokens_are_cut(stream: bool, stop: object, said: str | None) -> None:
    text = "one two ENDE 🐋 more and more"
    with serving_engine(saying(text + EOS)) as server:
        answer = server.client().chat.completions.create(model="tiny", messages=ASKED, stop=stop, stream=stream)
        if stream:
            parts = [choice for chunk in answer for choice in chunk.choices]
            content = "".join(part.delta.content or "" for part in parts)
            assert parts[-1].finish_reason == "stop"
        else:
            content = answer.choices[0].message.content
        assert content == (text if said is None else said)
        completion = server.client().completions.create(model="tiny", prompt="x", stop=stop, max_tokens=99)
        assert completion.choices[0].text == content


def test_a_run_is_asked_under_its_own_system_message() -> None:
    with serving_engine(saying("ok" + EOS), system="Be brief.") as server:
        client = server.client()
        client.chat.completions.create(model="tiny", messages=ASKED)
        client.chat.completions.create(model="tiny", messages=[{"role": "system", "content": "Sing."}, *ASKED])
        shown = [TOKENIZER.decode(request.prompt_ids) for request in server.backend.thread.engine.submitted]
        assert ["Be brief." in text for text in shown] == [True, False]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(tiny: Served) -> None:
    body = json.dumps({"messages": ASKED, "max_tokens": 4, "stream": True, "seed": 3})
    command = ["curl", "-sSN", "--max-time", "20", f"{tiny.url}/v1/chat/completions"]
    command += ["-H", "Content-Type: application/json", "-d", body]
    events = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
