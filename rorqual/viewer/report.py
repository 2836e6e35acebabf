"""One self-contained HTML page about a run: what was learned, how, and what the policy wrote on the way.

The page needs no network and no server: styles, scripts, the chart library and the data are inside it. What is shown
follows from what the run holds: a metric that appears in metrics.jsonl appears on the page without a change here.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from rorqual.store.files import write_atomic
from rorqual.store.run import Run
from rorqual.viewer.curves import curve_groups
from rorqual.viewer.held_out import PREFIX, held_out_rows
from rorqual.viewer.results import comparisons, results
from rorqual.viewer.rollouts import collect_rollouts
from rorqual.viewer.selection import shown_maps
from rorqual.viewer.tokens import TokenTexts

SCRIPTS = ("format.js", "results.js", "held_out.js", "selection.js", "charts.js", "rollouts.js", "page.js")
ROLLOUT_BYTES = 2_500_000
"""How much of the page rollouts may take; with the chart library it stays below 8 MB."""


def write_report(run_directory: str | Path, rollout_bytes: int = ROLLOUT_BYTES) -> Path:
    """Write `report.html` into the run directory, also while the run goes on, and return its path.

    Raises: StoreError when there is no run; ValueError naming the extra when plotly is not installed.
    """
    plotly_source = _plotly_source()
    run = Run.read(run_directory)
    page = render_page(report_data(run, rollout_bytes), plotly_source)
    path = run.path / "report.html"
    write_atomic(path, lambda file: file.write(page.encode()))
    return path


def report_data(run: Run, rollout_bytes: int = ROLLOUT_BYTES) -> dict[str, Any]:
    """All that the page shows, as JSON values."""
    texts = TokenTexts.of_run(run)
    held_out = held_out_rows(run)
    return {
        "name": run.path.resolve().name,
        "sessions": run.manifest["sessions"],
        "seeds": run.manifest["seeds"],
        "config": run.config,
        "recipe": run.manifest["recipe"],
        "held_out": held_out,
        "selection_maps": shown_maps(run, [row["label"] for row in held_out], texts),
        "results": results(run),
        "comparisons": comparisons(run),
        "curves": curve_groups([row for row in run.metrics() if not row["stage"].startswith(PREFIX)]),
        "rollouts": collect_rollouts(run, rollout_bytes, texts),
        "tokens": texts.used(),
    }


def render_page(data: dict[str, Any], plotly_source: str) -> str:
    """The page around `data`. Text from the run is data to the page, never markup."""
    static = files("rorqual.viewer") / "static"
    page = (static / "index.html").read_text(encoding="utf-8")
    scripts = "\n".join((static / name).read_text(encoding="utf-8") for name in SCRIPTS)
    parts = {
        "TITLE": _escaped(data["name"]),
        "STYLE": (static / "report.css").read_text(encoding="utf-8"),
        "PLOTLY": plotly_source,
        "DATA": msgspec.json.encode(data).decode().replace("<", "\\u003c"),
        "SCRIPT": scripts,
    }
    before, *rest = page.split("{{")
    return before + "".join(parts[piece.partition("}}")[0]] + piece.partition("}}")[2] for piece in rest)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _plotly_source() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ValueError('The report needs plotly, which is not installed: pip install "rorqual[report]".') from error
    source: str = get_plotlyjs()
    return source.replace("</script", "<\\/script")
