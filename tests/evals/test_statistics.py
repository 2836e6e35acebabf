"""Statistics: hand figures, enumeration, and intervals that hold the truth as often as they say."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.evals.statistics import mean_at_k, mean_pass_at_k, paired_difference, pass_at_k


def as_values(matrix) -> dict[str, list[float]]:
    return {f"p{i}": [float(value) for value in row] for i, row in enumerate(matrix)}


@given(st.integers(1, 7), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(num_samples: int, data) -> None:
    correct = data.draw(st.integers(0, num_samples))
    k = data.draw(st.integers(1, num_samples))
    outcomes = [1] * correct + [0] * (num_samples - correct)
    subsets = list(itertools.combinations(outcomes, k))
    assert pass_at_k(num_samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_is_exact_for_many_samples() -> None:
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)
    assert pass_at_k(64, 3, 1) == pytest.approx(3 / 64)


@pytest.mark.parametrize(("num_samples", "correct", "k"), [(4, 1, 5), (4, 5, 1), (4, -1, 1), (4, 1, 0)])
def test_impossible_pass_at_k_is_refused(num_samples: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match=r"impossible|were obtained"):
        pass_at_k(num_samples, correct, k)


def test_mean_counts_problems_equally_whatever_their_samples() -> None:
    estimate = mean_at_k({"a": [1.0, 1.0, 1.0, 0.0], "b": [0.0]})
    assert estimate.mean == pytest.approx(0.375)
    assert (estimate.num_problems, estimate.num_samples) == (2, 5)
    assert estimate.fixed_set is None
    assert mean_pass_at_k({"a": [1.0, 0.0], "b": [0.0, 0.0]}, 2) == pytest.approx(0.5)


def test_over_problems_interval_of_single_samples_is_wilsons() -> None:
    """8 of 20 right: Wilson's formula by hand, with 19 effective trials and the t quantile 2.0930 of 19 degrees."""
    interval = mean_at_k(as_values([[1]] * 8 + [[0]] * 12)).over_problems
    z, n, p = 2.0930240544, 19.0, 0.4
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    margin = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((centre - margin, centre + margin))


def test_fixed_set_interval_by_hand() -> None:
    """Two problems, [1, 0] and [1, 1]: variance 0.5 / 2 / 4 = 0.0625; one degree of freedom, t = 12.706."""
    interval = mean_at_k({"a": [1.0, 0.0], "b": [1.0, 1.0]}, confidence=0.5).fixed_set
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((0.5, 1.0))  # t = 1 at 50%: 0.75 -+ 0.25


def test_unanimous_problems_do_not_shrink_the_interval_to_a_point() -> None:
    none_right = mean_at_k(as_values([[0, 0]] * 20)).over_problems
    all_right = mean_at_k(as_values([[1, 1]] * 20)).over_problems
    assert none_right is not None and all_right is not None
    assert none_right.low == 0.0
    assert 0.1 < none_right.high < 0.25
    assert all_right.low == pytest.approx(1.0 - none_right.high)


def test_one_problem_has_no_interval_over_problems() -> None:
    estimate = mean_at_k({"a": [1.0, 0.0]})
    assert estimate.over_problems is None
    assert estimate.fixed_set is not None


@pytest.mark.parametrize("values", [{}, {"a": []}, {"a": [1.5]}, {"a": [-0.1]}, {"a": [math.nan]}])
def test_bad_values_are_refused(values) -> None:
    with pytest.raises(ValueError, match=r"no problems|no sample|outside"):
        mean_at_k(values)


@pytest.mark.parametrize(
    ("num_problems", "num_samples", "shape"), [(30, 1, (0.45, 0.55)), (30, 8, (0.45, 0.55)), (100, 4, (0.2, 2.0))]
)
def test_over_problems_interval_covers_the_mean_of_all_problems(num_problems, num_samples, shape) -> None:
    dice = np.random.default_rng(0)
    truth = shape[0] / sum(shape)
    covered = 0
    for _ in range(400):
        chance = dice.beta(*shape, size=num_problems)
        interval = mean_at_k(as_values(dice.random((num_problems, num_samples)) < chance[:, None])).over_problems
        covered += interval.low <= truth <= interval.high
    assert 0.92 <= covered / 400 <= 0.985


@pytest.mark.parametrize("num_samples", [2, 16])
def test_fixed_set_interval_covers_the_mean_of_these_problems(num_samples: int) -> None:
    dice = np.random.default_rng(1)
    chance = dice.beta(0.45, 0.55, size=30)
    covered = 0
    for _ in range(400):
        interval = mean_at_k(as_values(dice.random((30, num_samples)) < chance[:, None])).fixed_set
        covered += interval.low <= chance.mean() <= interval.high
    assert 0.92 <= covered / 400 <= 0.985


def test_the_two_intervals_answer_different_questions() -> None:
    """30 problems of Beta(.45, .55) difficulty, 64 samples: standard errors of about 6.5 points and 0.8 points."""
    dice = np.random.default_rng(2)
    widths = []
    for _ in range(60):
        chance = dice.beta(0.45, 0.55, size=30)
        estimate = mean_at_k(as_values(dice.random((30, 64)) < chance[:, None]))
        widths.append([(i.high - i.low) / 2 for i in (estimate.over_problems, estimate.fixed_set)])
    over, fixed = np.mean(widths, axis=0)
    assert over / 2.045 == pytest.approx(0.065, abs=0.004)
    assert fixed / 1.96 == pytest.approx(0.008, abs=0.001)


def test_paired_difference_by_hand() -> None:
    first = {"a": [0.0], "b": [0.0], "c": [1.0], "d": [0.0]}
    second = {"d": [1.0], "c": [1.0], "b": [1.0], "a": [0.0]}
    difference = paired_difference(first, second)
    error = statistics.stdev([0, 1, 0, 1]) / 2
    assert difference.mean == pytest.approx(0.5)
    assert difference.over_problems is not None
    assert difference.over_problems.low == pytest.approx(0.5 - 3.182446 * error)
    assert difference.over_problems.high == 1.0
    assert difference.p_value == pytest.approx(0.18169, abs=1e-5)


def test_paired_interval_covers_and_is_narrower_than_the_two_apart() -> None:
    dice = np.random.default_rng(3)
    covered, paired, apart = 0, [], []
    for _ in range(300):
        easy = dice.beta(0.45, 0.55, size=40)
        first = as_values(dice.random((40, 8)) < (0.8 * easy)[:, None])
        second = as_values(dice.random((40, 8)) < (0.8 * easy + 0.1)[:, None])
        interval = paired_difference(first, second).over_problems
        covered += interval.low <= 0.1 <= interval.high
        paired.append(interval.high - interval.low)
        apart.append(sum(i.high - i.low for i in (mean_at_k(v).over_problems for v in (first, second))))
    assert 0.92 <= covered / 300 <= 0.985
    assert np.mean(paired) < 0.5 * np.mean(apart)


def test_other_problems_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match=r"different problems \(2 are in one only, such as 'a'\)"):
        paired_difference({"a": [1.0], "c": [1.0]}, {"b": [1.0], "c": [0.0]})
    assert paired_difference({"a": [1.0]}, {"a": [0.0]}).over_problems is None
    assert paired_difference({"a": [1.0], "b": [0.0]}, {"a": [1.0], "b": [0.0]}).p_value is None
