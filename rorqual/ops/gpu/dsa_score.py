"""DeepSeek Sparse Attention's index scores in Triton: a chunk of queries at a time, into a scratch of bounded size.

A score is read several times, by a selection or by the indexer's loss. It is made once for a chunk of queries, of which
the scores fit `SCRATCH_ELEMENTS`, so that nothing grows with queries times keys.

Shapes: as in `dsa.py`; X queries of a chunk or of a program, N keys of a program, M pairs of a query and a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.ops.dsa import IndexerOutput
from rorqual.ops.gpu.numbers import INTERPRETED

SCRATCH_ELEMENTS = 1 << 26
"""Most numbers of a chunk's scratch: 256 MB, and 512 queries of 128k keys."""

TILE_BYTES = 128
"""Queries of a program, and its keys, in bytes of one dimension: 64 in half precision; 32 in float32, whose products
are made without matrix units and from registers."""

PRECISION = "ieee"
"""Of products of float32; "tf32" is faster on tensor cores, with 10 bits of mantissa."""


class Chunk(NamedTuple):
    """Some queries of some rows: their rows, the first query, and how many there are."""

    rows: slice
    first: int
    width: int

    @property
    def queries(self) -> slice:
        return slice(self.first, self.first + self.width)


def chunks(num_rows: int, num_queries: int, elements_per_query: int, multiple: int = 1) -> Iterator[Chunk]:
    """All queries of all rows, in chunks that keep so many numbers a query within the scratch; `multiple` queries at
    least, which is the tile."""
    budget = max(1, SCRATCH_ELEMENTS // max(1, elements_per_query))
    rows = max(1, min(num_rows, budget // max(1, min(multiple, num_queries))))
    width = max(1, min(num_queries, max(1, budget // rows // multiple) * multiple))
    for row in range(0, num_rows, rows):
        for first in range(0, num_queries, width):
            yield Chunk(slice(row, min(row + rows, num_rows)), first, min(width, num_queries - first))


def of_one_dtype(*tensors: Tensor) -> list[Tensor]:
    """The tensors, contiguous and in the dtype that holds them all, as a product of tiles takes them.

    Raises: ValueError for float64, of which there is no kernel.
    """
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"The Triton kernels got {dtype}; they take float32, bfloat16 and float16. Use kernels='tiled'."
        )
    return [x.to(dtype).contiguous() for x in tensors]


def padded(size: int, least: int = 16) -> int:
    """The power of two that a tile takes for `size`; the matrix units want 16 at least."""
    return max(least, triton.next_power_of_2(size))


def tile_of(x: Tensor) -> int:
    return TILE_BYTES // x.element_size()


def width_of(x: Tensor) -> int:
    """Of the tiles that walk over vectors that no gradient is taken of: those of the main attention have up to 576
    dimensions. 64 in float32, for want of registers."""
    dim = x.shape[-1]
    return min(128 if dim % 128 == 0 and x.element_size() < 4 else 64, padded(dim))


def gradient_operands(x: Tensor) -> tuple[tl.dtype, str]:
    """In which dtype the products of gradients are taken, and how precisely. Float16 has too small a range for them;
    tf32 has its mantissa, and the range of float32."""
    if x.dtype == torch.float16:
        return tl.float32, "tf32"
    return (tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float32), PRECISION


class Gradients(NamedTuple):
    """Of the index queries [R, Q, I, C], the index keys [R, K, C] and the weights [R, Q, I]. Those of the queries are
    in their dtype if it is bfloat16, the others in float32."""

    q: Tensor
    k: Tensor
    weight: Tensor


class Index(NamedTuple):
    """`IndexerOutput` as the kernels read it: contiguous, the weights in float32; and who sees what."""

    q: Tensor
    k: Tensor
    weight: Tensor
    last_RQ: Tensor
    key_valid_RK: Tensor | None

    def rows(self, rows: slice) -> Index:
        valid_RK = None if self.key_valid_RK is None else self.key_valid_RK[rows]
        return Index(self.q[rows], self.k[rows], self.weight[rows], self.last_RQ[rows], valid_RK)


def readable(index: IndexerOutput, last_RQ: Tensor, key_valid_RK: Tensor | None) -> Index:
    """Raises: ValueError for float64."""
    q_RQIC, k_RKC = of_one_dtype(index.q.detach(), index.k.detach())
    valid_RK = None if key_valid_RK is None else key_valid_RK.to(torch.uint8).contiguous()
    return Index(q_RQIC, k_RKC, index.weight.detach().float().contiguous(), last_RQ.int().contiguous(), valid_RK)


def empty_gradients(index: Index) -> Gradients:
    """To be written, but for those of the keys, which begin at 0 and are added to."""
    dtype = torch.bfloat16 if index.q.dtype == torch.bfloat16 else torch.float32
    grad_k_RKC = torch.zeros_like(index.k, dtype=torch.float32)
    return Gradients(torch.empty_like(index.q, dtype=dtype), grad_k_RKC, torch.empty_like(index.weight))


def write_scores(index: Index, chunk: Chunk, out_RXK: Tensor) -> None:
    """Scores of the chunk's queries into `out_RXK`, as float32 or, where it is int32, as their ranks (`_rank`).

    index: of the chunk's rows alone. A hidden key gets -inf, or rank 0. What lies beyond the last key of every query of
    a tile is left as it was: no reader goes there.
    """
    num_rows, num_queries, num_heads, dim = index.q.shape
    num_keys = index.k.shape[1]
    tile = tile_of(index.q)
    if chunk.width >= 16:
        block_q, block_i = tile, 1
    else:  # A few queries against a cache: their heads fill the tile.
        block_q = padded(chunk.width, least=1)
        block_i = min(padded(num_heads, least=16 // block_q), tile // block_q)
    grid = (num_rows * triton.cdiv(chunk.width, block_q), triton.cdiv(num_keys, tile))
    with torch.cuda.device_of(index.q):
        _score_kernel[grid](
            *index[:4],
            index.last_RQ if index.key_valid_RK is None else index.key_valid_RK,
            out_RXK,
            chunk.first,
            chunk.width,
            num_queries,
            num_keys,
            num_heads,
            DIM=dim,
            HAS_VALID=index.key_valid_RK is not None,
            AS_RANKS=out_RXK.dtype == torch.int32,
            BLOCK_Q=block_q,
            BLOCK_I=block_i,
            BLOCK_K=tile,
            BLOCK_C=padded(dim),
            PRECISION=PRECISION,
            num_warps=4,
            num_stages=2,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _score_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    last_ptr: tl.tensor,
    valid_ptr: tl.tensor,
    out_ptr: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    num_heads: tl.tensor,
    DIM: tl.constexpr,
    HAS_VALID: tl.constexpr,
    AS_RANKS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One tile of queries against one tile of keys, BLOCK_I heads at a time."""
    tiles = tl.cdiv(width, BLOCK_Q)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    start_q, start_k = (tl.program_id(0) % tiles) * BLOCK_Q, tl.program_id(1) * BLOCK_K
    x_X, key_N, c_C = start_q + tl.arange(0, BLOCK_Q), start_k + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_C)
    last_X = tl.load(last_ptr + row * num_queries + first + x_X, mask=x_X < width, other=-1)
    if start_k <= tl.max(last_X, axis=0):
        k_NC = tl.load(
            k_ptr + (row * num_keys + key_N)[:, None] * DIM + c_C[None, :],
            mask=(key_N < num_keys)[:, None] & (c_C < DIM)[None, :],
            other=0.0,
        )
        k_CN = tl.trans(k_NC)
        m_M = tl.arange(0, BLOCK_Q * BLOCK_I)
        query_M = start_q + m_M // BLOCK_I
        scores_XN = tl.zeros([BLOCK_Q, BLOCK_K], dtype=tl.float32)
        for start_i in range(0, num_heads, BLOCK_I):
            head_M = start_i + m_M % BLOCK_I
            present_M = (query_M < width) & (head_M < num_heads)
            pair_M = (row * num_queries + first + query_M) * num_heads + head_M
            q_MC = tl.load(
                q_ptr + pair_M[:, None] * DIM + c_C[None, :],
                mask=present_M[:, None] & (c_C < DIM)[None, :],
                other=0.0,
            )
            weight_M = tl.load(weight_ptr + pair_M, mask=present_M, other=0.0)
            products_MN = product(q_MC, k_CN, PRECISION)
            products_MN = tl.where(products_MN < 0.0, 0.0, products_MN) * weight_M[:, None]  # A NaN stays one.
            if BLOCK_I == 1:
                scores_XN += products_MN
            else:
                products_MN = tl.where(present_M[:, None], products_MN, 0.0)  # No head is no inf times 0.
                scores_XN += tl.sum(tl.reshape(products_MN, (BLOCK_Q, BLOCK_I, BLOCK_K)), axis=1)
        visible_XN = key_N[None, :] <= last_X[:, None]
        if HAS_VALID:
            valid_N = tl.load(valid_ptr + row * num_keys + key_N, mask=key_N < num_keys, other=0)
            visible_XN &= (valid_N != 0)[None, :]
        place_XN = out_ptr + (row * width + x_X)[:, None] * num_keys + key_N[None, :]
        within_XN = (x_X < width)[:, None] & (key_N < num_keys)[None, :]
        if AS_RANKS:
            tl.store(place_XN, tl.where(visible_XN, _rank(scores_XN), 0), mask=within_XN)
        else:
            tl.store(place_XN, tl.where(visible_XN, scores_XN, float("-inf")), mask=within_XN)


@triton.jit  # type: ignore[untyped-decorator]
def product(a: tl.tensor, b: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """a b, in float32."""
    if INTERPRETED:  # Whose product takes the bits of a bfloat16 for an integer.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit  # type: ignore[untyped-decorator]
def products_of_rows(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    q_row_B: tl.tensor,
    q_present_B: tl.tensor,
    k_row_N: tl.tensor,
    k_present_N: tl.tensor,
    DIM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """q k^T of rows that lie anywhere: [B, N]; 0 where there is none."""
    products_BN = tl.zeros([BLOCK_B, BLOCK_N], dtype=tl.float32)
    for start in range(0, DIM, BLOCK_E):
        e_E = start + tl.arange(0, BLOCK_E)
        q_BE = tl.load(
            q_ptr + q_row_B[:, None] * DIM + e_E[None, :], mask=q_present_B[:, None] & (e_E < DIM)[None, :], other=0.0
        )
        k_NE = tl.load(
            k_ptr + k_row_N[:, None] * DIM + e_E[None, :], mask=k_present_N[:, None] & (e_E < DIM)[None, :], other=0.0
        )
        products_BN += product(q_BE, tl.trans(k_NE), PRECISION)
    return products_BN


@triton.jit  # type: ignore[untyped-decorator]
def _rank(score: tl.tensor) -> tl.tensor:
    """The order of scores as an unsigned 32-bit number over 0, kept in int32.

    Equal scores have equal ranks, -0 and 0 too. As in `dsa.select`, the infinities rank as the largest numbers of
    their sign, and a NaN as -inf.
    """
    bits = score.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    lowest = -0x7F7FFFFF
    signed = tl.where(bits < 0, -tl.minimum(magnitude, 0x7F7FFFFF), tl.minimum(magnitude, 0x7F7FFFFF))
    return tl.where(magnitude > 0x7F800000, lowest, signed) ^ -0x80000000
