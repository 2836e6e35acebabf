"""What each stage of sparse training does to held-out text: the rows of a run's `held_out_LABEL` stages."""

from __future__ import annotations

from typing import Any

from rorqual.store.run import Run

PREFIX = "held_out_"
"""Of the stages that hold such figures; they are a table, not curves."""


def held_out_rows(run: Run) -> list[dict[str, Any]]:
    """In the order of the stages; `gap` is relative to the first one, the dense base.

    `[{"label": "sparse", "cross_entropy": 3.35, "gap": 0.002, "kl_over_uniform": 0.26, "recall": 0.39,
    "recall_by_layer": [0.4, 0.38]}]`; None and an empty list for a model without indexers.
    """
    rows: list[dict[str, Any]] = []
    for figures in run.metrics():
        if not figures["stage"].startswith(PREFIX):
            continue
        loss = figures["held_out/cross_entropy"]
        layers = sorted((name for name in figures if name.startswith("held_out/recall/")), key=_layer)
        rows.append(
            {
                "label": figures["stage"].removeprefix(PREFIX),
                "cross_entropy": loss,
                "gap": loss / rows[0]["cross_entropy"] - 1.0 if rows else 0.0,
                "kl_over_uniform": figures.get("held_out/kl_over_uniform"),
                "recall": figures.get("held_out/recall"),
                "recall_by_layer": [figures[name] for name in layers],
            }
        )
    return rows


def _layer(name: str) -> int:
    return int(name.rpartition("/")[2])
