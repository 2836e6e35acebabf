"""Slips land where they are asked for, run on when kept, and leave no trace in the value when corrected."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from rorqual.synth.scratchpad import CORRECTION, Scratchpad, near_numbers, padded
from rorqual.text.reflection import corrects_itself


@given(st.integers(-999, 999), st.sampled_from([None, 0, -3]))
def test_near_numbers_are_wrong_and_respect_the_minimum(right: int, minimum: int | None) -> None:
    numbers = near_numbers(right, minimum)
    assert right not in numbers
    assert all(abs(number - right) <= 10 or number == -right for number in numbers)
    assert minimum is None or all(number >= minimum for number in numbers)


@given(st.integers(-9999, 9999), st.integers(1, 6))
def test_padding_keeps_the_value_and_reaches_the_width(value: int, width: int) -> None:
    text = padded(value, width)
    assert int(text) == value
    assert len(text.removeprefix("-")) == max(width, len(str(abs(value))))


def test_a_step_without_a_slip_is_right() -> None:
    pad = Scratchpad(Random(0))
    assert pad.number(" 4 + 3 = ", 7, width=2) == 7
    assert [step.text for step in pad.steps] == [" 4 + 3 = 07"]
    assert pad.steps[0].slip is None


def test_a_kept_slip_is_returned_and_written() -> None:
    pad = Scratchpad(Random(0), {1: "kept"})
    pad.number(" 4 + 3 = ", 7)
    wrong = pad.number(" + 1 = ", 8)
    assert wrong != 8
    assert pad.steps[1].text == f" + 1 = {wrong}"
    assert pad.steps[1].slip == "kept"


def test_a_corrected_slip_shows_both_values_and_returns_the_right_one() -> None:
    pad = Scratchpad(Random(0), {0: "corrected"})
    assert pad.number(" 4 + 3 = ", 7) == 7
    wrong, right = pad.steps[0].text.split(CORRECTION)
    assert wrong.startswith(" 4 + 3 = ") and wrong != " 4 + 3 = 7"
    assert right == " 4 + 3 = 7"
    assert corrects_itself(pad.steps[0].text)


def test_a_slip_without_a_wrong_alternative_is_no_slip() -> None:
    pad = Scratchpad(Random(0), {0: "kept"})
    assert pad.choice("next ", "a", ["a", "a"]) == "a"
    assert pad.steps[0].slip is None
