"""A scratchpad on which a solver works a problem out, and on which slips can be planted.

A solver is a plain program that passes every value it computes through the pad. The pad writes the step down and hands
back the value that was written, right or wrong; so a slip that nobody notices runs on into every later step and into
the answer, as it does in real worked solutions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Literal, TypeVar

from rorqual.records import Record

Slip = Literal["kept", "corrected"]
Value = TypeVar("Value", int, str)

CORRECTION = " wait"
"""What stands between a wrong step and its correction; `text.reflection.corrects_itself` recognises it."""


class Step(Record):
    """One step of a worked solution: what is written, with the separator before it, and whether it holds a slip.

    `Step(text=" + 3 = 08 wait + 3 = 07", slip="corrected")`
    """

    text: str
    slip: Slip | None = None


class Worked(Record):
    """A worked solution: its steps, and the answer that follows from them (wrong if a slip was kept and mattered)."""

    steps: tuple[Step, ...]
    answer: str

    @property
    def text(self) -> str:
        """The steps in order; each brings its own separator."""
        return "".join(step.text for step in self.steps)


class Scratchpad:
    """Collects steps. `slips` maps the number of a step, from 0, to what goes wrong there; other steps are right.

    An expression starts with its separator, a space or a line break, so that it can follow a step or a correction.
    """

    def __init__(self, rng: Random, slips: Mapping[int, Slip] | None = None) -> None:
        self.steps: list[Step] = []
        self._rng = rng
        self._slips = dict(slips or {})

    def number(self, expression: str, right: int, minimum: int | None = None, width: int = 1) -> int:
        """Write `expression` followed by the number it equals, in at least `width` digits.

        A slip is near the right number and never below `minimum`.
        """
        return self.choice(expression, right, near_numbers(right, minimum), lambda value: padded(value, width))

    def choice(
        self, expression: str, right: Value, alternatives: Sequence[Value], write: Callable[[Value], str] = str
    ) -> Value:
        """Write `expression` followed by its value; a slip is drawn from the `alternatives` that differ from `right`.

        Returns the value as written, on which the solver has to go on. A step without a wrong alternative stays right.
        """
        slip = self._slips.get(len(self.steps))
        wrong_values = [value for value in alternatives if value != right]
        if slip is None or not wrong_values:
            self.steps.append(Step(text=expression + write(right)))
            return right
        wrong = self._rng.choice(wrong_values)
        if slip == "kept":
            self.steps.append(Step(text=expression + write(wrong), slip="kept"))
            return wrong
        text = expression + write(wrong) + CORRECTION + expression + write(right)
        self.steps.append(Step(text=text, slip="corrected"))
        return right


def padded(value: int, width: int) -> str:
    """The number with at least `width` digits, so that every line of a solution has the same layout: `-04`."""
    return f"{'-' if value < 0 else ''}{abs(value):0{width}d}"


def near_numbers(right: int, minimum: int | None = None) -> list[int]:
    """The usual slips around an integer: off by one or two, a carry forgotten or made up, a sign lost."""
    candidates = [right + 1, right - 1, right + 2, right - 2]
    if abs(right) >= 10:
        candidates += [right + 10, right - 10]
    if right != 0 and minimum is None:
        candidates.append(-right)
    return [value for value in candidates if minimum is None or value >= minimum]
