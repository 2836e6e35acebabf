"""Products and rounding of Triton kernels that mean the same on a GPU and in Triton's interpreter.

The interpreter keeps bfloat16 as bit patterns: `tl.dot` multiplies the patterns, and a cast cuts bits off instead of
rounding. Tests of kernels on a CPU would judge the interpreter. What is here compiles to the plain operation on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether the kernels of this process run on a CPU; Triton reads TRITON_INTERPRET when a kernel is defined."""


@triton.jit  # type: ignore[untyped-decorator]
def product(a: tl.tensor, b: tl.tensor, total: tl.tensor) -> tl.tensor:
    """`total + a @ b` in float32: products of two half precision numbers are exact there, and float32 stays float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit  # type: ignore[untyped-decorator]
def rounded(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """float32 numbers in another dtype, to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        upper = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x != x, x, upper.to(tl.float32, bitcast=True))
    return x.to(dtype)
