"""What k samples of each of P problems say: mean@k with two intervals, pass@k, and the difference of two runs.

In: for each problem, the values in [0, 1] of the samples that were obtained, by problem name. How many were asked for
plays no part: a mean over samples that do not exist is the classic silent error of evaluation harnesses.

The two intervals answer different questions and are several-fold apart. *Over problems*: what would another set of
problems of the same kind give? *Fixed set*: what would sampling again on these very problems give?
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rorqual.records import Record

Values = Mapping[str, Sequence[float]]


class Interval(Record):
    """`Interval(low=0.41, high=0.59)`."""

    low: float
    high: float


class MeanEstimate(Record):
    """mean@k. `fixed_set` is None where some problem has one sample only: one draw says nothing of its spread.

    mean: every problem counts the same, however many samples it has.
    """

    mean: float
    over_problems: Interval | None
    fixed_set: Interval | None
    num_problems: int
    num_samples: int


class Difference(Record):
    """Second minus first, on the same problems. p_value: of no difference, two-sided; None where it is not defined."""

    mean: float
    over_problems: Interval | None
    p_value: float | None
    num_problems: int


def mean_at_k(values: Values, confidence: float = 0.95) -> MeanEstimate:
    """The mean over problems of the mean over samples, with its two intervals.

    Raises: ValueError for no problem, a problem without a sample, or a value outside [0, 1].
    """
    _check(values)
    means = [statistics.fmean(samples) for samples in values.values()]
    return MeanEstimate(
        mean=statistics.fmean(means),
        over_problems=_over_problems(means, confidence),
        fixed_set=_fixed_set(values, confidence),
        num_problems=len(means),
        num_samples=sum(len(samples) for samples in values.values()),
    )


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that k of the samples, drawn without replacement, hold a correct one: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of arXiv 2107.03374, equation 1. Raises: ValueError when k samples were not obtained.
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"{num_correct} correct samples of {num_samples} is impossible.")
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs {k} samples of a problem; {num_samples} were obtained.")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def mean_pass_at_k(values: Values, k: int) -> float:
    """pass@k averaged over problems; a sample is correct at 1.0. Raises: ValueError when a problem has fewer."""
    _check(values)
    return statistics.fmean(
        pass_at_k(len(samples), sum(value >= 1.0 for value in samples), k) for samples in values.values()
    )


def paired_difference(first: Values, second: Values, confidence: float = 0.95) -> Difference:
    """Mean of `second` minus mean of `first`, with the t interval over the per-problem differences.

    Far narrower than comparing two intervals, as hard problems are hard for both. Raises: ValueError when the two do
    not have the same problems.
    """
    _check(first)
    _check(second)
    if first.keys() != second.keys():
        odd = sorted(first.keys() ^ second.keys())
        raise ValueError(
            f"The two runs have different problems ({len(odd)} are in one only, such as {odd[0]!r}); evaluate both "
            "on the same set to compare them."
        )
    differences = [statistics.fmean(second[name]) - statistics.fmean(first[name]) for name in first]
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return Difference(mean=mean, over_problems=None, p_value=None, num_problems=count)
    error = statistics.stdev(differences) / math.sqrt(count)
    margin = _t_quantile(confidence, count - 1) * error
    return Difference(
        mean=mean,
        over_problems=Interval(low=max(-1.0, mean - margin), high=min(1.0, mean + margin)),
        p_value=_t_p_value(mean / error, count - 1) if error > 0.0 else None,
        num_problems=count,
    )


# ----------------------------------------------------------------------------------------------------------- intervals


def _over_problems(means: Sequence[float], confidence: float) -> Interval | None:
    """Wilson's score interval for the effective number of independent trials, with the t quantile for P problems.

    The plain t interval leaves [0, 1] and shrinks to a point when every problem agrees; this one does neither. The
    effective number is that of coin tosses with the same variance of the mean, as in surveys with clusters (Kish 1965).
    """
    count = len(means)
    if count < 2:
        return None
    mean = statistics.fmean(means)
    variance_of_mean = statistics.variance(means) / count
    toss_variance = mean * (1.0 - mean)
    if toss_variance <= 0.0:
        trials = float(count)
    elif variance_of_mean == 0.0:
        return Interval(low=mean, high=mean)
    else:
        trials = toss_variance / variance_of_mean
    return _wilson(mean, trials, _t_quantile(confidence, count - 1))


def _wilson(mean: float, trials: float, quantile: float) -> Interval:
    weight = quantile**2 / trials
    centre = (mean + weight / 2.0) / (1.0 + weight)
    margin = quantile / (1.0 + weight) * math.sqrt(mean * (1.0 - mean) / trials + weight / (4.0 * trials))
    return Interval(low=max(0.0, centre - margin), high=min(1.0, centre + margin))


def _fixed_set(values: Values, confidence: float) -> Interval | None:
    """Normal interval from the spread of samples within each problem: variance = sum_p s_p^2 / k_p / P^2.

    Its t quantile takes Satterthwaite's degrees of freedom, as problems differ in spread.
    """
    if any(len(samples) < 2 for samples in values.values()):
        return None
    parts = [(statistics.variance(samples) / len(samples), len(samples) - 1) for samples in values.values()]
    mean = statistics.fmean(statistics.fmean(samples) for samples in values.values())
    total = sum(part for part, _ in parts)
    if total == 0.0:
        return Interval(low=mean, high=mean)
    freedom = total**2 / sum(part**2 / degrees for part, degrees in parts)
    margin = _t_quantile(confidence, freedom) * math.sqrt(total) / len(parts)
    return Interval(low=max(0.0, mean - margin), high=min(1.0, mean + margin))


def _check(values: Values) -> None:
    if not values:
        raise ValueError("There are no problems to average over.")
    for name, samples in values.items():
        if not samples:
            raise ValueError(f"Problem {name!r} has no sample; leave it out, and say so, or obtain one.")
        if not all(0.0 <= value <= 1.0 for value in samples):
            raise ValueError(f"Problem {name!r} has a value outside [0, 1]: {min(samples)} to {max(samples)}.")


def _t_quantile(confidence: float, freedom: float) -> float:
    return float(_student().ppf(0.5 + confidence / 2.0, freedom))


def _t_p_value(statistic: float, freedom: float) -> float:
    return 2.0 * float(_student().sf(abs(statistic), freedom))


def _student() -> Any:
    try:
        from scipy.stats import t
    except ImportError as error:
        raise ValueError('Intervals need scipy, which is not installed: pip install "rorqual[eval]".') from error
    return t
