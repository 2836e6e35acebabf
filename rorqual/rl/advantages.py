"""From the scores of one group to one advantage a trajectory: how much better than its siblings each one did.

Two rules hold for every kind:

- A score with an `error` says nothing about the policy. It is left out of the mean and of the deviation, and its own
  advantage is 0. `rl/samples.py` also drops its trajectory, so that not even the KL term sees it.
- A group that cannot be compared trains nothing: with fewer than two usable scores, or when all usable scores are
  equal, every advantage is exactly 0.0. Scores are equal when they span less than `EQUAL_SPREAD` times the largest
  magnitude: 0.1 + 0.2 and 0.3 differ by rounding only, and dividing by their deviation would make a full-size advantage
  of it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Literal

from rorqual.records import Score

AdvantageKind = Literal["mean", "mean_std", "leave_one_out"]

EQUAL_SPREAD = 1e-9


def group_advantages(scores: Sequence[Score], kind: AdvantageKind) -> tuple[float, ...]:
    """Advantages of the trajectories of one group, in the order of `scores`.

    kind: "mean" is R - mean(R) (DeepSeek-V3.2); "mean_std" divides that by the sample standard deviation, with G - 1 in
        its denominator and no epsilon (DeepSeek-R1; the paper does not say which deviation); "leave_one_out" is R minus
        the mean of the *other* scores, the only one of the three whose policy gradient is unbiased ("mean" is (G-1)/G
        of it).
    Raises: ValueError for an unknown kind, or for a score that is not finite and carries no error.
    """
    if kind not in ADVANTAGES:
        raise ValueError(f"advantage kind {kind!r} is unknown; expected one of {', '.join(ADVANTAGES)}.")
    usable = [index for index, score in enumerate(scores) if score.error is None]
    totals = [scores[index].total for index in usable]
    for index, total in zip(usable, totals, strict=True):
        if not math.isfinite(total):
            raise ValueError(
                f"score {index} of the group is {total} without an error; a broken reward must set Score.error."
            )
    advantages = [0.0] * len(scores)
    if _comparable(totals):
        for index, advantage in zip(usable, ADVANTAGES[kind](totals), strict=True):
            advantages[index] = advantage
    return tuple(advantages)


def _comparable(totals: Sequence[float]) -> bool:
    if len(totals) < 2:
        return False
    return max(totals) - min(totals) > EQUAL_SPREAD * max(abs(total) for total in totals)


def _mean(totals: Sequence[float]) -> list[float]:
    baseline = statistics.fmean(totals)
    return [total - baseline for total in totals]


def _mean_std(totals: Sequence[float]) -> list[float]:
    deviation = statistics.stdev(totals)
    return [difference / deviation for difference in _mean(totals)]


def _leave_one_out(totals: Sequence[float]) -> list[float]:
    correction = len(totals) / (len(totals) - 1)
    return [difference * correction for difference in _mean(totals)]


ADVANTAGES: dict[str, Callable[[Sequence[float]], list[float]]] = {
    "mean": _mean,
    "mean_std": _mean_std,
    "leave_one_out": _leave_one_out,
}
