"""One task, one environment, one policy -> one Trajectory, whatever happens on the way: one turn, or many with tools.

    sample -> parse -> run tools, or ask the environment -> append -> manage the context -> sample ...

An episode is a generator that does nothing by itself. It yields a GenerateRequest when the policy has to speak and is
sent the Completion; it yields a ToolRequest when tools have to run and is sent the ToolResults; it is sent an
Interruption when it has to end. It knows no engine and no clock, so any number of episodes can share one of each, and
sending an episode the same again reproduces it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Generator, Sequence
from typing import Literal

import msgspec

from rorqual.contracts import Environment
from rorqual.records import (
    Completion,
    EndReason,
    Evidence,
    GenerateRequest,
    Message,
    Record,
    SamplingParams,
    Segment,
    Task,
    ToolSpec,
    Trajectory,
)
from rorqual.rollout.context import ContextConfig, ContextManager, Decision
from rorqual.rollout.tools import (
    ToolConfig,
    ToolRequest,
    ToolResults,
    answer,
    broken_call,
    describe,
    mistake,
)
from rorqual.text.conversation import Conversation
from rorqual.text.encoding import Encoding
from rorqual.text.parsing import Parsed
from rorqual.text.response import join_thinking


class Interruption(Record):
    """The episode ends here, from outside."""

    end: Literal["time_limit", "cancelled"]
    error: str


Asked = GenerateRequest | ToolRequest
Sent = Completion | ToolResults | Interruption
Episode = Generator[Asked, Sent, Trajectory]


class EpisodeConfig(Record):
    """How the policy is sampled, and for how long.

    sampling: its `seed` and `stop_token_ids` are set by the episode. max_turns: turns of the policy; summaries do not
    count. context_window: most tokens of one context, prompt and completion together. max_sampled_tokens: of the whole
    episode, summaries included; None: no limit. time_limit: seconds that an episode may take; None: no limit.
    context: what becomes of a context that grows too long. tools: how tools are run.
    """

    sampling: SamplingParams
    context_window: int
    max_turns: int = 1
    max_sampled_tokens: int | None = None
    time_limit: float | None = None
    context: ContextConfig = ContextConfig()
    tools: ToolConfig = ToolConfig()

    def __post_init__(self) -> None:
        """Raises: ValueError naming a limit that is out of range, or a strategy that is none of one episode."""
        for name in ("max_sampled_tokens", "time_limit"):
            limit = getattr(self, name)
            if limit is not None and not limit > 0:
                raise ValueError(f"EpisodeConfig.{name} = {limit} must be above 0, or None for no limit.")
        if self.context.strategy == "parallel_fewest_step":
            raise ValueError("parallel_fewest_step chooses among whole episodes; an episode has another strategy.")


class EpisodeKey(Record):
    """Which episode this is; all names and seeds of the episode follow from it.

    `EpisodeKey(run_seed=7, step=3, task_id="chain_sum/train/17", sample_index=0).trajectory_id` is
    `"3/chain_sum/train/17#0"`.
    """

    run_seed: int
    step: int
    task_id: str
    sample_index: int

    @property
    def group_id(self) -> str:
        return f"{self.step}/{self.task_id}"

    @property
    def trajectory_id(self) -> str:
        return f"{self.group_id}#{self.sample_index}"

    def request_id(self, turn: int) -> str:
        return f"{self.trajectory_id}.{turn}"

    def seed(self, turn: int) -> int:
        """A sampling seed below 2**63, the same in every process."""
        name = f"{self.run_seed}|{self.step}|{self.task_id}|{self.sample_index}|{turn}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


class _EndedError(Exception):
    """The episode is over, and why."""

    def __init__(self, end: EndReason, error: str | None = None) -> None:
        super().__init__(end)
        self.end, self.error = end, error


def run_episode(
    task: Task, key: EpisodeKey, environment: Environment, encoding: Encoding, config: EpisodeConfig
) -> Episode:
    """Play one episode. Its Trajectory says how it ended:

    - stop: the environment had nothing to add;
    - length: a completion met its limit, or the next turn does not fit the window;
    - turn_limit: the environment would have gone on, or tools were called;
    - token_limit: everything that may be sampled is;
    - prompt_too_long: the task does not fit the window, so nothing was sampled and there is no segment;
    - environment_failed: the environment raised, or gave messages that cannot be encoded; `error` says what;
    - tool_failed: the infrastructure of a tool failed again and again;
    - time_limit, cancelled: it was interrupted.
    Raises: ValueError when a completion breaks the engine's contract.
    """
    play = _Play(task, key, environment, encoding, config)
    try:
        yield from play.run()
    except _EndedError as ended:
        return play.trajectory(ended.end, ended.error)
    raise AssertionError("unreachable: an episode goes on until it has ended")


class _Play:
    """One episode while it is played."""

    def __init__(
        self, task: Task, key: EpisodeKey, environment: Environment, encoding: Encoding, config: EpisodeConfig
    ) -> None:
        self._task, self._key, self._environment = task, key, environment
        self._encoding, self._config = encoding, config
        self._manager = ContextManager(config.context, config.context_window)
        self._conversation: Conversation | None = None
        self._tools: tuple[ToolSpec, ...] = ()
        self._num_turns = self._num_draws = self._num_sampled = self._num_tool_requests = 0

    def run(self) -> Generator[Asked, Sent, None]:
        """Play until the episode has ended. Raises: _EndedError then."""
        conversation = self._start()
        while True:
            parsed = yield from self._turn(conversation)
            if self._tools and (parsed.message.tool_calls or broken_call(parsed)):
                yield from self._run_tools(conversation, parsed)
            else:
                self._respond(conversation)

    def trajectory(self, end: EndReason, error: str | None) -> Trajectory:
        """The record of what happened up to its end."""
        messages = self._conversation.messages if self._conversation else ()
        segments = self._conversation.segments() if self._conversation else ()
        try:
            evidence = self._environment.evidence(self._task, messages, segments, end)
        except Exception as failure:  # noqa: BLE001  as below: what was sampled is not thrown away
            end, error = "environment_failed", error or describe(failure)
            evidence = _bare_evidence(messages, segments)
        return Trajectory(
            trajectory_id=self._key.trajectory_id,
            task_id=self._task.task_id,
            group_id=self._key.group_id,
            domain=self._task.domain,
            segments=segments,
            messages=messages,
            evidence=evidence,
            end=end,
            error=error,
            events=self._manager.events,
        )

    # ------------------------------------------------------------------------------------- the policy

    def _turn(self, conversation: Conversation) -> Generator[Asked, Sent, Parsed]:
        """Make room, draw the policy's next turn, and append it."""
        decision = self._manager.before_call(conversation)
        while decision.kind == "summary":
            completion = yield from self._draw(conversation, decision)
            said = conversation.append_aside(completion).message
            decision = self._manager.take_summary(conversation, said.content or said.thinking)
        if decision.kind == "overflow":
            length = conversation.num_tokens
            window = self._config.context_window
            error = f"the prompt of turn {self._num_turns} has {length} tokens; the window of {window} has no room"
            raise _EndedError("length" if self._num_draws else "prompt_too_long", error)
        completion = yield from self._draw(conversation, decision)
        parsed = conversation.append_sampled(completion)
        self._num_turns += 1
        if completion.finish_reason == "length":
            raise _EndedError("token_limit" if self._tokens_left() == 0 else "length")
        return parsed

    def _draw(self, conversation: Conversation, decision: Decision) -> Generator[Asked, Sent, Completion]:
        left = self._tokens_left()
        if left == 0:
            raise _EndedError("token_limit")
        sampling = self._config.sampling
        room = decision.max_new_tokens if left is None else min(decision.max_new_tokens, left)
        request = self._request(conversation.prompt_ids, min(sampling.max_new_tokens, room))
        self._num_draws += 1
        sent = yield request
        if isinstance(sent, Interruption):
            raise _EndedError(sent.end, sent.error)
        assert isinstance(sent, Completion)
        self._num_sampled += len(sent.token_ids)
        return sent

    def _request(self, prompt_ids: array[int], max_new_tokens: int) -> GenerateRequest:
        params = msgspec.structs.replace(
            self._config.sampling,
            max_new_tokens=max_new_tokens,
            stop_token_ids=self._encoding.stop_token_ids,
            seed=self._key.seed(self._num_draws),
        )
        return GenerateRequest(request_id=self._key.request_id(self._num_draws), prompt_ids=prompt_ids, params=params)

    def _tokens_left(self) -> int | None:
        most = self._config.max_sampled_tokens
        return None if most is None else max(most - self._num_sampled, 0)

    # ---------------------------------------------------------------------------- the environment and its tools

    def _start(self) -> Conversation:
        try:
            self._tools = self._environment.tools(self._task)
            messages = self._environment.start(self._task)
            self._conversation = Conversation(self._encoding, messages, self._tools)
        except Exception as failure:
            raise _EndedError("environment_failed", describe(failure)) from failure
        return self._conversation

    def _respond(self, conversation: Conversation) -> None:
        try:
            new = self._environment.respond(self._task, conversation.messages)
            conversation.append(new)
        except Exception as failure:
            raise _EndedError("environment_failed", describe(failure)) from failure
        if not new:
            raise _EndedError("stop")
        self._check_turns()

    def _check_turns(self) -> None:
        if self._num_turns >= self._config.max_turns:
            raise _EndedError("turn_limit")

    def _run_tools(self, conversation: Conversation, parsed: Parsed) -> Generator[Asked, Sent, None]:
        """Append a result for every call. What cannot be run is answered here; the rest runs at the same time.

        A call that could not be read has no id that a result could name: the last result says so, or a user message
        where there is none.
        """
        self._check_turns()
        calls = parsed.message.tool_calls
        results = {call.id: wrong for call in calls if (wrong := mistake(call, self._tools)) is not None}
        runnable = tuple(call for call in calls if call.id not in results)
        if runnable:
            request_id = f"{self._key.trajectory_id}.tools.{self._num_tool_requests}"
            self._num_tool_requests += 1
            sent = yield ToolRequest(request_id=request_id, messages=conversation.messages, calls=runnable)
            if isinstance(sent, Interruption):
                raise _EndedError(sent.end, sent.error)
            assert isinstance(sent, ToolResults)
            if sent.end is not None:
                raise _EndedError(sent.end, sent.error)
            results |= {call.id: message.content for call, message in zip(runnable, sent.messages, strict=True)}
        broken = broken_call(parsed)
        if broken and calls:
            results[calls[-1].id] += f"\n{broken}"
        answers = tuple(answer(call, results[call.id]) for call in calls)
        try:
            conversation.append(answers or (Message(role="user", content=broken or ""),))
        except ValueError as failure:  # a result that the format cannot hold
            raise _EndedError("environment_failed", describe(failure)) from failure


def _bare_evidence(messages: Sequence[Message], segments: Sequence[Segment]) -> Evidence:
    written = [join_thinking(message) for message in messages if message.role == "assistant"]
    return Evidence(
        response="\n".join(written),
        thinking=None,
        answer=None,
        num_sampled_tokens=sum(segment.num_sampled for segment in segments),
        end="environment_failed",
    )
