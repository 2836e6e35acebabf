"""The selection maps of a run, as the page shows them."""

from __future__ import annotations

from typing import Any

from rorqual.store.run import Run
from rorqual.viewer.rollouts import spread
from rorqual.viewer.tokens import TokenTexts

LAYERS_SHOWN = 24
"""Of a model; a layer takes some 60 kB of the page."""


def shown_maps(run: Run, labels: list[str], texts: TokenTexts) -> list[dict[str, Any]]:
    """The maps of those models that have some, in the order of `labels`; of many layers, evenly spaced ones.

    `num_layers` is how many the run holds; the other keys are those of `train.selection_map`.
    """
    shown = []
    for label in labels:
        maps = run.read_selection_maps(label)
        if maps is None:
            continue
        for token_ids in maps["beginnings"]:
            texts.add(token_ids)
        layers = maps["layers"]
        shown.append({**maps, "label": label, "layers": spread(layers, LAYERS_SHOWN), "num_layers": len(layers)})
    return shown
