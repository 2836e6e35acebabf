"""Group advantages against plain loops, and the two rules: errors, and groups without contrast, train nothing."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.records import Score
from rorqual.rl.advantages import ADVANTAGES, group_advantages

KINDS = sorted(ADVANTAGES)


def scores(*totals: float) -> list[Score]:
    return [Score(total=total, parts={}) for total in totals]


FAILED = Score(total=0.0, parts={}, error="accuracy raised KeyError")


def by_hand(totals: list[float], kind: str) -> list[float]:
    mean = sum(totals) / len(totals)
    if kind == "mean":
        return [total - mean for total in totals]
    if kind == "mean_std":
        variance = sum((total - mean) ** 2 for total in totals) / (len(totals) - 1)
        return [(total - mean) / math.sqrt(variance) for total in totals]
    return [
        total - sum(other for j, other in enumerate(totals) if j != i) / (len(totals) - 1)
        for i, total in enumerate(totals)
    ]


def test_worked_examples() -> None:
    assert group_advantages(scores(1.0, 0.0, 0.0, 0.0), "mean") == (0.75, -0.25, -0.25, -0.25)
    assert group_advantages(scores(1.0, 0.0, 0.0, 0.0), "mean_std") == (1.5, -0.5, -0.5, -0.5)
    assert group_advantages(scores(1.0, 0.0, 0.0, 0.0), "leave_one_out") == pytest.approx((1.0, -1 / 3, -1 / 3, -1 / 3))


@pytest.mark.parametrize("kind", KINDS)
@given(totals=st.lists(st.integers(-40, 40).map(lambda n: n / 10), min_size=2, max_size=12))
def test_equal_to_a_plain_loop_and_centred(kind: str, totals: list[float]) -> None:
    advantages = group_advantages(scores(*totals), kind)
    if len(set(totals)) == 1:
        assert advantages == (0.0,) * len(totals)
        return
    assert advantages == pytest.approx(by_hand(totals, kind), rel=1e-9, abs=1e-12)
    assert sum(advantages) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@given(total=st.floats(-1e6, 1e6), size=st.integers(0, 9))
def test_equal_scores_give_exactly_zero(kind: str, total: float, size: int) -> None:
    assert group_advantages(scores(*[total] * size), kind) == (0.0,) * size


@pytest.mark.parametrize("kind", KINDS)
def test_scores_that_differ_by_rounding_only_are_equal(kind: str) -> None:
    assert 0.1 + 0.2 != 0.3
    assert group_advantages(scores(0.1 + 0.2, 0.3, 0.3), kind) == (0.0, 0.0, 0.0)
    assert group_advantages(scores(0.3 + 1e-6, 0.3, 0.3), kind)[0] > 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_with_an_error_is_left_out(kind: str) -> None:
    with_error = group_advantages([*scores(1.0), FAILED, *scores(0.0, 0.5)], kind)
    without = group_advantages(scores(1.0, 0.0, 0.5), kind)
    assert with_error == (without[0], 0.0, without[1], without[2])


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_may_carry_any_total(kind: str) -> None:
    broken = Score(total=math.nan, parts={}, error="accuracy returned nan")
    assert group_advantages([broken, *scores(1.0, 0.0)], kind)[0] == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_than_two_usable_scores_give_zero(kind: str) -> None:
    assert group_advantages([], kind) == ()
    assert group_advantages(scores(1.0), kind) == (0.0,)
    assert group_advantages([FAILED, *scores(1.0), FAILED], kind) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("total", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_refused(total: float) -> None:
    with pytest.raises(ValueError, match="score 1 of the group"):
        group_advantages(scores(0.0, total), "mean")


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of mean, mean_std, leave_one_out"):
        group_advantages(scores(0.0, 1.0), "median")
