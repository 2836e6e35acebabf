"""What produced a run: versions of the software, the state of the checkout, the command, the time."""

from __future__ import annotations

import datetime
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "rorqual",
    "torch",
    "triton",
    "numpy",
    "msgspec",
    "numba",
    "safetensors",
    "tokenizers",
    "transformers",
    "pyarrow",
    "reasoning-gym",
    "scipy",
    "plotly",
)


def describe_session(command: Sequence[str]) -> dict[str, Any]:
    """One start or resumption of a run, as JSON values."""
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "versions": installed_versions(),
        "platform": platform.platform(),
        "git": git_state(Path(__file__)),
    }


def installed_versions() -> dict[str, str | None]:
    """Version of Python and of each package that shapes a result; None for one that is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def git_state(file: Path) -> dict[str, Any] | None:
    """Commit of the checkout that tracks `file`, and whether it has changes; None outside a checkout or without git."""
    folder = file.resolve().parent
    if _git(folder, "ls-files", "--error-unmatch", file.name) is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
