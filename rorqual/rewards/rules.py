"""Rewards that a rule decides: accuracy, format, length, language. Each is a pure function of a task and its Evidence.

`REWARDS` names them; a config may also name any function of one's own as `module:name`. `score` adds them up.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import reasoning_gym

from rorqual.contracts import Reward
from rorqual.records import Evidence, Record, Score, Task
from rorqual.text.response import parse_response


class RewardConfig(Record):
    """One reward of a sum: `RewardConfig(name="length", weight=0.5, options={"soft_limit": 200, "hard_limit": 256})`."""

    name: str
    weight: float = 1.0
    options: dict[str, Any] = {}


def accuracy(task: Task, evidence: Evidence, exact: bool = True) -> float:
    """reasoning-gym's own score of the answer, in [0, 1]; no answer scores 0.

    exact: 1 for a full score and 0 for anything less. Partial credit of the library's scorers can be had without solving the
    task, so it is off by default.
    """
    if evidence.answer is None:
        return 0.0
    payload = task.payload
    scorer = _scorer(payload["dataset"], json.dumps(payload.get("options", {}), sort_keys=True))
    with contextlib.redirect_stdout(io.StringIO()):  # some scorers print
        value = float(scorer(evidence.answer, _revived(payload["dataset"], payload["entry"])))
    return float(value >= 1.0) if exact else min(max(value, 0.0), 1.0)


def well_formed(task: Task, evidence: Evidence, partial_credit: float = 0.0) -> float:
    """1 for one think block followed by one answer; `partial_credit` for either part alone; else 0. In [0, 1]."""
    response = parse_response(evidence.response)
    if response.well_formed:
        return 1.0
    return partial_credit if response.thinking is not None or response.answer is not None else 0.0


def length_penalty(task: Task, evidence: Evidence, soft_limit: int, hard_limit: int) -> float:
    """0 up to `soft_limit` sampled tokens, then linear down to -1 at `hard_limit`; -1 where the response was cut off.

    Soft overlong punishment of DAPO (arXiv 2503.14476, equation 13). Raises: ValueError unless 0 <= soft < hard.
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
        except Exception as error:
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


@lru_cache(maxsize=64)
def _scorer(dataset: str, options_json: str) -> Any:
    """The data set's scorer; some of them read the data set's options."""
    return reasoning_gym.create_dataset(dataset, seed=0, size=1, **json.loads(options_json)).score_answer


def _revived(dataset: str, entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with the tuples that JSON made lists, where a scorer compares them with tuples."""
    if dataset not in ("arc_agi", "rearc"):
        return entry
    output = tuple(tuple(row) for row in entry["metadata"]["output"])
    return entry | {"metadata": entry["metadata"] | {"output": output}}
