"""The Triton kernels of native sparse attention are compiled for GPUs that are not here, and fit them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = {
    "_forward",
    "_query_backward",
    "_key_backward",
    "_importance",
    "_select",
    "_add_items",
    "_gated_sum",
    "_gate_gradients",
}


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "shared"), ((80, 163 << 10), (86, 99 << 10), (90, 227 << 10)))
def test_kernels_compile_and_fit(capability: int, shared: int, tmp_path: Path) -> None:
    """An A100, an RTX, and an H100."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[3])}
    script = Path(__file__).with_name("compile_nsa.py")
    answer = subprocess.run(
        [sys.executable, str(script), str(capability)], env=environment, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    compiled = [json.loads(line) for line in answer.stdout.splitlines()]
    assert {each["kernel"] for each in compiled} == KERNELS
    assert max(each["shared"] for each in compiled) <= shared
