"""Rewards that a rule decides: accuracy, format, length, language. Each is a pure function of a task and its Evidence.

`REWARDS` names them; a config may also name any function of one's own as `module:name`. `score` adds them up.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from rorqual.contracts import Reward
from rorqual.records import Evidence, Record, Score, Task
from rorqual.rewards.language import language_share
from rorqual.rewards.reference import reference_score
from rorqual.text.response import parse_response


class RewardConfig(Record):
    """One reward of a sum: `RewardConfig(name="language", weight=0.1, options={"language": "de"})`."""

    name: str
    weight: float = 1.0
    options: dict[str, Any] = {}


def accuracy(task: Task, evidence: Evidence, exact: bool = True) -> float:
    """reasoning-gym's score of the answer, in [0, 1]; no answer scores 0.

    exact: 1 for a full score, 0 for anything less. Many scorers give partial credit that can be had without solving
    the task (0.01 to 0.05 for any text), so it is left out unless asked for.
    """
    if evidence.answer is None:
        return 0.0
    value = reference_score(task.payload, evidence.answer)
    return float(value >= 1.0) if exact else value


def well_formed(task: Task, evidence: Evidence, partial_credit: float = 0.0) -> float:
    """1 for one think block followed by one answer; `partial_credit` for only one of the two; else 0. In [0, 1]."""
    response = parse_response(evidence.response)
    if response.well_formed:
        return 1.0
    return partial_credit if response.thinking is not None or response.answer is not None else 0.0


def language_consistency(task: Task, evidence: Evidence, language: str = "en") -> float:
    """Share of the words of the thinking that are in `language`, or in `payload["language"]` where a task says so.

    In [0, 1]; missing or blank thinking scores 0, thinking without a word (only formulas) 1.
    From DeepSeek-R1 (arXiv 2501.12948, section 2.3.2). Raises: ValueError for a language that cannot be measured.
    """
    share = language_share(evidence.thinking or "", task.payload.get("language", language))
    if share is not None:
        return share
    return 1.0 if evidence.thinking and evidence.thinking.strip() else 0.0


def length_penalty(task: Task, evidence: Evidence, soft_limit: int, hard_limit: int) -> float:
    """0 up to `soft_limit` sampled tokens, then linear down to -1 at `hard_limit`; -1 for a response that was cut off.

    The soft overlong punishment of DAPO (arXiv 2503.14476, equation 13), in [-1, 0].
    Raises: ValueError unless 0 <= soft_limit < hard_limit.
    """
    if not 0 <= soft_limit < hard_limit:
        raise ValueError(f"soft_limit = {soft_limit} and hard_limit = {hard_limit} must satisfy 0 <= soft < hard.")
    if evidence.end == "length":
        return -1.0
    excess = (evidence.num_sampled_tokens - soft_limit) / (hard_limit - soft_limit)
    return -min(max(excess, 0.0), 1.0)


REWARDS: dict[str, Any] = {
    "accuracy": accuracy,
    "format": well_formed,
    "length": length_penalty,
    "language": language_consistency,
}


def load_reward(config: RewardConfig) -> Reward:
    """The function that a config names, its options bound. Raises: ValueError for a name that leads nowhere."""
    function = REWARDS.get(config.name) or _imported(config.name)
    return partial(function, **config.options)


def score(task: Task, evidence: Evidence, rewards: Mapping[str, tuple[Reward, float]]) -> Score:
    """The weighted sum of `rewards` (name -> function and weight), its parts kept.

    A reward that raises, or gives something that is not a finite number, ends in a Score of total 0 whose `error` names
    it: one bad reward can neither stop a run nor slip a number into it.
    """
    parts: dict[str, float] = {}
    for name, (function, _) in rewards.items():
        try:
            value = float(function(task, evidence))
        except Exception as error:  # noqa: BLE001  a reward is anyone's code; what it raised is in the Score
            return Score(total=0.0, parts=parts, error=f"{name}: {type(error).__name__}: {error}")
        if not math.isfinite(value):
            return Score(total=0.0, parts=parts, error=f"{name}: returned {value}, which is not a finite number")
        parts[name] = value
    return Score(total=sum(weight * parts[name] for name, (_, weight) in rewards.items()), parts=parts)


def load_rewards(configs: tuple[RewardConfig, ...]) -> dict[str, tuple[Reward, float]]:
    """What `score` takes, from a config. Raises: ValueError for an unknown reward or one that is named twice."""
    rewards: dict[str, tuple[Reward, float]] = {}
    for config in configs:
        if config.name in rewards:
            raise ValueError(f"Reward {config.name!r} is named twice. Give each reward once, with one weight.")
        rewards[config.name] = (load_reward(config), config.weight)
    return rewards


def _imported(name: str) -> Any:
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"There is no reward {name!r}; there are {', '.join(REWARDS)}, or write module:name.")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"Reward {name!r} cannot be imported: {error}.") from error
    if not callable(function):
        raise ValueError(f"Reward {name!r} is a {type(function).__name__}, not a function of (task, evidence).")
    return function
