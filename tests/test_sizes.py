"""Budgets on size: a file that outgrows its limit is two concepts, a function that does is several steps."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "rorqual"
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 100
MAX_INHERITANCE_DEPTH = 1
KERNELS = PACKAGE / "ops" / "gpu"
"""A kernel is one function by nature; such files are free of the limit on functions."""


def long_functions(source: str, limit: int) -> list[str]:
    functions = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    sizes = {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions}
    return [f"{name}: {lines} lines" for name, lines in sizes.items() if lines > limit]


def test_files_are_within_their_limit() -> None:
    sizes = {str(path): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {path: lines for path, lines in sizes.items() if lines > MAX_FILE_LINES} == {}


def test_functions_are_within_their_limit() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path.parent != KERNELS]
    found = [f"{path}: {line}" for path in files for line in long_functions(path.read_text(), MAX_FUNCTION_LINES)]
    assert found == []


def test_classes_of_ours_inherit_once_at_most() -> None:
    bases: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]

    def depth(name: str) -> int:
        return 1 + max((depth(base) for base in bases[name] if base in bases and base != "Record"), default=0)

    too_deep = {name: depth(name) - 1 for name in bases if depth(name) - 1 > MAX_INHERITANCE_DEPTH}
    assert too_deep == {}


def test_the_check_counts_lines() -> None:
    source = "def short():\n    pass\n\ndef long():\n" + "    x = 1\n" * 5
    assert long_functions(source, 5) == ["long: 6 lines"]
