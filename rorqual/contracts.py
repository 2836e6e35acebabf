"""The protocols by which layers meet: rollouts see an Engine and an Environment, never a model or a data set.

`tests/test_contracts.py` holds what every Engine and every Environment must do; a reward has no contract but its type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rorqual.records import (
    Completion,
    Evidence,
    GenerateRequest,
    Message,
    Record,
    SamplingParams,
    Segment,
    Task,
    ToolCall,
    ToolSpec,
)


class Engine(Protocol):
    """A policy that can be sampled: token ids in, token ids with log-probs out."""

    @property
    def weight_version(self) -> int:
        """Version of the weights that sample now."""
        ...

    @property
    def context_window(self) -> int:
        """Most tokens, prompt and completion together, that one request may hold."""
        ...

    def submit(self, requests: Sequence[GenerateRequest]) -> None:
        """Queue requests. Raises: ValueError for an empty prompt, one that fills the window, or an id in flight."""
        ...

    def step(self) -> list[Completion]:
        """Advance every request in flight once (a prefill chunk or one token) and return those that ended."""
        ...

    def abort(self, request_id: str) -> bool:
        """Withdraw one request; the others draw what they would have drawn. False when there is no such request."""
        ...

    @property
    def num_unfinished(self) -> int:
        """Requests queued or in flight."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything in flight, so that `load_state_dict` on a fresh engine goes on bit for bit."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class ChatUsage(Record):
    """Tokens of one call. reasoning_tokens are part of completion_tokens, cached_tokens of prompt_tokens."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0
    cached_tokens: int = 0


class ChatReply(Record):
    """What a chat model answered. usage: None where the server counts nothing. raw: the answer as it came."""

    message: Message
    usage: ChatUsage | None
    finish_reason: str
    raw: dict[str, Any]


class ChatModel(Protocol):
    """A model that is seen as text alone: a judge, a teacher, or a policy that is evaluated."""

    async def complete(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), params: SamplingParams | None = None
    ) -> ChatReply:
        """One reply; params None leaves the sampling to the server.

        Raises: ConnectionError when the infrastructure failed, ValueError when the request or the reply is wrong.
        """
        ...


class Environment(Protocol):
    """Presents a task, runs its tools, answers the policy's messages, gathers evidence. It never judges.

    What is particular to an episode follows from its messages alone: one environment plays many at once.
    """

    def start(self, task: Task) -> tuple[Message, ...]:
        """The messages that the policy sees first."""
        ...

    def respond(self, task: Task, messages: Sequence[Message]) -> tuple[Message, ...]:
        """What follows the last assistant message, which calls no tool: a user turn; nothing ends the episode."""
        ...

    def tools(self, task: Task) -> tuple[ToolSpec, ...]:
        """The tools that the policy may call; none for an environment of plain dialogue."""
        ...

    async def call(self, task: Task, messages: Sequence[Message], call: ToolCall) -> str:
        """The result of one call of the last assistant message; its other calls run at the same time.

        It may be called again for the same call, and is cancelled when the episode ends before it.
        Raises: ValueError for a call that is the policy's mistake, which is told to it; OSError (ConnectionError and
            TimeoutError among them) when the infrastructure failed, after which it is called again.
        """
        ...

    def evidence(self, task: Task, messages: Sequence[Message], segments: Sequence[Segment], end: str) -> Evidence:
        """What there is to judge, from what was said (`messages`) and how it ended."""
        ...


class Reward(Protocol):
    """A pure judgement of one Evidence, in [-1, 1] unless its docstring says otherwise."""

    def __call__(self, task: Task, evidence: Evidence) -> float: ...
