"""One task, one environment, one policy -> one Trajectory, whatever happens on the way.

An episode is a generator: it yields a GenerateRequest when the policy has to speak, and is sent the Completion. It
knows no engine, so any number of episodes can share one, and sending an episode the same completions reproduces it.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Generator, Sequence

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
    Trajectory,
)
from rorqual.text.conversation import Conversation
from rorqual.text.encoding import Encoding
from rorqual.text.response import join_thinking

Episode = Generator[GenerateRequest, Completion, Trajectory]


class EpisodeConfig(Record):
    """How the policy is sampled, and for how long.

    sampling: its `seed` and `stop_token_ids` are set by the episode. max_turns: turns of the policy.
    context_window: most tokens, prompt and completion together.
    """

    sampling: SamplingParams
    context_window: int
    max_turns: int = 1


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


def run_episode(
    task: Task, key: EpisodeKey, environment: Environment, encoding: Encoding, config: EpisodeConfig
) -> Episode:
    """Play one episode. Its Trajectory says how it ended:

    - stop: the environment had nothing to add;
    - length: a completion met its limit, or the next turn does not fit the window;
    - turn_limit: the environment would have gone on;
    - prompt_too_long: the task does not fit the window, so nothing was sampled and there is no segment;
    - environment_failed: the environment raised, or gave messages that cannot be encoded; `error` says what.
    Raises: ValueError when a completion breaks the engine's contract.
    """
    conversation: Conversation | None = None
    for turn in itertools.count():
        try:
            if conversation is None:
                new = environment.start(task)
                conversation = Conversation(encoding, new, task.tools)
            else:
                new = environment.respond(task, conversation.messages)
                conversation.append(new)
        except Exception as failure:  # noqa: BLE001  an environment may fail in any way; the episode is still reported
            return _trajectory(task, key, environment, conversation, "environment_failed", describe(failure))
        end, error = _ends_before_turn(turn, len(new), len(conversation.prompt_ids), config)
        if end is None:
            completion = yield _request(key, turn, conversation.prompt_ids, encoding, config)
            conversation.append_sampled(completion)
            end = "length" if completion.finish_reason == "length" else None
        if end is not None:
            return _trajectory(task, key, environment, conversation, end, error)
    raise AssertionError("unreachable: the loop ends by returning")


def describe(failure: Exception) -> str:
    """`ValueError: what it said`."""
    return f"{type(failure).__name__}: {failure}"


def _ends_before_turn(
    turn: int, num_new: int, prompt_length: int, config: EpisodeConfig
) -> tuple[EndReason | None, str | None]:
    if turn and not num_new:
        return "stop", None
    if turn == config.max_turns:
        return "turn_limit", None
    if prompt_length < config.context_window:
        return None, None
    error = f"the prompt of turn {turn} has {prompt_length} tokens; the window of {config.context_window} has no room"
    return ("length" if turn else "prompt_too_long"), error


def _request(
    key: EpisodeKey, turn: int, prompt_ids: array[int], encoding: Encoding, config: EpisodeConfig
) -> GenerateRequest:
    room = config.context_window - len(prompt_ids)
    params = msgspec.structs.replace(
        config.sampling,
        max_new_tokens=min(config.sampling.max_new_tokens, room),
        stop_token_ids=encoding.stop_token_ids,
        seed=key.seed(turn),
    )
    return GenerateRequest(request_id=key.request_id(turn), prompt_ids=prompt_ids, params=params)


def _trajectory(
    task: Task,
    key: EpisodeKey,
    environment: Environment,
    conversation: Conversation | None,
    end: EndReason,
    error: str | None,
) -> Trajectory:
    messages = conversation.messages if conversation else ()
    segments = conversation.segments() if conversation else ()
    try:
        evidence = environment.evidence(task, messages, segments, end)
    except Exception as failure:  # noqa: BLE001  as above: what was sampled is not thrown away
        end, error = "environment_failed", error or describe(failure)
        evidence = _bare_evidence(messages, segments)
    return Trajectory(
        trajectory_id=key.trajectory_id,
        task_id=task.task_id,
        group_id=key.group_id,
        domain=task.domain,
        segments=segments,
        messages=messages,
        evidence=evidence,
        end=end,
        error=error,
    )


def _bare_evidence(messages: Sequence[Message], segments: Sequence[Segment]) -> Evidence:
    written = [join_thinking(message) for message in messages if message.role == "assistant"]
    return Evidence(
        response="\n".join(written),
        thinking=None,
        answer=None,
        num_sampled_tokens=sum(segment.num_sampled for segment in segments),
        end="environment_failed",
    )
