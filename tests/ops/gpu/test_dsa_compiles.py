"""Every Triton kernel compiles for the GPUs it is written for, and fits into their shared memory; no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "compile_dsa.py"
KERNELS = {"_forward", "_weigh_pairs", "_of_queries", "_parts", "_add_parts"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "shared"), [(80, 163 << 10), (86, 99 << 10), (90, 227 << 10)], ids=["A100", "RTX", "H100"]
)
def test_kernels_compile_and_fit(capability: int, shared: int, tmp_path: Path) -> None:
    """In a process of its own, in which Triton compiles instead of interpreting, and with an empty cache."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[3])}
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    found = [json.loads(line) for line in answer.stdout.splitlines()]
    assert {each["kernel"] for each in found} == KERNELS
    assert [each for each in found if each["shared"] > shared] == []
