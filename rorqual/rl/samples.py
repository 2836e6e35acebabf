"""From a trajectory and its credit to what the trainer packs: one TrainSample for each segment in which the policy
spoke.

The advantage of a trajectory holds for the sampled tokens of *all* its segments: what was drawn before a reset led to
the answer as much as what was drawn after it. The objective counts trajectories: a segment weighs by its share of the
sampled tokens of its trajectory, so that one that was split weighs exactly as much as one that was not (`rl.losses`).

This is the border at which "every token that is trained on is a token that was sampled" is checked: whatever is
inconsistent here would train silently on the wrong tokens, so it is an error that names the trajectory and the segment.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from itertools import pairwise

from rorqual.records import KeptTokens, Routes, Score, Segment, Selections, TrainSample, Trajectory

FAILED_ENDS = ("environment_failed", "tool_failed", "sandbox_failed", "judge_failed", "time_limit", "cancelled")
"""Ends that tell nothing of the policy. How long an episode takes depends on what shares the machine with it."""

LOGPROB_ROUNDING = 1e-3
"""How far above 0 a float32 log-prob of a near-certain token may be rounded, in nats."""


def train_samples(trajectory: Trajectory, score: Score, advantage: float) -> tuple[TrainSample, ...]:
    """The samples of one trajectory; all of them share its advantage.

    A segment without sampled tokens gives none, and a score with an error gives none at all: it trains nothing.
    Raises: ValueError when the columns of a segment disagree, when a log-prob is not finite or positive, when a sampled
        token is not in its own kept set, when the advantage is not finite, or when the rollout failed but its score has
        no error.
    """
    if score.error is not None:
        return ()
    if trajectory.end in FAILED_ENDS:
        raise ValueError(
            f"trajectory {trajectory.trajectory_id} ended with {trajectory.end!r}, which tells nothing of the policy; "
            "its score has no error; set Score.error so that it is left out of the group."
        )
    if not math.isfinite(advantage):
        raise ValueError(
            f"the advantage of trajectory {trajectory.trajectory_id} is {advantage}; expected a finite number."
        )
    samples = []
    for index, segment in enumerate(trajectory.segments):
        name = f"{trajectory.trajectory_id}/{index}"
        check_segment(segment, name)
        if segment.num_sampled:
            samples.append(_sample(trajectory, segment, name, advantage))
    return tuple(samples)


def check_segment(segment: Segment, name: str) -> None:
    """Raises: ValueError, naming the segment as `name`, where it does not hold what `Segment` promises."""
    num_tokens = len(segment.token_ids)
    for column in ("sampled", "logprobs", "entropies"):
        length = len(getattr(segment, column))
        _require(length == num_tokens, name, f"{column} has {length} entries for {num_tokens} tokens")
    _require(set(segment.sampled) <= {0, 1}, name, "sampled holds values other than 0 and 1")
    _require(not segment.sampled[:1].count(1), name, "its first token is marked sampled, but nothing precedes it")
    for position, (sampled, logprob) in enumerate(zip(segment.sampled, segment.logprobs, strict=True)):
        if sampled:
            valid = math.isfinite(logprob) and logprob <= LOGPROB_ROUNDING
            _require(valid, name, f"the log-prob of sampled token {position} is {logprob}")
        else:
            _require(logprob == 0.0, name, f"token {position} was not sampled but has the log-prob {logprob}")
    if segment.kept is not None:
        _check_kept(segment, segment.kept, name)
    if segment.routes is not None:
        _check_routes(segment.routes, num_tokens, name)
    if segment.selections is not None:
        _check_selections(segment.selections, num_tokens, name)


def _check_kept(segment: Segment, kept: KeptTokens, name: str) -> None:
    _require(
        len(kept) == segment.num_sampled, name, f"{len(kept)} kept-token sets for {segment.num_sampled} sampled tokens"
    )
    offsets, ids = kept.offsets, kept.ids
    grows = all(start < end for start, end in pairwise(offsets))
    _require(
        offsets[0] == 0 and offsets[-1] == len(ids) and grows, name, "its kept-token offsets do not cut up the kept ids"
    )
    drawn = (token for token, sampled in zip(segment.token_ids, segment.sampled, strict=True) if sampled)
    for token, (start, end) in zip(drawn, pairwise(offsets), strict=True):
        found = bisect_left(ids, token, start, end)
        in_set = found < end and ids[found] == token
        _require(in_set, name, f"token {token} is marked sampled, but it is not in its own kept-token set")


def _check_routes(routes: Routes, num_tokens: int, name: str) -> None:
    row = routes.num_layers * routes.experts_per_token
    whole = row > 0 and len(routes.experts) == row * (num_tokens - 1)
    _require(
        whole,
        name,
        f"{len(routes.experts)} routed experts; expected {num_tokens - 1} tokens x {routes.num_layers} layers x "
        f"{routes.experts_per_token} experts",
    )


def _check_selections(selections: Selections, num_tokens: int, name: str) -> None:
    row = selections.num_layers * selections.top_k
    _require(
        row > 0 and len(selections.positions) == row * (num_tokens - 1),
        name,
        f"{len(selections.positions)} selected keys; expected {num_tokens - 1} tokens x {selections.num_layers} layers "
        f"x {selections.top_k} keys",
    )
    for token in range(num_tokens - 1):
        selected = selections.positions[token * row : (token + 1) * row]
        _require(max(selected) <= token, name, f"token {token} has selected a key that follows it")


def _require(holds: bool, name: str, message: str) -> None:
    if not holds:
        raise ValueError(f"segment {name}: {message}; the rollout that recorded it is at fault.")


def _sample(trajectory: Trajectory, segment: Segment, name: str, advantage: float) -> TrainSample:
    return TrainSample(
        sample_id=name,
        group_id=trajectory.group_id,
        domain=trajectory.domain,
        token_ids=segment.token_ids,
        sampled=segment.sampled,
        behaviour_logprobs=array("f", segment.logprobs),
        prompt_length=segment.prompt_length,
        advantage=advantage,
        weight_version=segment.weight_version,
        trajectory_id=trajectory.trajectory_id,
        trajectory_length=sum(each.num_sampled for each in trajectory.segments),
        kept=segment.kept,
        routes=segment.routes,
        selections=segment.selections,
    )
