"""Tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rorqual.cli.doctor import Finding
from rorqual.store.run import Run

MARKS = {"good": Text("✓", "green"), "missing": Text("–", "yellow"), "bad": Text("✗", "red")}


def show_findings(console: Console, findings: list[Finding]) -> None:
    """What the doctor found, and for each gap the command that closes it."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        table.add_row(MARKS[finding.state], finding.what, Text(finding.found), Text(finding.advice))
    console.print(table, highlight=False)


NARROW = 100
"""Columns of a terminal below which the less telling figures are left out, so that names stay whole."""


def show_evaluations(console: Console, run: Run) -> None:
    """One line for each finished evaluation of a run; where there is little room, the report has the other figures."""
    summaries = run.eval_summaries()
    if not summaries:
        return
    rows = {name: _cells(summary) for name, summary in summaries.items()}
    left_out = ("no answer", "tokens") if console.width < NARROW else ()
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("evaluation", no_wrap=True)
    for heading in next(iter(rows.values())):
        if heading not in left_out:
            table.add_column(heading, justify="right")
    for name, cells in rows.items():
        table.add_row(name, *(cell for heading, cell in cells.items() if heading not in left_out))
    console.print(table, highlight=False)


def _cells(summary: dict[str, Any]) -> dict[str, str]:
    complete = summary["samples_obtained"] == summary["samples_requested"]
    samples = f"{summary['samples_obtained']} of {summary['samples_requested']}"
    return {
        "accuracy": f"{summary['mean']:.1%}",
        "other problems": _interval(summary["over_problems"]),
        "these problems": _interval(summary["fixed_set"]),
        "no answer": f"{summary['parse_failure_rate']:.1%}",
        "cut off": f"{summary['truncation_rate']:.1%}",
        "tokens": f"{summary['mean_tokens']:.1f}",
        "samples": samples if complete else f"[red]{samples}[/red]",
    }


def _interval(interval: dict[str, float] | None) -> str:
    return f"{100 * interval['low']:.1f}–{interval['high']:.1%}" if interval else "–"
