"""The documents: every link leads somewhere, and the page of the command line is what the command line says."""

from __future__ import annotations

import itertools
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer

from rorqual.cli.main import app, main
from rorqual.cli.manual import manual_page
from rorqual.config import load_config, read_recipe_name
from rorqual.envs.dialogue import ReasoningGymTasks
from rorqual.recipes.catalog import RECIPES

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def anchors(path: Path) -> set[str]:
    """The anchors of a Markdown file's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name) if name else document
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_documents_name_exist(document: Path) -> None:
    named = re.findall(r"`((?:rorqual|tests|configs|benchmarks|docs|examples)/[\w./-]+)`", document.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_page_of_the_command_line_is_current() -> None:
    page = manual_page(typer.main.get_command(app))
    assert (ROOT / "docs" / "cli.md").read_text() == page, "run `make docs`"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.toml")), ids=lambda path: path.stem)
def test_every_config_loads(path: Path) -> None:
    recipe = read_recipe_name(path)
    assert path.parent.name == recipe
    load_config(path, RECIPES[recipe].Config)


def run_commands() -> list[str]:
    """Every `rorqual run` that the documents and the help show, without placeholders, as it would be typed."""
    texts = [path.read_text() for path in DOCUMENTS] + [typer.main.get_command(app).commands["run"].help]
    found = [re.findall(r"^\s*(?:.venv/bin/)?(rorqual run .*?)(?:\s+#.*)?$", text, re.MULTILINE) for text in texts]
    found += [re.findall(r"`(?:.venv/bin/)?(rorqual run .*?)`", text) for text in texts]
    return sorted({command for commands in found for command in commands})


def test_commands_are_found() -> None:
    assert sum("--set 'tasks=[" in command for command in run_commands()) == 1
    assert len(run_commands()) >= 3


@pytest.mark.parametrize("command", run_commands())
def test_every_run_that_documents_show_can_begin(command: str) -> None:
    path, *options = shlex.split(command)[2:]
    settings = [value for name, value in itertools.pairwise(options) if name == "--set"]
    assert options[::2] == ["--set"] * len(settings) + ["--out"] * (len(options) // 2 - len(settings))
    recipe = RECIPES[read_recipe_name(ROOT / path)]
    config = load_config(ROOT / path, recipe.Config, settings)
    if not hasattr(config, "tasks"):
        recipe.check(config)
    for each in getattr(config, "tasks", ()):
        assert ReasoningGymTasks.from_config(each).task("test", 0).messages


def test_help_shows_commands_as_they_are_typed(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["run", "--help"]) == 0
    shown = capsys.readouterr().out
    (command,) = (each for each in run_commands() if "--set 'tasks=[" in each)
    assert command in shown


def test_question_that_the_help_shows_is_one_that_the_demo_trains() -> None:
    (question,) = re.findall(r'-q "(.*?)"', typer.main.get_command(app).commands["chat"].help)
    config = load_config(ROOT / "configs/r1_zero/tiny.toml", RECIPES["r1_zero"].Config)
    kinds = [ReasoningGymTasks.from_config(each).task("test", 0).messages[-1].content for each in config.tasks]
    shape = [re.sub(r"[+-]", "±", re.sub(r"\d+", "N", text)) for text in (question, *kinds)]
    assert shape[0] in shape[1:]


def test_readme_opens_with_two_commands() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    commands = [line.partition("#")[0].strip() for line in blocks[0].splitlines()]
    assert commands == ["make demo", "make test"]


def test_verbs_of_the_makefile_are_described() -> None:
    makefile = (ROOT / "Makefile").read_text()
    verbs = re.findall(r"^([a-z-]+):.*##", makefile, re.MULTILINE)
    assert set(verbs) == {
        "help",
        "demo",
        "test",
        "test-slow",
        "lint",
        "types",
        "bench",
        "bench-sparse",
        "bench-quality",
        "bench-context",
        "docs",
    }


def test_every_extra_is_known_to_the_doctor_and_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    wanted = [*project["dependencies"]]
    for name in ("hf", "report", "eval", "dev"):
        wanted += project["optional-dependencies"][name]
    names = {re.split(r"[<>=\[]", each)[0].lower() for each in wanted} - {"rorqual"}
    assert names <= pins
