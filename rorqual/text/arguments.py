"""The arguments of a call: one JSON object, read and written within limits that no text of a policy can break."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

MAX_DEPTH = 100
"""Deepest nesting of lists and objects that counts as JSON here; the standard parser fails somewhere above."""


def read_json(text: str) -> Any:
    """The value of JSON text.

    Raises: ValueError for anything else, and for what could not be written again: NaN, numbers too large for a float,
    lone surrogates, nesting beyond `MAX_DEPTH`.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from None
    if not _is_shallow(value):
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    write_json(value).encode()
    return value


def write_json(value: Any) -> str:
    """JSON text as DeepSeek writes it: a space after commas and colons, other scripts as they are.

    Raises: ValueError for NaN and infinite numbers.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def read_object(text: str) -> dict[str, Any]:
    """The JSON object that `text` is. Raises: ValueError saying what it is instead."""
    value = read_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"it is a {type(value).__name__}, not an object")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _is_shallow(value: Any) -> bool:
    """Whether `value` is nested no deeper than `MAX_DEPTH`, level by level."""
    level = _containers([value])
    for _ in range(MAX_DEPTH):
        level = [child for each in level for child in _containers(each.values() if isinstance(each, dict) else each)]
    return not level


def _containers(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if isinstance(value, dict | list)]
