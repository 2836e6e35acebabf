"""Rewards: each against a table, and a sum that keeps its parts and survives any reward."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from rorqual.records import Evidence, Score, Task
from rorqual.rewards.rules import (
    REWARDS,
    RewardConfig,
    accuracy,
    language_consistency,
    length_penalty,
    load_reward,
    load_rewards,
    score,
    well_formed,
)
from rorqual.text.response import parse_response

TASK = Task(
    task_id="t",
    environment="dialogue",
    domain="mathematics",
    messages=(),
    payload={"dataset": "chain_sum", "entry": {"question": "4 + 3 =", "answer": "7", "metadata": {}}},
)


def evidence(response: str = "", num_sampled_tokens: int = 10, end: str = "stop") -> Evidence:
    parts = parse_response(response)
    return Evidence(
        response=response,
        thinking=parts.thinking,
        answer=parts.answer,
        num_sampled_tokens=num_sampled_tokens,
        end=end,
    )


@pytest.mark.parametrize(
    ("response", "exact", "partial"),
    [
        ("<think>a</think><answer>7</answer>", 1.0, 1.0),
        ("<answer>7</answer>", 1.0, 1.0),
        ("<answer>8</answer>", 0.0, 0.0),
        ("<answer>7 apples</answer>", 0.0, 1 / 8),
        ("7", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_accuracy(response: str, exact: float, partial: float) -> None:
    assert accuracy(TASK, evidence(response)) == exact
    assert accuracy(TASK, evidence(response), exact=False) == pytest.approx(partial)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>a</think> <answer>8</answer>", 1.0),
        ("<think>a</think> \\boxed{8}", 1.0),
        ("<think>a</think> 8", 0.2),
        ("<answer>8</answer>", 0.2),
        ("<think>a <answer>8</answer>", 0.0),
        ("8", 0.0),
    ],
)
def test_format(response: str, expected: float) -> None:
    assert well_formed(TASK, evidence(response), partial_credit=0.2) == expected
    assert well_formed(TASK, evidence(response)) == float(expected == 1.0)


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(0, 0.0), (100, 0.0), (125, -0.25), (150, -0.5), (200, -1.0), (999, -1.0)]
)
def test_length_penalty_is_linear_between_its_limits(num_tokens: int, expected: float) -> None:
    assert length_penalty(TASK, evidence(num_sampled_tokens=num_tokens), soft_limit=100, hard_limit=200) == expected


def test_a_response_that_was_cut_off_has_the_full_penalty() -> None:
    assert length_penalty(TASK, evidence(num_sampled_tokens=5, end="length"), soft_limit=100, hard_limit=200) == -1.0


@pytest.mark.parametrize(("soft", "hard"), [(-1, 5), (5, 5), (6, 5)])
def test_length_limits_out_of_order_are_refused(soft: int, hard: int) -> None:
    with pytest.raises(ValueError, match="0 <= soft < hard"):
        length_penalty(TASK, evidence(), soft_limit=soft, hard_limit=hard)


@pytest.mark.parametrize(
    ("thinking", "english", "german"),
    [
        ("First we add the two numbers.", 1.0, 0.0),
        ("Zuerst addieren wir die beiden Zahlen.", 0.0, 1.0),
        ("4+3=7", 1.0, 1.0),
        (" ", 0.0, 0.0),
    ],
)
def test_language_consistency(thinking: str, english: float, german: float) -> None:
    seen = evidence(f"<think>{thinking}</think><answer>7</answer>")
    assert language_consistency(TASK, seen) == english
    assert language_consistency(TASK, seen, language="de") == german
    german_task = msgspec.structs.replace(TASK, payload={"language": "de"})
    assert language_consistency(german_task, seen, language="en") == german


def test_language_of_missing_thinking_earns_nothing() -> None:
    assert language_consistency(TASK, evidence("First we add the two numbers.")) == 0.0


def test_a_score_is_the_weighted_sum_and_keeps_its_parts() -> None:
    rewards = load_rewards(
        (
            RewardConfig(name="accuracy"),
            RewardConfig(name="format", weight=0.5),
            RewardConfig(name="length", weight=0.1, options={"soft_limit": 0, "hard_limit": 20}),
        )
    )
    found = score(TASK, evidence("<think>a</think><answer>8</answer>"), rewards)
    assert found.parts == {"accuracy": 0.0, "format": 1.0, "length": -0.5}
    assert found.total == pytest.approx(0.5 - 0.05)
    assert found.error is None


def raises(task: Task, evidence: Evidence) -> float:
    raise KeyError("entry")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, "bad: KeyError: 'entry'"),
        (lambda task, evidence: math.nan, "bad: returned nan, which is not a finite number"),
        (lambda task, evidence: -math.inf, "bad: returned -inf, which is not a finite number"),
        (lambda task, evidence: None, "bad: TypeError: float() argument must be a string or a real number"),
    ],
)
def test_a_bad_reward_ends_in_the_score_and_nowhere_else(function: Any, message: str) -> None:
    found = score(TASK, evidence(), {"format": (well_formed, 1.0), "bad": (function, 1.0), "x": (raises, 1.0)})
    assert (found.total, found.parts) == (0.0, {"format": 0.0})
    assert found.error is not None
    assert found.error.startswith(message)


def test_a_foreign_task_is_an_error_of_accuracy_not_a_wrong_answer() -> None:
    task = msgspec.structs.replace(TASK, payload={})
    found = score(task, evidence("<answer>7</answer>"), {"accuracy": (accuracy, 1.0)})
    assert found.error is not None
    assert "accuracy: ValueError: The task's payload has no" in found.error


def one(task: Task, evidence: Evidence, value: float = 1.0) -> float:
    return value


def test_a_reward_of_ones_own_is_named_by_module_and_function() -> None:
    config = RewardConfig(name=f"{__name__}:one", weight=2.0, options={"value": 0.25})
    assert score(TASK, evidence(), load_rewards((config,))) == Score(total=0.5, parts={config.name: 0.25})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acuracy", "There is no reward 'acuracy'; there are accuracy, format"),
        ("no_such_module:one", "cannot be imported: No module named 'no_such_module'"),
        ("math:no_such_name", "cannot be imported: module 'math' has no attribute"),
        ("math:pi", "is a float, not a function"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        load_reward(RewardConfig(name=name))


def test_a_reward_is_named_once_and_every_named_one_loads() -> None:
    with pytest.raises(ValueError, match="named twice"):
        load_rewards((RewardConfig(name="format"), RewardConfig(name="format")))
    assert len(load_rewards(tuple(RewardConfig(name=name) for name in REWARDS))) == len(REWARDS) == 4
