"""Checks of what was typed, made before anything is opened, so that a mistake costs no time."""

from __future__ import annotations

import tomllib
from typing import Any


def check_option(name: str, value: float | None, valid: bool, expected: str) -> None:
    """Raises: ValueError that names the option when its value, if one was given, is not valid."""
    if value is not None and not valid:
        raise ValueError(f"{name} {value:g} is out of range; it must be {expected}.")


def parse_table(name: str, text: str) -> dict[str, Any]:
    """The inline TOML table that an option holds. Raises: ValueError that names the option."""
    try:
        table = tomllib.loads(f"table = {text}")["table"]
    except tomllib.TOMLDecodeError:
        table = None
    if not isinstance(table, dict):
        raise ValueError(f"{name} {text!r} is not a TOML table; write it as in {name} '{{max_terms = 3}}'.")
    return table
