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


def show_evaluations(console: Console, run: Run) -> None:
    """One line for each finished evaluation of a run."""
    summaries = run.eval_summaries()
    if not summaries:
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("evaluation")
    headings = ("accuracy", "other problems", "these problems", "no answer", "cut off", "tokens", "samples")
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, summary in summaries.items():
        table.add_row(name, *_cells(summary))
    console.print(table, highlight=False)


def _cells(summary: dict[str, Any]) -> list[str]:
    complete = summary["samples_obtained"] == summary["samples_requested"]
    samples = f"{summary['samples_obtained']} of {summary['samples_requested']}"
    return [
        f"{summary['mean']:.1%}",
        _interval(summary["over_problems"]),
        _interval(summary["fixed_set"]),
        f"{summary['parse_failure_rate']:.1%}",
        f"{summary['truncation_rate']:.1%}",
        f"{summary['mean_tokens']:.1f}",
        samples if complete else f"[red]{samples}[/red]",
    ]


def _interval(interval: dict[str, float] | None) -> str:
    return f"{interval['low']:.1%} – {interval['high']:.1%}" if interval else "–"
