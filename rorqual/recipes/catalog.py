"""The recipes by name: what a config file's first line, `recipe = "r1_zero"`, refers to.

A recipe is a module with `Config` (a Record), `seeds(config)`, `check(config)`, which finds before a run what would
stop it later, `main(config, run, progress)`, and `architecture(config, stage)`, the model that a stage's checkpoint is
read into. One that trains on problems has `problems(config)` too.
"""

from __future__ import annotations

from types import ModuleType

from rorqual.recipes import pretrain_text, r1_zero, sparsify

RECIPES: dict[str, ModuleType] = {"r1_zero": r1_zero, "sparsify": sparsify, "pretrain_text": pretrain_text}
