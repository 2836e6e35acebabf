"""A policy and an environment for tests, both deterministic."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from rorqual.records import (
    Completion,
    Evidence,
    GenerateRequest,
    KeptTokens,
    Message,
    Routes,
    Segment,
    Task,
    ToolCall,
    ToolSpec,
    from_json,
    to_json,
)


class FakeEngine:
    """Implements `contracts.Engine`. Draws one token a step for each request: a hash of its seed, prompt and position.

    script: request id -> the ids to give in place of the hash.
    """

    def __init__(
        self,
        vocab_size: int,
        context_window: int = 256,
        max_in_flight: int = 5,
        script: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.context_window = context_window
        self.weight_version = 3
        self.submitted: list[GenerateRequest] = []
        self._max_in_flight = max_in_flight
        self._script = dict(script or {})
        self._flight: list[tuple[GenerateRequest, array[int]]] = []

    @property
    def num_unfinished(self) -> int:
        return len(self._flight)

    def submit(self, requests: Sequence[GenerateRequest]) -> None:
        for request in requests:
            if not 0 < len(request.prompt_ids) < self.context_window:
                raise ValueError(f"prompt of {len(request.prompt_ids)} tokens")
            if any(request.request_id == other.request_id for other, _ in self._flight):
                raise ValueError(f"{request.request_id} is in flight")
            self.submitted.append(request)
            self._flight.append((request, array("i")))

    def step(self) -> list[Completion]:
        ended = []
        for request, drawn in self._flight[: self._max_in_flight]:
            drawn.append(self._draw(request, len(drawn)))
            stopped = drawn[-1] in request.params.stop_token_ids
            if stopped or len(drawn) == request.params.max_new_tokens:
                ended.append(_completion(request, drawn, "stop" if stopped else "length", self.weight_version))
        gone = {completion.request_id for completion in ended}
        self._flight = [(request, drawn) for request, drawn in self._flight if request.request_id not in gone]
        return ended[::-1]

    def abort(self, request_id: str) -> bool:
        before = len(self._flight)
        self._flight = [(request, drawn) for request, drawn in self._flight if request.request_id != request_id]
        return len(self._flight) < before

    def state_dict(self) -> dict[str, Any]:
        return {"flight": [(to_json(request), drawn.tolist()) for request, drawn in self._flight]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._flight = [(from_json(data, GenerateRequest), array("i", drawn)) for data, drawn in state["flight"]]

    def _draw(self, request: GenerateRequest, position: int) -> int:
        if request.request_id in self._script:
            return self._script[request.request_id][position]
        name = f"{request.params.seed}|{position}|{request.prompt_ids.tolist()}"
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        return request.params.stop_token_ids[0] if number % 7 == 0 else number % self.vocab_size


def _completion(request: GenerateRequest, drawn: array[int], reason: str, version: int) -> Completion:
    fed = len(request.prompt_ids) + len(drawn) - 1
    return Completion(
        request_id=request.request_id,
        token_ids=drawn,
        logprobs=array("f", [-0.1 * (1 + token % 5) for token in drawn]),
        entropies=array("f", [0.5 + token % 3 for token in drawn]),
        kept_mass=array("f", [0.9] * len(drawn)),
        finish_reason=reason,
        weight_version=version,
        kept=KeptTokens(
            offsets=array("q", range(0, 2 * len(drawn) + 1, 2)),
            ids=array("i", [token for drawn_id in drawn for token in (drawn_id, drawn_id + 1)]),
        ),
        routes=Routes(experts=array("h", range(2 * fed)), num_layers=1, experts_per_token=2),
    )


class Interviewer:
    """Asks `follow_ups` more questions, each of which depends on what was said; can be told to fail."""

    def __init__(self, follow_ups: int = 0, fail_at: str = "") -> None:
        self.follow_ups = follow_ups
        self.fail_at = fail_at

    def start(self, task: Task) -> tuple[Message, ...]:
        self._maybe_fail("start")
        return task.messages

    def respond(self, task: Task, messages: Sequence[Message]) -> tuple[Message, ...]:
        self._maybe_fail("respond")
        turns = sum(message.role == "assistant" for message in messages)
        if turns > self.follow_ups:
            return ()
        return (Message(role="user", content=f"and {len(messages[-1].content)}?"),)

    def tools(self, task: Task) -> tuple[ToolSpec, ...]:
        return ()

    async def call(self, task: Task, messages: Sequence[Message], call: ToolCall) -> str:
        raise ValueError("there are no tools")

    def evidence(self, task: Task, messages: Sequence[Message], segments: Sequence[Segment], end: str) -> Evidence:
        self._maybe_fail("evidence")
        num_sampled = sum(segment.num_sampled for segment in segments)
        response = messages[-1].content if messages else ""
        return Evidence(response=response, thinking=None, answer=None, num_sampled_tokens=num_sampled, end=end)

    def _maybe_fail(self, place: str) -> None:
        if self.fail_at == place:
            raise ConnectionError(f"no {place} today")


def make_task(name: str = "sum/train/1", question: str = "4 + 3 =") -> Task:
    return Task(task_id=name, environment="interview", domain="x", messages=(Message(role="user", content=question),))
