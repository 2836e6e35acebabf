"""Products and rounding in kernels against torch, on a GPU and in Triton's interpreter alike."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from rorqual.ops.gpu.numbers import product, rounded

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@triton.jit
def _multiply(a, b, total, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None]
    place = row * SIZE + column
    tl.store(total + place, product(tl.load(a + place), tl.load(b + place), tl.load(total + place)))


@triton.jit
def _round(x, y, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(y + place, rounded(tl.load(x + place), y.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_product_is_that_of_its_numbers_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, total = (torch.randn(32, 32, generator=generator).to(DEVICE) for _ in range(3))
    a, b = a.to(dtype), b.to(dtype)
    expected = total.double() + a.double() @ b.double()
    _multiply[(1,)](a, b, total, 32)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_to_nearest_and_ties_to_even(dtype: torch.dtype) -> None:
    x = torch.randn(256, generator=torch.Generator().manual_seed(0))
    ties = 1 + torch.arange(16) * 2.0**-8  # Every second one is half way between two bfloat16 numbers.
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.0e4, -1e-30, 1.0])
    x[:16], x[16:24] = ties, special
    x = x.to(DEVICE)
    found = torch.empty_like(x, dtype=dtype)
    _round[(1,)](x, found, 256)
    torch.testing.assert_close(found, x.to(dtype), rtol=0, atol=0, equal_nan=True)
