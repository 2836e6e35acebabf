"""What every implementation of a protocol in rorqual/contracts.py must do, the fakes of the tests among them."""

from __future__ import annotations

import asyncio
import functools
from array import array
from collections.abc import Callable
from typing import Literal

import pytest
import torch

from rorqual.contracts import Engine, Environment
from rorqual.engines.http import EndpointConfig
from rorqual.engines.http_tokens import HttpEngine, HttpEngineConfig
from rorqual.engines.local import EngineConfig, LocalEngine
from rorqual.envs.dialogue import DialogueConfig, DialogueEnvironment
from rorqual.models.config import ModelConfig
from rorqual.models.decoder import Decoder
from rorqual.records import (
    Completion,
    Evidence,
    GenerateRequest,
    Message,
    SamplingParams,
    Segment,
    Task,
    ToolCall,
    from_json,
    to_json,
)
from tests.engines.http_server import Server
from tests.rollout.fakes import FakeEngine, Interviewer

WINDOW = 32
VOCABULARY = 40
STOP = 7


def local_engine() -> LocalEngine:
    config = ModelConfig(
        family="qwen3",
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        context_window=WINDOW,
        qk_norm=True,
    )
    model = Decoder(config).eval()
    model.initialize(torch.Generator().manual_seed(0))
    return LocalEngine(model, EngineConfig(num_slots=3), weight_version=3)


@functools.cache
def server() -> Server:
    return Server()


def http_engine(interface: Literal["vllm", "sglang"]) -> HttpEngine:
    endpoint = EndpointConfig(base_url=server().url, model="m", max_concurrent=3)
    config = HttpEngineConfig(endpoint=endpoint, context_window=WINDOW, interface=interface)
    return HttpEngine(config, weight_version=3)


ENGINES: dict[str, Callable[[], Engine]] = {
    "local": local_engine,
    "fake": lambda: FakeEngine(VOCABULARY, context_window=WINDOW, max_in_flight=3),
    "vllm over http": lambda: http_engine("vllm"),
    "sglang over http": lambda: http_engine("sglang"),
}

ENVIRONMENTS: dict[str, Callable[[], Environment]] = {
    "dialogue": DialogueEnvironment,
    "dialogue with a system message": lambda: DialogueEnvironment(DialogueConfig(system="Be brief.", suffix=" Think.")),
    "interviewer": Interviewer,
    "interviewer with follow-ups": lambda: Interviewer(follow_ups=2),
}

engines = pytest.mark.parametrize("make", ENGINES.values(), ids=ENGINES)
environments = pytest.mark.parametrize("make", ENVIRONMENTS.values(), ids=ENVIRONMENTS)


def request(name: str, prompt: list[int], seed: int, max_new_tokens: int = 9) -> GenerateRequest:
    params = SamplingParams(max_new_tokens=max_new_tokens, stop_token_ids=(STOP,), seed=seed)
    return GenerateRequest(request_id=name, prompt_ids=array("i", prompt), params=params)


REQUESTS = [request(str(i), [1 + i % 5] * (1 + i % 4), seed=i) for i in range(8)]


def finished(engine: Engine) -> dict[str, Completion]:
    """All that the engine has yet to say, by request."""
    completions: list[Completion] = []
    while engine.num_unfinished:
        completions += engine.step()
    assert len({each.request_id for each in completions}) == len(completions), "each request is answered once"
    return {each.request_id: each for each in completions}


@engines
def test_engine_answers_every_request_once_with_whole_columns(make: Callable[[], Engine]) -> None:
    engine = make()
    assert (engine.context_window, engine.weight_version, engine.num_unfinished) == (WINDOW, 3, 0)
    assert engine.step() == []
    engine.submit(REQUESTS)
    assert engine.num_unfinished == len(REQUESTS)
    completions = finished(engine)
    assert completions.keys() == {each.request_id for each in REQUESTS}
    assert {each.finish_reason for each in completions.values()} == {"stop", "length"}, "else this test shows little"
    for each in completions.values():
        length = len(each.token_ids)
        assert 1 <= length <= 9
        assert all(0 <= token < VOCABULARY for token in each.token_ids)
        assert len(each.logprobs) == len(each.entropies) == len(each.kept_mass) == length
        assert all(value <= 0.0 for value in each.logprobs)
        assert all(value >= 0.0 for value in each.entropies)
        assert all(0.0 < value <= 1.0 + 1e-6 for value in each.kept_mass)
        assert STOP not in each.token_ids[:-1]
        assert (each.token_ids[-1] == STOP) == (each.finish_reason == "stop")
        assert each.finish_reason == "stop" or length == 9
        assert each.weight_version == engine.weight_version
        assert each.kept is None or len(each.kept) == length


@engines
def test_engine_draws_by_the_seed_of_a_request_whatever_shares_the_batch(make: Callable[[], Engine]) -> None:
    together = make()
    together.submit(REQUESTS)
    expected = {name: each.token_ids for name, each in finished(together).items()}
    for each in REQUESTS:
        alone = make()
        alone.submit([each])
        assert finished(alone)[each.request_id].token_ids == expected[each.request_id]
    reseeded = make()
    reseeded.submit([request(each.request_id, each.prompt_ids.tolist(), 100 + i) for i, each in enumerate(REQUESTS)])
    assert {name: each.token_ids for name, each in finished(reseeded).items()} != expected


