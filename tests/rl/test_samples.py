"""From trajectories to train samples: nothing is changed on the way, and nothing inconsistent gets through."""

import math
from array import array
from typing import Any

import msgspec
import pytest

from rorqual.records import Evidence, KeptTokens, Routes, Score, Segment, Selections, Trajectory
from rorqual.rl.samples import train_samples

GOOD = Score(total=1.0, parts={"accuracy": 1.0})

SEGMENT = Segment(
    token_ids=array("i", [1, 44, 7, 9, 3]),
    sampled=array("b", [0, 0, 1, 0, 1]),
    logprobs=array("f", [0.0, 0.0, -0.5, 0.0, -0.25]),
    entropies=array("f", [0.0, 0.0, 1.0, 0.0, 0.5]),
    weight_version=4,
    kept=KeptTokens(offsets=array("q", [0, 2, 5]), ids=array("i", [5, 7, 2, 3, 8])),
    routes=Routes(experts=array("h", range(16)), num_layers=2, experts_per_token=2),
    selections=Selections(positions=array("i", [0, -1, 0, 1, 0, 2, 1, 3]), num_layers=1, top_k=2),
)

PROMPT_ONLY = Segment(
    token_ids=array("i", [1, 2]),
    sampled=array("b", [0, 0]),
    logprobs=array("f", [0.0, 0.0]),
    entropies=array("f", [0.0, 0.0]),
    weight_version=4,
)


def trajectory(*segments: Segment, end: str = "stop") -> Trajectory:
    evidence = Evidence(response="7", thinking=None, answer="7", num_sampled_tokens=2, end=end)
    return Trajectory(
        trajectory_id="t17/2",
        task_id="t17",
        group_id="t17#0",
        domain="mathematics",
        segments=segments,
        messages=(),
        evidence=evidence,
        end=end,
    )


def test_a_segment_becomes_a_sample_unchanged() -> None:
    (sample,) = train_samples(trajectory(SEGMENT), GOOD, 0.75)
    assert (sample.sample_id, sample.group_id, sample.domain) == ("t17/2/0", "t17#0", "mathematics")
    assert (sample.token_ids, sample.sampled) == (SEGMENT.token_ids, SEGMENT.sampled)
    assert sample.behaviour_logprobs == SEGMENT.logprobs
    assert (sample.kept, sample.routes) == (SEGMENT.kept, SEGMENT.routes)
    assert sample.selections == SEGMENT.selections
    assert (sample.prompt_length, sample.advantage, sample.weight_version) == (2, 0.75, 4)


def test_segments_without_sampled_tokens_give_none() -> None:
    samples = train_samples(trajectory(SEGMENT, PROMPT_ONLY, SEGMENT), GOOD, -1.0)
    assert [sample.sample_id for sample in samples] == ["t17/2/0", "t17/2/2"]
    assert train_samples(trajectory(PROMPT_ONLY, end="prompt_too_long"), GOOD, -1.0) == ()


def test_a_score_with_an_error_trains_nothing() -> None:
    failed = Score(total=0.0, parts={}, error="accuracy raised KeyError")
    assert train_samples(trajectory(SEGMENT), failed, 0.0) == ()
    assert train_samples(trajectory(SEGMENT, end="sandbox_failed"), failed, 0.0) == ()


@pytest.mark.parametrize("end", ["environment_failed", "sandbox_failed", "judge_failed"])
def test_a_failed_rollout_must_not_count_as_a_wrong_answer(end: str) -> None:
    with pytest.raises(ValueError, match=rf"t17/2 ended with '{end}'.*set Score.error"):
        train_samples(trajectory(SEGMENT, end=end), GOOD, -1.0)


@pytest.mark.parametrize("advantage", [math.nan, math.inf])
def test_the_advantage_must_be_finite(advantage: float) -> None:
    with pytest.raises(ValueError, match="expected a finite number"):
        train_samples(trajectory(SEGMENT), GOOD, advantage)


ROUTES = Routes(experts=array("h", range(12)), num_layers=2, experts_per_token=2)

BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "columns": ({"logprobs": array("f", [0.0, -0.5])}, "logprobs has 2 entries for 5 tokens"),
    "flags": ({"sampled": array("b", [0, 0, 2, 0, 1])}, "other than 0 and 1"),
    "first token": ({"sampled": array("b", [1, 0, 0, 0, 1])}, "first token is marked sampled"),
    "nan": ({"logprobs": array("f", [0.0, 0.0, math.nan, 0.0, -0.25])}, "log-prob of sampled token 2 is nan"),
    "infinite": ({"logprobs": array("f", [0.0, 0.0, -math.inf, 0.0, -0.25])}, "sampled token 2 is -inf"),
    "positive": ({"logprobs": array("f", [0.0, 0.0, 0.5, 0.0, -0.25])}, "sampled token 2 is 0.5"),
    "not sampled": ({"logprobs": array("f", [0.0, -1.0, -0.5, 0.0, -0.25])}, "token 1 was not sampled but has"),
    "kept too few": (
        {"kept": KeptTokens(offsets=array("q", [0, 2]), ids=array("i", [5, 7]))},
        "1 kept-token sets for 2 sampled tokens",
    ),
    "kept offsets": (
        {"kept": KeptTokens(offsets=array("q", [0, 2, 4]), ids=array("i", [5, 7, 2, 3, 8]))},
        "do not cut up the kept ids",
    ),
    "kept empty set": (
        {"kept": KeptTokens(offsets=array("q", [0, 0, 5]), ids=array("i", [5, 7, 2, 3, 8]))},
        "do not cut up the kept ids",
    ),
    "token changed after sampling": (
        {"token_ids": array("i", [1, 44, 6, 9, 3])},
        "token 6 is marked sampled, but it is not in its own kept-token set",
    ),
    "sampled flags moved": ({"sampled": array("b", [0, 0, 0, 1, 1])}, "segment t17/2/0: "),
    "routes": ({"routes": ROUTES}, "12 routed experts; expected 4 tokens x 2 layers x 2 experts"),
    "selections": (
        {"selections": Selections(positions=array("i", [0, 0]), num_layers=1, top_k=1)},
        "2 selected keys; expected 4 tokens x 1 layers x 1 keys",
    ),
    "a key of the future": (
        {"selections": Selections(positions=array("i", [0, 2, 1, 1]), num_layers=1, top_k=1)},
        "token 1 has selected a key that follows it",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_inconsistent_segments_are_refused(name: str) -> None:
    fields, message = BROKEN[name]
    with pytest.raises(ValueError, match=message) as raised:
        train_samples(trajectory(msgspec.structs.replace(SEGMENT, **fields)), GOOD, 1.0)
    assert "segment t17/2/0" in str(raised.value)


def test_a_nearly_certain_token_may_be_rounded_above_zero() -> None:
    segment = msgspec.structs.replace(SEGMENT, logprobs=array("f", [0.0, 0.0, 1e-6, 0.0, -0.25]))
    assert len(train_samples(trajectory(segment), GOOD, 1.0)) == 1
