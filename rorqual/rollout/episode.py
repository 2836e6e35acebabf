"""One task, one environment, one policy -> one Trajectory, whatever happens on the way.

An episode is a generator: it yields a GenerateRequest when the policy has to speak, and is sent the Completion. It
knows no engine, so any number of episodes can share one, and sending an episode the same completions reproduces it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from array import array
from collections.abc import Generator, Sequence

import msgspec

from rorqual.contracts import Environment
from rorqual.records import (
    Completion,
    EndReason,
    Evidence,
    GenerateRequest,
    KeptTokens,
    Message,
    Record,
    Routes,
    SamplingParams,
    Segment,
    Selections,
    Task,
    Trajectory,
)
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
    context = Context()
    messages: list[Message] = []
    for turn in itertools.count():
        try:
            new = environment.respond(task, messages) if turn else environment.start(task)
            ids = _render(task, encoding, context, new)
        except Exception as failure:  # noqa: BLE001  an environment may fail in any way; the episode is still reported
            return _trajectory(task, key, environment, context, messages, "environment_failed", describe(failure))
        messages.extend(new)
        end, error = _ends_before_turn(turn, len(new), len(context.token_ids) + len(ids), config)
        if end is None:
            context.append_given(ids)
            completion = yield _request(key, turn, context, encoding, config)
            context.append_completion(completion)
            messages.append(encoding.parse(completion.token_ids))
            end = "length" if completion.finish_reason == "length" else None
        if end is not None:
            return _trajectory(task, key, environment, context, messages, end, error)
    raise AssertionError("unreachable: the loop ends by returning")


def describe(failure: Exception) -> str:
    """`ValueError: what it said`."""
    return f"{type(failure).__name__}: {failure}"


class Context:
    """The columns of one Segment while it grows."""

    def __init__(self) -> None:
        self.token_ids = array("i")
        self._sampled = array("b")
        self._logprobs = array("f")
        self._entropies = array("f")
        self._kept_mass = array("f")
        self._kept: KeptTokens | None = KeptTokens(offsets=array("q", [0]), ids=array("i"))
        self._routes: Routes | None = None
        self._selections: Selections | None = None
        self._weight_versions: list[int] = []

    def append_given(self, ids: array[int]) -> None:
        """Tokens that the policy did not draw."""
        self._append(ids, 0, array("f", bytes(4 * len(ids))), array("f", bytes(4 * len(ids))))

    def append_completion(self, completion: Completion) -> None:
        """Tokens that it drew. Raises: ValueError when the columns of the completion differ in length."""
        self._append(completion.token_ids, 1, completion.logprobs, completion.entropies)
        self._check(completion)
        self._kept_mass += completion.kept_mass
        self._kept = _joined(self._kept, completion.kept)
        self._routes, self._selections = completion.routes, completion.selections
        self._weight_versions.append(completion.weight_version)

    def segment(self) -> Segment:
        """The Segment so far; it must end with a completion.

        Its weight version is the oldest of its completions, its kept mass the mean over sampled tokens.
        """
        return Segment(
            token_ids=self.token_ids,
            sampled=self._sampled,
            logprobs=self._logprobs,
            entropies=self._entropies,
            weight_version=min(self._weight_versions),
            kept=self._kept,
            kept_mass=math.fsum(self._kept_mass) / len(self._kept_mass),
            routes=self._routes,
            selections=self._selections,
        )

    @property
    def has_sampled(self) -> bool:
        return bool(self._weight_versions)

    def _append(self, ids: array[int], sampled: int, logprobs: array[float], entropies: array[float]) -> None:
        self.token_ids = self.token_ids + ids
        self._sampled = self._sampled + array("b", [sampled]) * len(ids)
        self._logprobs = self._logprobs + logprobs
        self._entropies = self._entropies + entropies

    def _check(self, completion: Completion) -> None:
        drawn, fed = len(completion.token_ids), len(self.token_ids) - 1
        expected = {"token_ids": max(drawn, 1), "logprobs": drawn, "entropies": drawn, "kept_mass": drawn}
        lengths = {name: len(getattr(completion, name)) for name in expected}
        if completion.kept is not None:
            expected["kept"], lengths["kept"] = drawn, len(completion.kept)
        for name in ("routes", "selections"):
            replayed = getattr(completion, name)
            if replayed is not None:
                expected[name], lengths[name] = fed, len(replayed)
        if lengths != expected:
            raise ValueError(
                f"Completion {completion.request_id} has columns of lengths {lengths}, expected {expected}: "
                "the engine breaks its contract."
            )


def _joined(kept: KeptTokens | None, more: KeptTokens | None) -> KeptTokens | None:
    if kept is None or more is None:
        return None
    shift = kept.offsets[-1]
    return KeptTokens(offsets=kept.offsets + array("q", [shift + o for o in more.offsets[1:]]), ids=kept.ids + more.ids)


def _render(task: Task, encoding: Encoding, context: Context, new: Sequence[Message]) -> array[int]:
    if context.has_sampled:
        return encoding.follow_up(new, context.token_ids[-1]) if new else array("i")
    ids = encoding.prompt(new, task.tools)
    if not ids:
        raise ValueError("The task is encoded as no token at all; a policy needs one to start from.")
    return ids


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
    key: EpisodeKey, turn: int, context: Context, encoding: Encoding, config: EpisodeConfig
) -> GenerateRequest:
    room = config.context_window - len(context.token_ids)
    params = msgspec.structs.replace(
        config.sampling,
        max_new_tokens=min(config.sampling.max_new_tokens, room),
        stop_token_ids=encoding.stop_token_ids,
        seed=key.seed(turn),
    )
    return GenerateRequest(request_id=key.request_id(turn), prompt_ids=context.token_ids, params=params)


def _trajectory(
    task: Task,
    key: EpisodeKey,
    environment: Environment,
    context: Context,
    messages: Sequence[Message],
    end: EndReason,
    error: str | None,
) -> Trajectory:
    segments = (context.segment(),) if context.has_sampled else ()
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
        messages=tuple(messages),
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
