"""The report of a run on text: gaps, recall by layer, needles by depth, and maps of what is selected."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from rorqual.records import Record
from rorqual.store.files import StoreError
from rorqual.store.run import Run
from rorqual.text.tokenizer import train_tokenizer
from rorqual.viewer.report import report_data, write_report
from rorqual.viewer.selection import LAYERS_SHOWN

NUM_LAYERS = 11
FIGURES: dict[str, dict[str, float]] = {
    "dense": {"held_out/cross_entropy": 4.0},
    "warmup": {"held_out/cross_entropy": 4.0, "held_out/kl_over_uniform": 0.5, "held_out/recall": 0.6},
    "sparse": {"held_out/cross_entropy": 4.02, "held_out/kl_over_uniform": 0.4, "held_out/recall": 0.7},
    "control": {"held_out/cross_entropy": 3.99},
}


class Settings(Record):
    top_k: int = 8


def maps(num_layers: int) -> dict[str, Any]:
    attention = [[1.0], [0.75, 0.25], [0.5, 0.0, 0.5]]
    selected = [[1.0], [1.0, 1.0], [0.5, 0.25, 0.75]]
    layers = [
        {"layer": layer, "recall": 0.5, "attention": attention, "selected": selected} for layer in range(num_layers)
    ]
    beginnings = [[300, 301], [302], [300]]
    return {"num_tokens": 30, "top_k": 10, "edges": [0, 10, 20, 30], "beginnings": beginnings, "layers": layers}


def text_run(directory: Path, num_layers: int = NUM_LAYERS, recipe: str = "sparsify") -> Run:
    """A run on text, as far as its report needs one."""
    labels = FIGURES if recipe == "sparsify" else {"pretrain": FIGURES["control"]}
    with Run.open(directory, Settings(), {"run": 0}, ["test"], recipe=recipe) as run:
        train_tokenizer(["one two three one two three"] * 9, 330).save(run.path / "tokenizer")
        run.append_metrics("warmup", 1, {"loss": 2.0, "indexer/kl": 1.0, "indexer/kl/0": 1.5, "indexer/kl/1": 0.5})
        for number, (label, row) in enumerate(labels.items()):
            layers = {f"held_out/recall/{layer}": 0.1 * layer for layer in range(NUM_LAYERS)}
            needles = {"needle/accuracy": 0.25, "needle/accuracy/100": 0.5, "needle/accuracy/25": 0.125 * number}
            recall = layers if "held_out/recall" in row else {}
            run.append_metrics(f"held_out_{label}", 1, {**row, **recall, **needles})
            if recall:
                run.write_selection_maps(label, maps(num_layers))
        return run


def test_gaps_are_to_the_dense_base_and_to_the_control(tmp_path: Path) -> None:
    data = report_data(text_run(tmp_path / "run"))
    dense, warmup, sparse, control = data["held_out"]
    assert [row["label"] for row in data["held_out"]] == list(FIGURES)
    assert (dense["gap"], warmup["gap"], dense["difference"]) == (0.0, 0.0, 0.0)
    assert sparse["gap"] == pytest.approx(0.005) and sparse["difference"] == pytest.approx(0.02)
    assert sparse["control_difference"] == pytest.approx(0.03)
    assert sparse["control_gap"] == pytest.approx(4.02 / 3.99 - 1)
    assert all(row["control_gap"] is None for row in (dense, warmup, control)), "they saw other numbers of tokens"
    stages = {series["stage"] for group in data["curves"] for chart in group["charts"] for series in chart["series"]}
    assert stages == {"warmup"}


def test_layers_and_depths_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    dense, _, sparse, _ = report_data(text_run(tmp_path / "run"))["held_out"]
    assert dense["recall"] is None and dense["recall_by_layer"] == [] and sparse["recall"] == 0.7
    assert sparse["recall_by_layer"] == pytest.approx([0.1 * layer for layer in range(NUM_LAYERS)]), "2 before 10"
    assert sparse["needles"] == 0.25 and sparse["needles_by_depth"] == [(25, 0.25), (100, 0.5)]


def test_maps_come_with_the_texts_of_their_tokens(tmp_path: Path) -> None:
    run = text_run(tmp_path / "run")
    data = report_data(run)
    assert [each["label"] for each in data["selection_maps"]] == ["warmup", "sparse"]
    assert data["selection_maps"][1]["layers"] == maps(NUM_LAYERS)["layers"]
    assert data["tokens"].keys() == {"300", "301", "302"}


def test_of_many_layers_some_are_shown_and_the_page_says_of_how_many(tmp_path: Path) -> None:
    (_, sparse) = report_data(text_run(tmp_path / "run", num_layers=61))["selection_maps"]
    shown = [layer["layer"] for layer in sparse["layers"]]
    assert len(shown) == LAYERS_SHOWN and (shown[0], shown[-1]) == (0, 60) and sparse["num_layers"] == 61


def test_a_damaged_map_is_named(tmp_path: Path) -> None:
    run = text_run(tmp_path / "run")
    (run.path / "selection_maps" / "sparse.json").write_text("{")
    with pytest.raises(StoreError, match=r"sparse\.json is not JSON"):
        report_data(run)


def script(name: str) -> str:
    return (files("rorqual.viewer") / "static" / name).read_text(encoding="utf-8")


def test_colours_are_equal_ratios_of_the_share() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no Node on this machine")
    code = script("selection.js") + "console.log(JSON.stringify([0, 1e-4, 1e-3, 1e-2, 0.1, 1, 1.0001].map(strengthOf)))"
    answer = subprocess.run([node, "-e", code], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout) == pytest.approx([0, 0, 0, 1 / 3, 2 / 3, 1, 1])


def drawn(page: Path) -> str:
    """The page after its scripts ran, by a browser."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no Chromium on this machine")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", "--enable-logging=stderr"]
    command = [browser, *options, "--dump-dom", page.as_uri()]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "Uncaught" not in answer.stderr
    return answer.stdout


@pytest.mark.slow
def test_a_sparse_run_is_drawn_by_a_browser(tmp_path: Path) -> None:
    page = drawn(write_report(text_run(tmp_path / "run").path))
    assert "<td>+0.50%</td>" in page and "<td>±0.00%</td>" in page and "<td>+0.75%</td>" in page
    assert '<section id="results" hidden=""' in page and '<section id="selection">' in page
    maps_of_sparse = re.findall(r'aria-label="Layer \d+, (?:Dense attention|Selected)"', page)
    assert len(maps_of_sparse) == 2 * NUM_LAYERS
    assert page.count('"js-plotly-plot"') + page.count("plot js-plotly-plot") >= 2


@pytest.mark.slow
def test_a_run_without_indexers_says_nothing_of_them(tmp_path: Path) -> None:
    page = drawn(write_report(text_run(tmp_path / "run", recipe="pretrain_text").path))
    assert ">Held-out text</h2>" in page and '<section id="selection" hidden=""' in page
    assert "<td>3.9900</td>" in page and "attention found</th>" not in page
