"""The recipes by name: what a config file's first line, `recipe = "r1_zero"`, refers to.

A recipe is a module with `Config` (a Record), `seeds(config)`, `problems(config)`, `check(config)`, which finds
before a run what would stop it later, and `main(config, run, progress)`.
"""

from __future__ import annotations

from types import ModuleType

from rorqual.recipes import r1_zero

RECIPES: dict[str, ModuleType] = {"r1_zero": r1_zero}
