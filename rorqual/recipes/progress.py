"""How a recipe reports that it moves: stages open a bar, advance it, and show a few figures beside it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Bar(Protocol):
    """One stage's progress."""

    def advance(self, completed: int, figures: Mapping[str, float] | None = None) -> None:
        """`completed` units are done in all; `figures` are shown beside the bar."""
        ...


class Progress(Protocol):
    """Where bars come from: the command line draws them, tests do not."""

    def bar(self, name: str, total: int) -> AbstractContextManager[Bar]:
        """A bar of `total` units, closed on leaving."""
        ...

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        ...


class SilentProgress:
    """Shows nothing. Implements both protocols."""

    def bar(self, name: str, total: int) -> AbstractContextManager[Bar]:
        return nullcontext(self)

    def advance(self, completed: int, figures: Mapping[str, float] | None = None) -> None: ...

    def say(self, text: str) -> None: ...
