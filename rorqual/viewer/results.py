"""What the evaluations of a run showed, and how they differ from the first of their kind."""

from __future__ import annotations

from typing import Any

from rorqual.evals.runner import metric_values
from rorqual.evals.statistics import paired_difference
from rorqual.records import to_json
from rorqual.store.run import Run


def results(run: Run) -> list[dict[str, Any]]:
    """The summary of every finished evaluation, in the order in which they were made."""
    return list(run.eval_summaries().values())


def comparisons(run: Run) -> list[dict[str, Any]]:
    """Each evaluation against the first one with the same protocol and problems: the paired difference of their means.

    `[{"first": "base", "second": "trained", "protocol": "greedy", "mean": 0.5, "low": 0.4, "high": 0.6}]`
    """
    found: list[dict[str, Any]] = []
    firsts: dict[tuple[str, frozenset[str]], tuple[str, Any]] = {}
    for name, summary in run.eval_summaries().items():
        values = metric_values(run.read_eval(name), summary["protocol"]["metric"])
        kind = (to_json(summary["protocol"]).decode(), frozenset(values))
        if kind not in firsts:
            firsts[kind] = (name, values)
            continue
        first, before = firsts[kind]
        difference = paired_difference(before, values)
        interval = difference.over_problems
        found.append(
            {
                "first": first,
                "second": name,
                "protocol": summary["protocol"]["name"],
                "mean": difference.mean,
                "low": interval.low if interval else None,
                "high": interval.high if interval else None,
                "p_value": difference.p_value,
            }
        )
    return found
