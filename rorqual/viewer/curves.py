"""Metrics as families of curves, by the names alone: `policy/ratio/p50` is line p50 of chart `policy/ratio`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rorqual.store.run import Metrics

ORDER = ("reward", "length", "form", "loss", "sampling", "policy")
"""Prefixes that come first; others follow by name."""

OWN_CHART = ("policy/loss/kl",)
"""Names of three parts whose size is far from that of their neighbours: each is a chart, not a line of one."""


def curve_groups(rows: Sequence[Metrics]) -> list[dict[str, Any]]:
    """Charts by prefix; a name without one goes under its stage.

    A chart has one series for each stage and line: steps and values, None where a value is not a finite number.
    `[{"prefix": "reward", "charts": [{"key": "reward/total", "series": [{"stage": "rl", "line": "", "steps": [1],
    "values": [0.5]}]}]}]`
    """
    series: dict[str, dict[tuple[str, str], tuple[list[int], list[float | None]]]] = {}
    for row in rows:
        for key, value in row.items():
            if key in ("stage", "step") or not _is_number(value):
                continue
            chart, line = _chart_and_line(key)
            steps, values = series.setdefault(chart, {}).setdefault((row["stage"], line), ([], []))
            steps.append(row["step"])
            values.append(_significant(value))
    groups: dict[str, list[dict[str, Any]]] = {}
    for chart in sorted(series):
        lines: list[dict[str, Any]] = [
            {"stage": stage, "line": line, "steps": steps, "values": values}
            for (stage, line), (steps, values) in series[chart].items()
        ]
        prefix = chart.partition("/")[0] if "/" in chart else lines[0]["stage"]
        groups.setdefault(prefix, []).append({"key": chart, "series": lines})
    ranked = sorted(groups, key=lambda prefix: (ORDER.index(prefix) if prefix in ORDER else len(ORDER), prefix))
    return [{"prefix": prefix, "charts": groups[prefix]} for prefix in ranked]


def _chart_and_line(key: str) -> tuple[str, str]:
    """A key of three parts is a line of the chart that its first two name; that name alone is the line ""."""
    if key in OWN_CHART:
        return key, ""
    head, _, leaf = key.rpartition("/")
    return (head, leaf) if head.count("/") >= 1 else (key, "")


def _is_number(value: Any) -> bool:
    return value in ("nan", "inf", "-inf") or (isinstance(value, int | float) and not isinstance(value, bool))


def _significant(value: Any) -> float | None:
    return None if isinstance(value, str) else float(f"{value:.5g}")
