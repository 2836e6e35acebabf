"""The manual page, made from the command line itself so that it cannot differ from it."""

from __future__ import annotations

import inspect
from typing import Any


def manual_page(group: Any) -> str:
    """Markdown: for each verb its usage, what it does with examples, its arguments and options."""
    parts = ["# The command line", "", "Written by `make docs` from the program itself; do not edit.", ""]
    for name, command in group.commands.items():
        if not command.hidden:
            parts += _verb(name, command)
    parts += ["Every verb takes `--help`. `--debug` shows the traceback of an error.", ""]
    return "\n".join(parts)


def _verb(name: str, command: Any) -> list[str]:
    lines = [f"## rorqual {name}", "", *_prose(command.help or ""), "", "| | |", "|---|---|"]
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            lines.append(f"| `{parameter.name.upper()}` | {parameter.help} |")
        elif parameter.name != "help":
            lines.append(f"| `{', '.join(parameter.opts)}` | {parameter.help}{_default(parameter)} |")
    return [*lines, ""]


def _prose(text: str) -> list[str]:
    """The docstring, its examples as one block of code."""
    prose, _, examples = inspect.cleandoc(text).partition("Examples:")
    lines = [line.strip() for line in examples.splitlines() if line.strip()]
    return [*prose.strip().splitlines(), "", "```sh", *lines, "```"]


def _default(parameter: Any) -> str:
    return f" Default: `{parameter.default}`." if parameter.default not in (None, False) else ""
