"""Progress bars in a terminal, plain lines elsewhere. Implements recipes.progress.Progress with rich."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class RichBar:
    """One bar, with the latest figures beside it."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def advance(self, completed: int, figures: Mapping[str, float] | None = None) -> None:
        """`completed` units are done in all."""
        self._progress.update(self._task, completed=completed)
        if figures:
            text = "  ".join(f"{name} {value:.3g}" for name, value in figures.items())
            self._progress.update(self._task, figures=text)


class RichProgress:
    """Bars on `console`, one below the other; a stage that was done before shows a full bar at once."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[RichBar]:
        """A bar of `total` units, closed on leaving."""
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[figures]}"),
        )
        with Progress(*columns, console=self._console) as progress:
            yield RichBar(progress, progress.add_task(name, total=total, figures=""))

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        self._console.print(text, highlight=False)
