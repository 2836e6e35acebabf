"""Compiles the Triton kernels of native sparse attention for a GPU that is not here: a process of its own, without the
interpreter. `python compile_nsa.py 80` for an A100, 86 for an RTX, 90 for an H100; one JSON object a kernel.

The host code runs on CPU tensors, under a driver that only says which GPU it would be. Launches compile, down to
machine code, and run nothing.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from rorqual.ops import nsa
from rorqual.ops.gpu import nsa as nsa_gpu
from rorqual.ops.gpu import nsa_tiles

SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10}

PAPER = nsa.BlockSizes(32, 16, 64, 16, 1, 2, 512)
UNEVEN = nsa.BlockSizes(12, 4, 40, 3, 0, 1, 1)


class Driver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def compile_only(kernel: JITFunction, grid: Any) -> Any:
    def launch(*args: Any, **options: Any) -> None:
        compiled = kernel.run(*args, grid=grid, warmup=True, **options)
        fields = {"kernel": kernel.__name__, "shared": compiled.metadata.shared, "hash": compiled.hash}
        sys.stdout.write(json.dumps(fields) + "\n")

    return launch


def compile_all(
    sizes: nsa.BlockSizes, groups: int, sharing: int, dim: int, dtype: torch.dtype, num_queries: int, num_keys: int
) -> None:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(1, *shape, dtype=dtype, requires_grad=True)

    counts = [nsa.num_compressed(num_keys, sizes)] * 2 + [num_keys] * 4
    branches = nsa.Branches(*(zeros(count, groups, dim) for count in counts))
    heads, position_RQ = groups * sharing, torch.arange(num_keys - num_queries, num_keys)[None]
    q, gates = zeros(num_queries, heads, dim), zeros(num_queries, heads, 3)
    nsa_gpu.native_sparse_attention(q, branches, gates, position_RQ, sizes, dim**-0.5).sum().backward()


if __name__ == "__main__":
    capability = int(sys.argv[1])
    triton.runtime.driver.set_active(Driver(capability))
    JITFunction.__getitem__ = compile_only
    nsa_tiles.DEFAULT_SHARED_BYTES = SHARED_BYTES[capability]
    nsa_gpu.INTERPRETED = tl.constexpr(True)  # Or it would refuse tensors on a CPU.
    compile_all(PAPER, 4, 16, 128, torch.bfloat16, 1024, 1024)
    compile_all(UNEVEN, 1, 3, 24, torch.float16, 1, 131)
    compile_all(nsa.BlockSizes(1, 1, 1, 1, 0, 1, 1), 1, 1, 16, torch.float32, 1, 1)
