"""What each stage of training on text does to held-out text: the rows of a run's `held_out_LABEL` stages."""

from __future__ import annotations

from typing import Any

from rorqual.store.run import Metrics, Run

PREFIX = "held_out_"
"""Of the stages that hold such figures; they are a table, not curves."""

CONTROL = "control"
"""The label of the dense base after as many tokens as the sparse model."""

BEFORE_CONTROL = ("dense", "warmup", CONTROL)
"""Labels that the control is not compared with: they saw fewer tokens, or are the control."""


def held_out_rows(run: Run) -> list[dict[str, Any]]:
    """In the order of the stages. `difference` (nats) and `gap` (relative) are to the first one, the dense base;
    `control_difference` and `control_gap` to the control.

    `[{"label": "sparse", "cross_entropy": 3.35, "difference": 0.0067, "gap": 0.002, "control_difference": 0.01,
    "control_gap": 0.003, "kl_over_uniform": 0.26, "recall": 0.39, "recall_by_layer": [0.4, 0.38], "needles": 0.5,
    "needles_by_depth": [[0, 0.25], [100, 0.75]]}]`; None and an empty list for what was not measured.
    """
    rows = [row for row in run.metrics() if row["stage"].startswith(PREFIX)]
    losses = {row["stage"].removeprefix(PREFIX): row["held_out/cross_entropy"] for row in rows}
    return [_row(row, losses) for row in rows]


def _row(figures: Metrics, losses: dict[str, float]) -> dict[str, Any]:
    label = figures["stage"].removeprefix(PREFIX)
    loss, dense = losses[label], next(iter(losses.values()))
    control = losses.get(CONTROL) if label not in BEFORE_CONTROL else None
    return {
        "label": label,
        "cross_entropy": loss,
        "difference": loss - dense,
        "gap": loss / dense - 1.0,
        "control_difference": None if control is None else loss - control,
        "control_gap": None if control is None else loss / control - 1.0,
        "kl_over_uniform": figures.get("held_out/kl_over_uniform"),
        "recall": figures.get("held_out/recall"),
        "recall_by_layer": [value for _, value in _numbered(figures, "held_out/recall/")],
        "needles": figures.get("needle/accuracy"),
        "needles_by_depth": _numbered(figures, "needle/accuracy/"),
    }


def _numbered(figures: Metrics, prefix: str) -> list[tuple[int, float]]:
    """The figures that end in a number behind `prefix`, ascending: `[(0, 0.25), (100, 0.75)]`."""
    return sorted((int(name.removeprefix(prefix)), value) for name, value in figures.items() if name.startswith(prefix))
