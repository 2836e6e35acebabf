"""The order of layers, computed from the code: a module imports its own package or a lower layer, nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rorqual"

LAYERS = {
    0: {"records", "contracts", "config"},
    1: {"text", "ops", "sandbox", "store"},
    2: {"models", "rl", "rewards", "envs"},
    3: {"engines", "rollout", "train"},
    4: {"synth", "evals", "cluster"},
    5: {"recipes"},
    6: {"server", "viewer"},
    7: {"cli"},
}
"""The command line stands above the other faces, because `rorqual report` calls the viewer; they never import it."""

LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}

OPTIONAL = {
    "numba",
    "transformers",
    "scipy",
    "plotly",
    "triton",
    "ray",
    "trl",
    "vllm",
    "math_verify",
    "openai",
    "tenacity",
}
OPTIONAL |= {"starlette", "uvicorn", "httpx", "prometheus_client", "llguidance"}
"""What a function may import: packages that the core install leaves out."""

TORCH_FREE = ["records", "contracts", "config", "store", "viewer"]


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported_names(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Each import statement with the dotted names that it may bind as modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield from ((node, f"{module}.{alias.name}") for alias in node.names)


def layer_violations(name: str, source: str) -> list[str]:
    """What `source`, as module `name`, imports against the order of layers."""
    own = name.split(".")[1]
    found = []
    for node, target in imported_names(ast.parse(source)):
        parts = target.split(".")
        where = f"{name}:{node.lineno} imports {target}"
        if isinstance(node, ast.ImportFrom) and node.level:
            found.append(f"{where}: relative")
        if parts[0] != "rorqual" or len(parts) < 2 or parts[1] == own:
            continue
        if parts[1] not in LAYER_OF:
            found.append(f"{where}: {parts[1]} has no layer")
        elif LAYER_OF[parts[1]] == LAYER_OF[own] != 0:
            found.append(f"{where}: a sibling in layer {LAYER_OF[own]}")
        elif LAYER_OF[parts[1]] > LAYER_OF[own]:
            found.append(f"{where}: upward, from layer {LAYER_OF[own]} to {LAYER_OF[parts[1]]}")
    return found


def late_import_violations(name: str, source: str) -> list[str]:
    """Imports inside a function of anything but an optional package."""
    found = []
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node, target in imported_names(function):
                if target.split(".")[0] not in OPTIONAL:
                    found.append(f"{name}:{node.lineno} imports {target} inside {function.name}")
    return found


def early_import_violations(name: str, source: str) -> list[str]:
    """Imports at the top of a module of an optional package: the core install would not import it.

    What is under ops/gpu is itself imported by name alone, where it is chosen, and may import Triton.
    """
    tree = ast.parse(source)
    allowed = {"triton"} if name.startswith("rorqual.ops.gpu.") else set()
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    guarded = {id(node) for each in ast.walk(tree) if isinstance(each, ast.Try | ast.If) for node in ast.walk(each)}
    return [
        f"{name}:{node.lineno} imports {target} at the top"
        for node, target in imported_names(tree)
        if target.split(".")[0] in OPTIONAL - allowed and id(node) not in inside | guarded
    ]


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Import cycles, each once, found by depth-first search."""
    found: list[list[str]] = []
    state: dict[str, int] = {}

    def visit(node: str, trail: list[str]) -> None:
        state[node] = 1
        for target in sorted(graph[node]):
            if state.get(target) == 1:
                found.append([*trail[trail.index(target) :], target])
            elif target not in state:
                visit(target, [*trail, target])
        state[node] = 2

    for node in sorted(graph):
        if node not in state:
            visit(node, [node])
    return found


def import_graph() -> dict[str, set[str]]:
    names = {module_name(path) for path in modules()}
    graph: dict[str, set[str]] = {name: set() for name in names}
    for path in modules():
        for _, target in imported_names(ast.parse(path.read_text())):
            for candidate in (target, target.rpartition(".")[0]):
                if candidate in names:
                    graph[module_name(path)].add(candidate)
                    break
    return graph


def test_every_module_has_a_layer() -> None:
    assert {module_name(path).split(".")[1] for path in modules()} <= LAYER_OF.keys()


def test_imports_go_down() -> None:
    assert [line for path in modules() for line in layer_violations(module_name(path), path.read_text())] == []


def test_only_optional_packages_are_imported_late_and_they_always_are() -> None:
    checks = (late_import_violations, early_import_violations)
    assert [line for path in modules() for c in checks for line in c(module_name(path), path.read_text())] == []


def test_no_import_cycle() -> None:
    assert cycles(import_graph()) == []


def test_init_files_are_empty() -> None:
    assert [str(path) for path in PACKAGE.rglob("__init__.py") if path.read_text()] == []


def test_every_folder_is_a_package() -> None:
    folders = {path.parent for path in modules()}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("name", TORCH_FREE)
def test_imports_without_torch(name: str) -> None:
    """In a process of its own, in which torch cannot be imported."""
    targets = [module_name(path) for path in modules() if module_name(path).split(".")[1] == name]
    assert targets
    code = "import sys, importlib; sys.modules['torch'] = None\nfor name in sys.argv[1:]: importlib.import_module(name)"
    answer = subprocess.run([sys.executable, "-c", code, *targets], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [
        ("rorqual.rl.losses", "from rorqual.models.decoder import Decoder", "sibling in layer 2"),
        ("rorqual.rl.losses", "import rorqual.train.step", "upward, from layer 2 to 3"),
        ("rorqual.text.chat", "from rorqual import engines", "upward"),
        ("rorqual.rl.losses", "from . import advantages", "relative"),
        ("rorqual.rl.losses", "def f():\n    from rorqual.recipes import r1", "upward"),
        ("rorqual.rl.losses", "import rorqual.helpers", "no layer"),
        ("rorqual.viewer.report", "from rorqual.cli.main import app", "upward, from layer 6 to 7"),
        ("rorqual.viewer.report", "import rorqual.server", "sibling in layer 6"),
    ],
)
def test_the_check_sees_violations(name: str, source: str, words: str) -> None:
    assert words in " ".join(layer_violations(name, source))


def test_the_check_allows_what_is_allowed_and_sees_late_imports_and_cycles() -> None:
    assert (
        layer_violations("rorqual.rl.losses", "import torch\nfrom rorqual.rl import x\nfrom rorqual.records import y")
        == []
    )
    assert late_import_violations("m", "def f():\n    import json") == ["m:2 imports json inside f"]
    assert late_import_violations("m", "def f():\n    import plotly.offline") == []
    assert early_import_violations("m", "async def f():\n    import httpx") == []
    assert early_import_violations("m", "import scipy.stats") == ["m:1 imports scipy.stats at the top"]
    assert early_import_violations("rorqual.ops.gpu.dsa", "import triton") == []
    assert early_import_violations("m", "import triton") == ["m:1 imports triton at the top"]
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [["a", "b", "c", "a"]]