@engines
@pytest.mark.parametrize("prompt", [[], [1] * WINDOW, [1] * (WINDOW + 1)], ids=["empty", "full", "too long"])
def test_engine_refuses_a_prompt_without_room(make: Callable[[], Engine], prompt: list[int]) -> None:
    engine = make()
    with pytest.raises(ValueError, match=r"."):
        engine.submit([request("bad", prompt, 0)])
    assert engine.num_unfinished == 0


@engines
def test_engine_refuses_an_id_in_flight_and_takes_it_again_afterwards(make: Callable[[], Engine]) -> None:
    engine = make()
    engine.submit(REQUESTS[:1])
    with pytest.raises(ValueError, match=r"0"):
        engine.submit(REQUESTS[:1])
    first = finished(engine)
    engine.submit(REQUESTS[:1])
    assert finished(engine) == first


@engines
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_engine_goes_on_bit_for_bit_from_its_state(make: Callable[[], Engine], steps: int) -> None:
    engine = make()
    engine.submit(REQUESTS)
    for _ in range(steps):
        engine.step()
    state, fresh = engine.state_dict(), make()
    fresh.load_state_dict(state)
    assert fresh.num_unfinished == engine.num_unfinished
    expected = finished(engine)
    assert expected
    assert finished(fresh) == expected


TASK = Task(
    task_id="sum/test/1",
    environment="any",
    domain="mathematics",
    messages=(Message(role="user", content="4 + 3 ="),),
    payload={"dataset": "chain_sum", "entry": {"question": "4 + 3 =", "answer": "7", "metadata": {}}},
)
ANSWER = Message(role="assistant", thinking="4+3=7", content="<answer>7</answer>")
MOST_TURNS = 5


def segment(num_sampled: int) -> Segment:
    zeros = array("f", [0.0] * (2 + num_sampled))
    return Segment(
        token_ids=array("i", range(2 + num_sampled)),
        sampled=array("b", [0, 0] + [1] * num_sampled),
        logprobs=zeros,
        entropies=zeros,
        weight_version=0,
    )


def played(environment: Environment) -> tuple[Message, ...]:
    """A whole episode in which the policy always gives the same answer."""
    messages = environment.start(TASK)
    for _ in range(MOST_TURNS):
        messages = (*messages, ANSWER)
        answer = environment.respond(TASK, messages)
        if not answer:
            return messages
        assert {message.role for message in answer} <= {"user", "tool"}
        messages = (*messages, *answer)
    raise AssertionError(f"The episode has not ended after {MOST_TURNS} turns.")


@environments
def test_environment_asks_and_ends(make: Callable[[], Environment]) -> None:
    environment = make()
    start = environment.start(TASK)
    assert start[-1].role == "user"
    assert TASK.messages[-1].content in start[-1].content
    assert "assistant" not in {message.role for message in start}
    messages = played(environment)
    assert messages[: len(start)] == start
    assert messages[-1] == ANSWER


@environments
def test_environment_gives_the_same_again_so_that_an_episode_can_be_replayed(make: Callable[[], Environment]) -> None:
    environment = make()
    assert played(environment) == played(environment) == played(make())


@environments
def test_environment_answers_or_refuses_every_call(make: Callable[[], Environment]) -> None:
    environment = make()
    call = ToolCall(id="c0", name="no such tool", arguments="{}")
    messages = (*environment.start(TASK), Message(role="assistant", tool_calls=(call,)))
    assert call.name not in [tool.name for tool in environment.tools(TASK)]
    with pytest.raises(ValueError, match=r"."):
        asyncio.run(environment.call(TASK, messages, call))


@engines
def test_engine_withdraws_one_request_and_the_others_do_not_notice(make: Callable[[], Engine]) -> None:
    engine, whole = make(), make()
    whole.submit(REQUESTS)
    expected = finished(whole)
    engine.submit(REQUESTS)
    assert engine.abort("2")
    assert not engine.abort("2")
    assert not engine.abort("no such request")
    found = {name: each.token_ids for name, each in finished(engine).items()}
    assert found == {name: each.token_ids for name, each in expected.items() if name != "2"}


@environments
@pytest.mark.parametrize("end", ["stop", "length", "turn_limit", "prompt_too_long"])
def test_environment_gathers_evidence_of_whatever_happened(make: Callable[[], Environment], end: str) -> None:
    environment = make()
    messages = environment.start(TASK) if end == "prompt_too_long" else played(environment)
    segments = [] if end == "prompt_too_long" else [segment(4), segment(5)]
    evidence = environment.evidence(TASK, messages, segments, end)
    assert evidence.end == end
    assert evidence.num_sampled_tokens == (0 if end == "prompt_too_long" else 9)
    assert ("<answer>7</answer>" in evidence.response) == (end != "prompt_too_long")
    assert from_json(to_json(evidence), Evidence) == evidence, "it can be stored and judged again"
    assert environment.evidence(TASK, messages, segments, end) == evidence
