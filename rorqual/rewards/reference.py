"""Scores an answer with the scorer of the reasoning-gym data set that its task came from.

Those scorers were written for honest answers. Some evaluate the answer as Python, or hand it to sympy, which does the
same; some never return from a huge exponent; some take `nan` for any number. A policy under training writes anything,
so an answer reaches a scorer only if it could be right: what cannot be an answer of that data set scores 0 unread.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import warnings
from functools import lru_cache
from typing import Any

import reasoning_gym

MAX_ANSWER_CHARACTERS = 20_000
"""Longer than any answer of any data set."""

_LIST_OF_NUMBERS = re.compile(r"[-\d\s,\[\]]{0,4000}")
_ARITHMETIC = re.compile(r"(?!.*\*\s*\*)[\d\s.()+\-*/]{0,200}", re.DOTALL)
_EXPRESSION = re.compile(
    r"(?!.{301})"
    r"(?!(?:.*\)\s*\*\*){3})"  # at most two powers of brackets: each multiplies the size of the result
    r"(?!.*\*\*\s*\(?-?\d{3})(?!.*\*\*\s*\(?-?\d+\)?\s*\*\*)"  # no exponent above 99, no tower of powers
    r"(?:[A-Za-z]\b|(?:sin|cos|tan|exp|log|ln|sqrt|asin|acos|atan|sinh|cosh|tanh|pi|Abs)\b"
    r"|\d{1,12}(?:\.\d{0,12})?(?![\w.])|(?:\d{1,12}(?=[A-Za-z]))|[\s()+\-*/])*",
    re.DOTALL,
)

GUARDS: dict[str, re.Pattern[str]] = {
    "binary_matrix": _LIST_OF_NUMBERS,
    "coin_flip": re.compile(r"[\d\s./]{0,60}(?:e-\d{1,2})?"),
    "countdown": _ARITHMETIC,
    "game_of_life": _LIST_OF_NUMBERS,
    "n_queens": re.compile(r"[Q_\s,'\"\[\]]{0,4000}"),
    "polynomial_multiplication": _EXPRESSION,
    "puzzle24": _ARITHMETIC,
    "simple_integration": _EXPRESSION,
    "spiral_matrix": _LIST_OF_NUMBERS,
    "string_insertion": re.compile(r"[A-Z\s,'\"\[\]]{0,4000}"),
}
"""Data set -> what the whole of an answer has to match before its scorer may see it."""

_EXPLOSIVE = re.compile(r"\d[eE][+-]?\d{4}|\d{1000}")
_NOT_A_NUMBER = re.compile(r"(?<![a-z])s?(?:nan|inf|infinity)(?![a-z])", re.IGNORECASE)


def reference_score(payload: dict[str, Any], answer: str) -> float:
    """The library's score in [0, 1] of `answer` for the entry in a task's payload; 0 for one that may not be scored.

    Raises: ValueError for a payload that no reasoning-gym task has; whatever a scorer raises.
    """
    missing = {"dataset", "entry"} - payload.keys()
    if missing:
        raise ValueError(f"The task's payload has no {sorted(missing)}: accuracy can only judge reasoning-gym tasks.")
    name = payload["dataset"]
    if not is_admissible(name, answer) or _feigns_a_number(answer, payload["entry"]["answer"]):
        return 0.0
    scorer = _scorer(name, json.dumps(payload.get("options", {}), sort_keys=True))
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # some scorers print or warn
        warnings.simplefilter("ignore")
        value = float(scorer(answer, _with_tuples(name, payload["entry"])))
    return min(max(value, 0.0), 1.0)


def is_admissible(dataset: str, answer: str) -> bool:
    """Whether the scorer of `dataset` may see `answer`."""
    if len(answer) > MAX_ANSWER_CHARACTERS or _EXPLOSIVE.search(answer):
        return False
    guard = GUARDS.get(dataset)
    return guard is None or guard.fullmatch(answer) is not None


def _feigns_a_number(answer: str, reference: str) -> bool:
    """Whether `answer` says `nan` or `inf`, with which comparisons of numbers break, and the reference does not."""
    return _NOT_A_NUMBER.search(answer) is not None and _NOT_A_NUMBER.search(reference) is None


@lru_cache(maxsize=64)
def _scorer(dataset: str, options_json: str) -> Any:
    """The scorer of a data set; some of them read its options."""
    return reasoning_gym.create_dataset(dataset, seed=0, size=1, **json.loads(options_json)).score_answer


def _with_tuples(dataset: str, entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with the tuples that JSON made lists, where a scorer compares them with tuples."""
    if dataset not in ("arc_agi", "rearc"):
        return entry
    output = tuple(tuple(row) for row in entry["metadata"]["output"])
    return entry | {"metadata": entry["metadata"] | {"output": output}}
