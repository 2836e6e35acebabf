"""Compiles the Triton kernels of an operation for a GPU that is not here, and prints what each one needs.

Triton's interpreter runs what no compiler accepts. This runs the host code on CPU tensors, with a driver that only says
which GPU it would be: every kernel is bound, specialized and compiled as it would be there, down to machine code, and
none is launched. `python compile_dsa.py 80` for an A100, 90 for an H100; one JSON object a kernel.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}


class Driver:
    """What Triton asks a driver for before it launches."""

    def __init__(self, capability: int) -> None:
        self.target, self.utils = GPUTarget("cuda", capability, 32), self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES[self.target.arch]}


def pretend(capability: int) -> None:
    """From here on a launch compiles and reports."""
    triton.runtime.driver.set_active(Driver(capability))
    seen: set[str] = set()

    def compile_only(kernel: JITFunction, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            compiled = kernel.run(*args, grid=grid, warmup=True, **options)
            if compiled.hash not in seen:
                seen.add(compiled.hash)
                sys.stdout.write(json.dumps({"kernel": kernel.__name__, "shared": compiled.metadata.shared}) + "\n")

        return launch

    JITFunction.__getitem__ = compile_only


def sparse_attention(sharing: int, width: int, value_width: int, dtype: torch.dtype, view: bool) -> None:
    from rorqual.ops.gpu import dsa_backward, dsa_forward

    dsa_forward.DEFAULT_SHARED_BYTES = SHARED_BYTES[triton.runtime.driver.active.target.arch]
    q, k = torch.zeros(1, 64, sharing, width, dtype=dtype), torch.zeros(1, 64, 1, width, dtype=dtype)
    v = k[..., :value_width] if view else torch.zeros(1, 64, 1, value_width, dtype=dtype)
    selected = torch.zeros(1, 64, 64, dtype=torch.int64)
    out, log_sum = dsa_forward.forward(q, k, v, selected, 1.0)
    saved = dsa_backward.Saved(q, k, v, selected, out.zero_(), log_sum)
    dsa_backward.backward(saved, torch.zeros_like(out), 1.0)


if __name__ == "__main__":
    pretend(int(sys.argv[1]))
    sparse_attention(128, 576, 512, torch.bfloat16, True)
    sparse_attention(128, 576, 512, torch.bfloat16, False)
    sparse_attention(16, 192, 128, torch.bfloat16, False)
    sparse_attention(3, 96, 40, torch.float16, False)
    sparse_attention(4, 64, 64, torch.float32, False)
