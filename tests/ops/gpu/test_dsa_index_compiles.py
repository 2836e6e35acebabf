"""Every kernel of DSA's indexer is compiled for an A100, as its callers launch it. No GPU is needed for that; Triton's
interpreter, in which the other tests run, accepts more than its compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rorqual.ops import dsa, dsa_tiled

ROOT = Path(__file__).parents[3]

MOST_SHARED_BYTES = 99 * 1024
"""Of a program on GPUs of compute capability 8.6 and 8.9; an A100 has 163 KB."""

PROBLEMS = {
    # rows, queries, keys, heads, groups, width, index heads, index width, dtype
    "an odd one": (2, 18, 33, 6, 2, 20, 3, 20, torch.float32),
    "one of each": (1, 1, 2, 1, 1, 16, 1, 16, torch.float32),
    "large": (1, 128, 256, 32, 8, 128, 64, 128, torch.bfloat16),
    "large, float16": (1, 128, 256, 32, 8, 128, 64, 128, torch.float16),
    "large, float32": (1, 128, 256, 32, 8, 128, 64, 128, torch.float32),
    "latent": (1, 64, 128, 64, 1, 576, 64, 128, torch.bfloat16),
    "one query": (4, 1, 256, 8, 8, 192, 64, 128, torch.bfloat16),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
def test_kernels_compile(name: str, tmp_path: Path) -> None:
    """In a process of its own: whether kernels are interpreted is settled when they are defined."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.ops.gpu.test_dsa_index_compiles", name]
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    kernels = {line.split()[0] for line in answer.stdout.splitlines()}
    assert len(kernels) == 12, answer.stdout


def compile_instead_of_running() -> None:
    """Each launch compiles its kernel for the arguments that it is given, says what it takes, and runs nothing."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction, mangle_type

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {key: kwargs.pop(key) for key in ("num_warps", "num_stages") if key in kwargs}
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        constants = {each.name: given[each.name] for each in kernel.params if each.is_constexpr}
        constants |= {key: value for key, value in given.items() if isinstance(value, int) and value == 1}
        signature = {key: "constexpr" if key in constants else mangle_type(given[key]) for key in kernel.arg_names}
        aligned = {
            (place,): [["tt.divisibility", 16]]
            for place, key in enumerate(kernel.arg_names)
            if key not in constants and is_aligned(given[key])
        }
        source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
        name, shared = f"{kernel.__module__}.{kernel.__name__}", compiled.metadata.shared
        sys.stdout.write(f"{name} {shared}\n")
        assert shared <= MOST_SHARED_BYTES, (name, shared)

    JITFunction.run = launch


def is_aligned(value: Any) -> bool:
    return value.data_ptr() % 16 == 0 if isinstance(value, Tensor) else isinstance(value, int) and value % 16 == 0


def launch_all(name: str) -> None:
    from rorqual.ops.gpu import dsa_kl, dsa_select

    rows, queries, keys, heads, groups, width, index_heads, index_width, dtype = PROBLEMS[name]
    index = dsa.IndexerOutput(
        torch.zeros(rows, queries, index_heads, index_width, dtype=dtype, requires_grad=True),
        torch.zeros(rows, keys, index_width, dtype=dtype),
        torch.zeros(rows, queries, index_heads),
    )
    last = torch.arange(keys - queries, keys).expand(rows, -1)
    q, k = torch.zeros(rows, queries, heads, width, dtype=dtype), torch.zeros(rows, keys, groups, width, dtype=dtype)
    main = dsa_tiled.MainAttention(q, k, 0.1, last, torch.ones(rows, keys, dtype=torch.bool))
    selected = dsa_select.select_keys(index, last, None, max(1, keys // 2))
    dsa_kl.indexer_kl(main, index, torch.ones(rows, queries), None)
    dsa_kl.indexer_kl(main, index, torch.ones(rows, queries), selected.clamp(-1, keys - 1))


if __name__ == "__main__":
    compile_instead_of_running()
    launch_all(sys.argv[1])
