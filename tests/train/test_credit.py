"""Credit of segments: a trajectory that was cut weighs, token by token, exactly what it weighs in one piece."""

from __future__ import annotations

import math
import random
from array import array

import msgspec
import pytest
import torch
from torch import Tensor

from rorqual.records import Evidence, Score, Segment, TrainSample, Trajectory
from rorqual.rl.objective import ObjectiveConfig
from rorqual.rl.samples import train_samples
from rorqual.train.data import pack_samples
from rorqual.train.objectives import loss_scale, policy_objective
from rorqual.train.step import batch_logprobs
from tests.train.fakes import VOCABULARY, build_decoder

PLAIN = {"kl_estimator": "none", "kl_strength": 0.0}
OBJECTIVES = {
    "mean over trajectories": ObjectiveConfig(**PLAIN),
    "mean over tokens": ObjectiveConfig(aggregation="token_mean", **PLAIN),
    "constant length": ObjectiveConfig(aggregation="constant_length", constant_length=9, **PLAIN),
}
GOOD = Score(total=1.0, parts={})
SPANS = ((4, 0), (3, 1), (2, 0), (5, 1), (1, 0), (2, 1))
"""Lengths of what was given (0) and drawn (1), in turn."""


def whole_segment(seed: int) -> Segment:
    generator = random.Random(seed)
    sampled = array("b", [mark for length, mark in SPANS for _ in range(length)])
    return Segment(
        token_ids=array("i", [generator.randrange(VOCABULARY) for _ in sampled]),
        sampled=sampled,
        logprobs=array("f", [-generator.uniform(1, 5) * mark for mark in sampled]),
        entropies=array("f", [0.0] * len(sampled)),
        weight_version=0,
    )


def cut(segment: Segment) -> tuple[Segment, ...]:
    """One segment for each span that was drawn, each with all of the context before it: the cut changes no log-prob."""
    pieces, start = [], 0
    for index, (length, mark) in enumerate(SPANS):
        end = start + length
        if mark:
            sampled = array("b", [0] * start + [1] * length)
            logprobs = array("f", [0.0] * start) + segment.logprobs[start:end]
            piece = msgspec.structs.replace(
                segment,
                token_ids=segment.token_ids[:end],
                sampled=sampled,
                logprobs=logprobs,
                entropies=array("f", [0.0] * end),
                parent=len(pieces) - 1 if pieces else None,
                break_reason="new_user" if index > 1 else None,
            )
            pieces.append(piece)
        start = end
    return tuple(pieces)


def samples_of(name: str, segments: tuple[Segment, ...], advantage: float) -> list[TrainSample]:
    evidence = Evidence(response="", thinking=None, answer=None, num_sampled_tokens=10, end="stop")
    trajectory = Trajectory(
        trajectory_id=name,
        task_id="t",
        group_id="g",
        domain="x",
        segments=segments,
        messages=(),
        evidence=evidence,
        end="stop",
    )
    return list(train_samples(trajectory, GOOD, advantage))


def gradients(
    samples: list[TrainSample], config: ObjectiveConfig, token_budget: int
) -> tuple[float, dict[str, Tensor]]:
    """The loss of one step and the gradient of every parameter, in float64."""
    model = build_decoder("gqa")
    batches = pack_samples(samples, token_budget)
    objective = policy_objective(config, loss_scale(batches))
    total = 0.0
    for batch in batches:
        loss = objective(batch_logprobs(model, batch), batch)[0]
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def token_gradients(samples: list[TrainSample], config: ObjectiveConfig) -> dict[str, list[float]]:
    """d loss / d current log-prob of every sampled token, in order, by trajectory; current is behaviour."""
    batches = pack_samples(samples, 25)
    assert len(batches) > 1, "segments of one trajectory are in several micro-batches"
    objective = policy_objective(config, loss_scale(batches))
    found: dict[str, dict[str, list[float]]] = {}
    for batch in batches:
        assert batch.behaviour_N is not None
        current_N = batch.behaviour_N.double().requires_grad_()
        objective(current_N, batch)[0].backward()
        assert current_N.grad is not None
        for index, name in enumerate(batch.sample_ids):
            rows = current_N.grad[batch.sequence_index_N == index].tolist()
            found.setdefault(batch.trajectory_ids[index], {})[name] = rows
    return {name: [row for key in sorted(parts) for row in parts[key]] for name, parts in found.items()}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_token_weighs_exactly_what_it_weighs_uncut(name: str) -> None:
    first, second = whole_segment(1), whole_segment(2)
    other = samples_of("b", (second,), -0.7)
    uncut = token_gradients(samples_of("a", (first,), 0.3) + other, OBJECTIVES[name])
    pieces = token_gradients(samples_of("a", cut(first), 0.3) + other, OBJECTIVES[name])
    assert pieces == uncut, "equal to the last bit"
    assert len(pieces["a"]) == 10
    assert all(row != 0.0 for row in pieces["a"]), "gradient reaches the sampled tokens of every segment"


@pytest.mark.parametrize("token_budget", [20, 500])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_are_those_of_the_trajectory_in_one_piece(name: str, token_budget: int) -> None:
    first, second = whole_segment(1), whole_segment(2)
    other = samples_of("b", (second,), -0.7)
    loss, expected = gradients(samples_of("a", (first,), 0.3) + other, OBJECTIVES[name], token_budget)
    cut_loss, found = gradients(samples_of("a", cut(first), 0.3) + other, OBJECTIVES[name], token_budget)
    assert math.isclose(cut_loss, loss, rel_tol=1e-12)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-9, atol=1e-12)


def test_trajectories_are_counted_not_segments() -> None:
    samples = samples_of("a", cut(whole_segment(1)), 0.3) + samples_of("b", (whole_segment(2),), 0.3)
    assert [(each.trajectory_id, each.trajectory_length) for each in samples] == [("a", 10)] * 3 + [("b", 10)]
    for budget in (20, 500):
        scale = loss_scale(pack_samples(samples, budget))
        assert (scale.num_trajectories, scale.num_tokens) == (2, 20)


def test_a_sample_that_is_longer_than_its_trajectory_is_refused() -> None:
    (sample,) = samples_of("a", (whole_segment(1),), 0.3)
    for changes in ({"trajectory_length": 9}, {"trajectory_id": None}):
        with pytest.raises(ValueError, match="a/0 cannot be packed: it has 10 sampled tokens of the"):
            pack_samples([msgspec.structs.replace(sample, **changes)], 99)
