"""The report: self-contained, complete, made of data alone, and drawn without an error where a browser is at hand."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from array import array
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rorqual.records import Record
from rorqual.store.run import Run
from rorqual.viewer.curves import curve_groups
from rorqual.viewer.report import render_page, report_data, write_report
from rorqual.viewer.rollouts import _runs, collect_rollouts
from rorqual.viewer.tokens import TokenTexts


@pytest.fixture(scope="module")
def page(run_directory: Path) -> Path:
    return write_report(run_directory)


def embedded(page: Path) -> dict[str, Any]:
    match = re.search(r'<script id="data" type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)
    assert match is not None
    return json.loads(match[1])


def test_page_is_one_file_that_asks_for_nothing(page: Path) -> None:
    text = page.read_text()
    before_plotly = text[: text.index('<script id="data"')]
    assert not re.search(r'(src|href)="(?!#|data:)', before_plotly)
    assert "{{" not in before_plotly
    assert "Plotly.react" in text
    assert page.stat().st_size < 8_000_000


def test_data_holds_what_the_run_holds(page: Path, run_directory: Path) -> None:
    data, run = embedded(page), Run.read(run_directory)
    assert data["name"] == "r1-zero-tiny"
    assert data["config"] == run.config
    assert [result["name"] for result in data["results"]] == list(run.eval_summaries())
    assert {source["source"] for source in data["rollouts"]} >= {"rl", "control", "evaluation: base_greedy"}
    rl = next(source for source in data["rollouts"] if source["source"] == "rl")
    assert [step["step"] for step in rl["steps"]] == [1, 11, 21, 31, 41]


def test_differences_are_against_the_first_of_the_same_protocol(page: Path) -> None:
    data = embedded(page)
    pairs = {(each["first"], each["second"]): each for each in data["comparisons"]}
    assert pairs.keys() == {
        (f"base_{protocol}", f"{label}_{protocol}")
        for label in ("trained", "control")
        for protocol in ("greedy", "sampled")
    }
    means = {result["name"]: result["mean"] for result in data["results"]}
    for (first, second), each in pairs.items():
        assert each["mean"] == pytest.approx(means[second] - means[first])
        assert each["low"] < each["mean"] < each["high"]
    assert pairs["base_sampled", "trained_sampled"]["low"] > 0.2


def test_tokens_of_the_page_rebuild_the_text(page: Path, run_directory: Path) -> None:
    data, run = embedded(page), Run.read(run_directory)
    rows = {row.trajectory.trajectory_id: row for row in run.read_trajectories("rl", 41)}
    step = next(
        s for source in data["rollouts"] if source["source"] == "rl" for s in source["steps"] if s["step"] == 41
    )
    member = step["groups"][0]["members"][0]
    row = rows[member["id"]]
    (segment,) = member["segments"]
    first, length = segment["sampled"]
    assert first == row.trajectory.segments[0].prompt_length
    written = "".join(data["tokens"][str(token)] for token in segment["ids"][first:])
    assert written == row.trajectory.evidence.response
    assert len(segment["logprobs"]) == len(segment["kept"]) == length
    assert segment["logprobs"][0] == pytest.approx(row.trajectory.segments[0].logprobs[first], abs=1e-3)
    rewards = [each["reward"] for each in step["groups"][0]["members"]]
    assert rewards == sorted(rewards, reverse=True)


def test_new_metrics_become_charts_and_quantiles_become_lines() -> None:
    rows = [
        {
            "stage": "rl",
            "step": 1,
            "policy/ratio/p50": 1.0,
            "policy/ratio/p99": 1.25,
            "zebra/stripes": 3,
            "note": "text",
        },
        {"stage": "rl", "step": 2, "policy/ratio/p50": "nan", "zebra/stripes": 4, "flag": True},
    ]
    groups = {group["prefix"]: group["charts"] for group in curve_groups(rows)}
    assert list(groups) == ["policy", "zebra"]
    (ratio,) = groups["policy"]
    assert ratio == {
        "key": "policy/ratio",
        "series": [
            {"stage": "rl", "line": "p50", "steps": [1, 2], "values": [1.0, None]},
            {"stage": "rl", "line": "p99", "steps": [1], "values": [1.25]},
        ],
    }
    assert groups["zebra"][0]["series"][0]["values"] == [3.0, 4.0]


def test_the_kl_term_has_a_chart_of_its_own() -> None:
    rows = [{"stage": "rl", "step": 1, "policy/loss/kl": 1e-6, "policy/loss/surrogate": -1e-3}]
    ((policy),) = curve_groups(rows)
    lines = [(chart["key"], chart["series"][0]["line"]) for chart in policy["charts"]]
    assert lines == [("policy/loss", "surrogate"), ("policy/loss/kl", "")]


def script(name: str) -> str:
    return (files("rorqual.viewer") / "static" / name).read_text(encoding="utf-8")


def evaluated(expression: str) -> Any:
    """The value of an expression over the functions of the page, by Node where it is at hand."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no Node on this machine")
    head = "const data = {curves: []};\n"
    functions = script("charts.js") + script("rollouts.js")
    code = f"{head}{functions}console.log(JSON.stringify({expression}))"
    return json.loads(subprocess.run([node, "-e", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([2e-4, 2e-4], [0, 4e-4]), ([0, 0, None], [-0.05, 1]), ([-3], [-6, 0]), ([1, 1.1], None), ([None], None)],
)
def test_a_constant_curve_lies_in_the_middle(values: list[float | None], expected: list[float] | None) -> None:
    assert evaluated(f"constantRange({{series: [{{values: {json.dumps(values)}}}]}})") == expected


def test_control_tokens_and_stages_are_named_in_words() -> None:
    assert evaluated("specialName('<｜end▁of▁sentence｜>')") == "end of sentence"
    notes = evaluated("notesOn(['base', 'odd', 'control'])")
    assert notes.startswith("base: what training starts from; control: the same training with its rewards shuffled")


def test_every_metric_of_a_finished_run_that_needs_a_title_has_one() -> None:
    titles = script("charts.js").partition("const TITLES = {")[2].partition("};")[0]
    assert {f'"{key}"' for key in ("num_tokens", "policy/zero_advantage_sequences", "policy/loss/kl")} <= set(
        re.findall(r'^  ("[^"]+"):', titles, re.MULTILINE)
    )


def test_a_small_budget_keeps_every_step_before_a_second_group(run_directory: Path) -> None:
    run = Run.read(run_directory)
    sources = collect_rollouts(run, 60_000, TokenTexts(None))
    steps = [step for source in sources for step in source["steps"]]
    assert len(steps) >= 10
    assert all(len(step["groups"]) == 1 for step in steps)
    assert len(msgspec.json.encode([step["groups"] for step in steps])) < 62_000
    assert collect_rollouts(run, 0, TokenTexts(None)) == []


@pytest.mark.parametrize(("flags", "lengths"), [([], [0]), ([0, 0, 1], [2, 1]), ([1, 1, 0], [0, 2, 1])])
def test_run_lengths(flags: list[int], lengths: list[int]) -> None:
    assert _runs(array("b", flags)) == lengths


def test_text_of_the_run_cannot_become_markup() -> None:
    evil = "</script><script>alert(1)</script><!--"
    page = render_page({"name": evil, "tokens": {"1": evil}}, "")
    assert page.count("alert(1)") == 3
    assert "<script>alert" not in page
    assert "\\u003c/script>" in page


def test_run_that_has_only_begun(tmp_path: Path) -> None:
    class Settings(Record):
        seed: int = 0

    with Run.open(tmp_path / "new", Settings(), {}) as run:
        data = report_data(run)
        assert (data["results"], data["curves"], data["rollouts"]) == ([], [], [])
        assert write_report(run.path).exists()


def test_missing_plotly_names_the_extra(run_directory: Path) -> None:
    code = (
        "import sys; sys.modules['plotly'] = None; sys.modules['plotly.offline'] = None\n"
        "from rorqual.viewer.report import write_report\nwrite_report(sys.argv[1])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, str(run_directory)], capture_output=True, text=True, check=False
    )
    assert 'pip install "rorqual[report]"' in answer.stderr


@pytest.mark.slow
def test_page_is_drawn_by_a_browser(page: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no Chromium on this machine")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,6000", "--virtual-time-budget=8000"]
    command = [browser, *options, "--enable-logging=stderr", "--dump-dom", page.as_uri()]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "Uncaught" not in answer.stderr
    assert answer.stdout.count('class="member') >= 8
    assert answer.stdout.count("js-plotly-plot") >= 12
    assert "+49.5 points" in answer.stdout
    assert "what training starts from" in answer.stdout
