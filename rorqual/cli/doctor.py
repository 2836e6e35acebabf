"""What is installed here, what is missing, and what to do about it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch

from rorqual.records import Record
from rorqual.store.provenance import git_state

MIN_FREE_BYTES = 2_000_000_000

EXTRAS: dict[str, tuple[str, ...]] = {
    "cpu": ("numba",),
    "gpu": ("triton",),
    "hf": ("transformers",),
    "report": ("plotly",),
    "eval": ("scipy",),
    "agents": ("openai", "tenacity"),
    "serve": ("starlette", "uvicorn", "httpx", "prometheus-client", "llguidance"),
    "bench": ("trl",),
    "dev": ("pytest", "hypothesis", "ruff", "mypy"),
}
"""Extra -> the packages it brings."""

CORE = ("torch", "safetensors", "tokenizers", "msgspec", "numpy", "pyarrow", "reasoning-gym", "typer", "rich")


class Finding(Record):
    """One line of the examination. advice: what to do; empty where there is nothing to do.

    `Finding(what="plotly", state="missing", found="not installed", advice='pip install "rorqual[report]"')`
    """

    what: str
    state: str
    found: str
    advice: str = ""


def examine(out: Path) -> list[Finding]:
    """Everything that a run depends on. State is "good", "missing" (an extra that is not needed to run) or "bad"."""
    return [_python(), _checkout(), *_core(), *_extras(), _threads(), *_devices(), _disk(out), _writable(out)]


def _python() -> Finding:
    return Finding(what="Python", state="good", found=f"{platform.python_version()} at {sys.executable}")


def _checkout() -> Finding:
    git = git_state(Path(__file__))
    state = f", commit {git['commit'][:10]}{' with changes' if git['dirty'] else ''}" if git else ""
    return Finding(
        what="rorqual", state="good", found=f"{_version('rorqual') or 'not installed, run from source'}{state}"
    )


def _core() -> list[Finding]:
    return [_package(name, "bad", "pip install rorqual") for name in CORE]


def _extras() -> list[Finding]:
    return [
        _package(name, "missing", f'pip install "rorqual[{extra}]"')
        for extra, names in EXTRAS.items()
        for name in names
    ]


def _package(name: str, state_if_absent: str, command: str) -> Finding:
    version = _version(name)
    if version is None:
        return Finding(what=name, state=state_if_absent, found="not installed", advice=command)
    return Finding(what=name, state="good", found=version)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _threads() -> Finding:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    if threads > available:
        advice = f"set OMP_NUM_THREADS={available}: more threads than cores slow every step down"
        return Finding(what="threads", state="bad", found=f"torch uses {threads} on {available} cores", advice=advice)
    return Finding(what="threads", state="good", found=f"torch uses {threads} on {available} cores")


def _devices() -> list[Finding]:
    if not torch.cuda.is_available():
        return [Finding(what="GPU", state="good", found="none; the tiny recipes need none")]
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        found.append(Finding(what=f"GPU {index}", state="good", found=f"{properties.name}, {memory}"))
    return found


def _disk(out: Path) -> Finding:
    free = shutil.disk_usage(_existing(out)).free
    found = f"{free / 1e9:.0f} GB free at {out}"
    if free < MIN_FREE_BYTES:
        return Finding(
            what="disk", state="bad", found=found, advice="free some space, or choose another place with --out"
        )
    return Finding(what="disk", state="good", found=found)


def _writable(out: Path) -> Finding:
    try:
        with tempfile.TemporaryFile(dir=_existing(out)):
            return Finding(what="run directory", state="good", found=f"{out} can be written")
    except OSError as error:
        advice = "choose another place with --out, or change its permissions"
        return Finding(what="run directory", state="bad", found=f"{out}: {error.strerror}", advice=advice)


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.is_dir())
