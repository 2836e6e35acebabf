"""The indexer's loss over all visible keys in Triton: what the warm-up learns from.

Kept are log sum exp of each head and query, [R, Q, H], and the scores of a chunk of queries, whose size is bounded; all
else is computed again, tile by tile. A query's gradient is summed by a program that walks over the keys, a key's by one
that walks over the queries: runs are equal bit by bit.

Shapes: as in `dsa.py`; X queries of a chunk or of a program, N keys of a program, A tiles of keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.ops.dsa_tiled import MainAttention
from rorqual.ops.gpu import dsa_score
from rorqual.ops.gpu.dsa_score import (
    Chunk,
    Gradients,
    Index,
    chunks,
    gradient_operands,
    padded,
    product,
    products_of_rows,
    tile_of,
    width_of,
    write_scores,
)
from rorqual.ops.gpu.numbers import rounded

SCAN = 2048
"""Scores of a query that are read at a time."""


def visible_kl(
    main: MainAttention, index: Index, row_weight_RQ: Tensor, gradients: Gradients | None
) -> tuple[Tensor, Tensor]:
    """KL, and KL to uniform, of each query over its visible keys [R, Q]; fills `gradients`, of which those of the keys
    begin at 0."""
    (num_rows, num_queries), num_keys = main.last_RQ.shape, main.k.shape[1]
    lse_RQH = visible_lse(main)
    kl_RQ, negative_entropy_RQ = torch.empty_like(row_weight_RQ), torch.empty_like(row_weight_RQ)
    for chunk in chunks(num_rows, num_queries, num_keys, multiple=max(tile_of(main.k), tile_of(index.k))):
        rows, part = chunk.rows, index.rows(chunk.rows)
        grad_RXK = torch.empty(len(part.q), chunk.width, num_keys, device=main.q.device)  # Scores at first.
        write_scores(part, chunk, grad_RXK)
        own = main._replace(q=main.q[rows], k=main.k[rows])
        sums = _scores_to_gradients(own, part, lse_RQH[rows], row_weight_RQ[rows], grad_RXK, chunk)
        kl_RQ[rows, chunk.queries], negative_entropy_RQ[rows, chunk.queries] = sums
        if gradients is not None:
            _add_gradients(part, grad_RXK, Gradients(*(x[rows] for x in gradients)), chunk)
    return kl_RQ, _num_visible(main).clamp(min=1).float().log() + negative_entropy_RQ


def _num_visible(main: MainAttention) -> Tensor:
    last_RQ, num_keys = main.last_RQ.long(), main.k.shape[1]
    if main.key_valid_RK is None:
        return (last_RQ + 1).clamp(0, num_keys)
    until_RK = main.key_valid_RK.long().cumsum(dim=1)
    return until_RK.gather(1, last_RQ.clamp(0, num_keys - 1)).masked_fill(last_RQ < 0, 0)


def visible_lse(main: MainAttention) -> Tensor:
    """log sum exp of each head's scores over the visible keys: [R, Q, H], in float32; -inf where there are none."""
    (num_rows, num_queries, num_heads, dim), (_, num_keys, groups, _) = main.q.shape, main.k.shape
    lse_RQH = torch.empty(num_rows, num_queries, num_heads, device=main.q.device)
    tile = tile_of(main.k)
    with torch.cuda.device_of(main.q):
        _lse_kernel[(num_rows * triton.cdiv(num_queries, tile), num_heads)](
            main.q,
            main.k,
            main.last_RQ,
            main.last_RQ if main.key_valid_RK is None else main.key_valid_RK,
            lse_RQH,
            num_queries,
            num_keys,
            num_heads,
            num_heads // groups,
            main.scale,
            DIM=dim,
            HAS_VALID=main.key_valid_RK is not None,
            BLOCK_X=tile,
            BLOCK_N=tile,
            BLOCK_E=width_of(main.k),
            PRECISION=dsa_score.PRECISION,
            num_warps=4,
            num_stages=2,
        )
    return lse_RQH


def _scores_to_gradients(
    main: MainAttention, index: Index, lse_RQH: Tensor, row_weight_RQ: Tensor, scores_RXK: Tensor, chunk: Chunk
) -> tuple[Tensor, Tensor]:
    """KL and sum p log p of each query [R, X]; the scores become their own gradients, where they are visible.

    All but `chunk` is of the chunk's rows alone.
    """
    (num_rows, num_queries, num_heads, dim), (_, num_keys, groups, _) = main.q.shape, main.k.shape
    tile, scan = tile_of(main.k), min(SCAN, padded(num_keys))
    index_lse_RX = torch.empty(num_rows, chunk.width, device=scores_RXK.device)
    tiles = triton.cdiv(num_keys, tile)
    sums_2RXA = torch.zeros(2, num_rows, chunk.width, tiles, device=scores_RXK.device)
    with torch.cuda.device_of(main.q):
        _score_lse_kernel[(num_rows * chunk.width,)](
            scores_RXK, index.last_RQ, index_lse_RX, chunk.first, chunk.width, num_queries, num_keys, SCAN=scan
        )
        _target_kernel[(num_rows * triton.cdiv(chunk.width, tile), tiles)](
            main.q,
            main.k,
            lse_RQH,
            index.last_RQ,
            index.last_RQ if index.key_valid_RK is None else index.key_valid_RK,
            row_weight_RQ,
            index_lse_RX,
            scores_RXK,
            *sums_2RXA,
            chunk.first,
            chunk.width,
            num_queries,
            num_keys,
            num_heads,
            num_heads // groups,
            main.scale,
            DIM=dim,
            HAS_VALID=index.key_valid_RK is not None,
            BLOCK_X=tile,
            BLOCK_N=tile,
            BLOCK_E=width_of(main.k),
            PRECISION=dsa_score.PRECISION,
            num_warps=4,
            num_stages=2,
        )
    kl_RX, negative_entropy_RX = sums_2RXA.sum(dim=-1)
    return kl_RX, negative_entropy_RX


def _add_gradients(index: Index, grad_RXK: Tensor, gradients: Gradients, chunk: Chunk) -> None:
    """grad_RXK: of the scores. All but `chunk` is of the chunk's rows alone."""
    num_rows, num_queries, num_heads, dim = index.q.shape
    num_keys, tile = index.k.shape[1], tile_of(index.k)
    operand, operand_precision = gradient_operands(index.q)
    sizes = (chunk.first, chunk.width, num_queries, num_keys, num_heads)
    constants = {
        "DIM": dim,
        "BLOCK_X": tile,
        "BLOCK_N": tile,
        "BLOCK_C": padded(dim),
        "PRECISION": dsa_score.PRECISION,
        "OPERAND": operand,
        "OPERAND_PRECISION": operand_precision,
        "num_warps": 8 if index.q.element_size() == 4 else 4,
        "num_stages": 1 if index.q.element_size() == 4 else 2,
    }
    with torch.cuda.device_of(index.q):
        _query_gradient_kernel[(num_rows * triton.cdiv(chunk.width, tile), num_heads)](
            *index[:4], grad_RXK, gradients.q, gradients.weight, *sizes, **constants
        )
        _key_gradient_kernel[(num_rows * triton.cdiv(num_keys, tile),)](
            *index[:4], grad_RXK, gradients.k, *sizes, **constants
        )


@triton.jit  # type: ignore[untyped-decorator]
def _visible(
    last_X: tl.tensor,
    key_N: tl.tensor,
    valid_ptr: tl.tensor,
    row: tl.tensor,
    num_keys: tl.tensor,
    HAS_VALID: tl.constexpr,
) -> tl.tensor:
    visible_XN = (key_N[None, :] <= last_X[:, None]) & (key_N < num_keys)[None, :]
    if HAS_VALID:
        valid_N = tl.load(valid_ptr + row * num_keys + key_N, mask=key_N < num_keys, other=0)
        visible_XN &= (valid_N != 0)[None, :]
    return visible_XN


@triton.jit  # type: ignore[untyped-decorator]
def _lse_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    last_ptr: tl.tensor,
    valid_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    num_heads: tl.tensor,
    sharing: tl.tensor,
    scale: tl.tensor,
    DIM: tl.constexpr,
    HAS_VALID: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One tile of queries and one head: a running maximum, and the sum over it."""
    tiles = tl.cdiv(num_queries, BLOCK_X)
    row, head = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(1)
    x_X = (tl.program_id(0) % tiles) * BLOCK_X + tl.arange(0, BLOCK_X)
    present_X, query_X = x_X < num_queries, row * num_queries + x_X
    last_X = tl.load(last_ptr + query_X, mask=present_X, other=-1)
    seen = tl.minimum(tl.max(last_X, axis=0) + 1, num_keys)
    top_X = tl.full([BLOCK_X], float("-inf"), dtype=tl.float32)
    sum_X = tl.zeros([BLOCK_X], dtype=tl.float32)
    for start in range(0, seen, BLOCK_N):
        key_N = start + tl.arange(0, BLOCK_N)
        k_row_N = (row * num_keys + key_N) * (num_heads // sharing) + head // sharing
        scores_XN = scale * products_of_rows(
            q_ptr,
            k_ptr,
            query_X * num_heads + head,
            present_X,
            k_row_N,
            key_N < num_keys,
            DIM,
            BLOCK_X,
            BLOCK_N,
            BLOCK_E,
            PRECISION,
        )
        scores_XN = tl.where(_visible(last_X, key_N, valid_ptr, row, num_keys, HAS_VALID), scores_XN, float("-inf"))
        new_top_X = tl.maximum(top_X, tl.max(scores_XN, axis=1))
        base_X = tl.where(new_top_X == float("-inf"), 0.0, new_top_X)
        sum_X = sum_X * tl.exp(top_X - base_X) + tl.sum(tl.exp(scores_XN - base_X[:, None]), axis=1)
        top_X = new_top_X
    tl.store(lse_ptr + query_X * num_heads + head, top_X + tl.log(sum_X), mask=present_X)


@triton.jit  # type: ignore[untyped-decorator]
def _score_lse_kernel(
    scores_ptr: tl.tensor,
    last_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    SCAN: tl.constexpr,
) -> None:
    """log sum exp of one query's scores, of which the hidden ones are -inf."""
    x = tl.program_id(0).to(tl.int64)
    seen = tl.minimum(tl.load(last_ptr + (x // width) * num_queries + first + x % width) + 1, num_keys)
    top = tl.full([], float("-inf"), dtype=tl.float32)
    total = tl.full([], 0.0, dtype=tl.float32)
    for start in range(0, seen, SCAN):
        key_N = start + tl.arange(0, SCAN)
        scores_N = tl.load(scores_ptr + x * num_keys + key_N, mask=key_N < seen, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(scores_N, axis=0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(scores_N - base), axis=0)
        top = new_top
    tl.store(lse_ptr + x, top + tl.log(total))


@triton.jit  # type: ignore[untyped-decorator]
def _target_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    last_ptr: tl.tensor,
    valid_ptr: tl.tensor,
    row_weight_ptr: tl.tensor,
    index_lse_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    kl_ptr: tl.tensor,
    negative_entropy_ptr: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    num_heads: tl.tensor,
    sharing: tl.tensor,
    scale: tl.tensor,
    DIM: tl.constexpr,
    HAS_VALID: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One tile of queries and one of keys: p of all heads; its sums of p (log p - log softmax(I)) and p log p; and
    row weight times (softmax(I) - p) in place of I."""
    tiles = tl.cdiv(width, BLOCK_X)
    row, tile_n = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(1)
    x_X = (tl.program_id(0) % tiles) * BLOCK_X + tl.arange(0, BLOCK_X)
    key_N = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    present_X, query_X, own_X = x_X < width, row * num_queries + first + x_X, row * width + x_X
    last_X = tl.load(last_ptr + query_X, mask=present_X, other=-1)
    if tile_n * BLOCK_N <= tl.max(last_X, axis=0):
        total_XN = tl.zeros([BLOCK_X, BLOCK_N], dtype=tl.float32)
        for head in range(num_heads):
            k_row_N = (row * num_keys + key_N) * (num_heads // sharing) + head // sharing
            scores_XN = scale * products_of_rows(
                q_ptr,
                k_ptr,
                query_X * num_heads + head,
                present_X,
                k_row_N,
                key_N < num_keys,
                DIM,
                BLOCK_X,
                BLOCK_N,
                BLOCK_E,
                PRECISION,
            )
            lse_X = tl.load(lse_ptr + query_X * num_heads + head, mask=present_X, other=0.0)
            total_XN += tl.exp(scores_XN - lse_X[:, None])
        visible_XN = _visible(last_X, key_N, valid_ptr, row, num_keys, HAS_VALID)
        target_XN = tl.where(visible_XN, total_XN / num_heads, 0.0)
        log_target_XN = tl.log(tl.where(target_XN < 1.2e-38, 1.0, target_XN))  # 0 log 0 = 0; a NaN stays one.
        place_XN = scores_ptr + own_X[:, None] * num_keys + key_N[None, :]
        log_predicted_XN = tl.load(place_XN, mask=visible_XN, other=0.0)
        index_lse_X = tl.load(index_lse_ptr + own_X, mask=present_X, other=0.0)
        log_predicted_XN = tl.where(visible_XN, log_predicted_XN - index_lse_X[:, None], 0.0)
        sum_X = own_X * tl.num_programs(1) + tile_n
        tl.store(kl_ptr + sum_X, tl.sum(target_XN * (log_target_XN - log_predicted_XN), axis=1), mask=present_X)
        tl.store(negative_entropy_ptr + sum_X, tl.sum(target_XN * log_target_XN, axis=1), mask=present_X)
        row_weight_X = tl.load(row_weight_ptr + query_X, mask=present_X, other=0.0)
        grad_XN = tl.where(visible_XN, row_weight_X[:, None] * (tl.exp(log_predicted_XN) - target_XN), 0.0)
        tl.store(place_XN, grad_XN, mask=present_X[:, None] & (key_N < num_keys)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _query_gradient_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    last_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    grad_q_ptr: tl.tensor,
    grad_weight_ptr: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    num_heads: tl.tensor,
    DIM: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    OPERAND_PRECISION: tl.constexpr,
) -> None:
    """One tile of queries and one index head, over the keys."""
    tiles = tl.cdiv(width, BLOCK_X)
    row, head = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(1)
    x_X, c_C = (tl.program_id(0) % tiles) * BLOCK_X + tl.arange(0, BLOCK_X), tl.arange(0, BLOCK_C)
    present_X, query_X, own_X = x_X < width, row * num_queries + first + x_X, row * width + x_X
    last_X = tl.load(last_ptr + query_X, mask=present_X, other=-1)
    pair_X = query_X * num_heads + head
    place_XC, within_XC = pair_X[:, None] * DIM + c_C[None, :], present_X[:, None] & (c_C < DIM)[None, :]
    q_XC = tl.load(q_ptr + place_XC, mask=within_XC, other=0.0)
    grad_q_XC = tl.zeros([BLOCK_X, BLOCK_C], dtype=tl.float32)
    grad_weight_X = tl.zeros([BLOCK_X], dtype=tl.float32)
    seen = tl.minimum(tl.max(last_X, axis=0) + 1, num_keys)
    for start in range(0, seen, BLOCK_N):
        key_N = start + tl.arange(0, BLOCK_N)
        k_NC = tl.load(
            k_ptr + (row * num_keys + key_N)[:, None] * DIM + c_C[None, :],
            mask=(key_N < num_keys)[:, None] & (c_C < DIM)[None, :],
            other=0.0,
        )
        grad_XN = tl.load(
            grad_ptr + own_X[:, None] * num_keys + key_N[None, :],
            mask=(key_N[None, :] <= last_X[:, None]) & (key_N < num_keys)[None, :],
            other=0.0,
        )
        products_XN = product(q_XC, tl.trans(k_NC), PRECISION)
        active_XN = products_XN > 0.0
        grad_weight_X += tl.sum(tl.where(active_XN, products_XN, 0.0) * grad_XN, axis=1)
        through_XN = rounded(tl.where(active_XN, grad_XN, 0.0), OPERAND)
        grad_q_XC += product(through_XN, k_NC.to(OPERAND), OPERAND_PRECISION)
    weight_X = tl.load(weight_ptr + pair_X, mask=present_X, other=0.0)
    grad_q = rounded(grad_q_XC * weight_X[:, None], grad_q_ptr.dtype.element_ty)
    tl.store(grad_q_ptr + place_XC, grad_q, mask=within_XC)
    tl.store(grad_weight_ptr + pair_X, grad_weight_X, mask=present_X)


@triton.jit  # type: ignore[untyped-decorator]
def _key_gradient_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    last_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    grad_k_ptr: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    num_heads: tl.tensor,
    DIM: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    OPERAND_PRECISION: tl.constexpr,
) -> None:
    """One tile of keys, over the chunk's queries and their index heads; added to what earlier chunks left."""
    tiles = tl.cdiv(num_keys, BLOCK_N)
    row, start_k = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles) * BLOCK_N
    key_N, c_C = start_k + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    place_NC = (row * num_keys + key_N)[:, None] * DIM + c_C[None, :]
    within_NC = (key_N < num_keys)[:, None] & (c_C < DIM)[None, :]
    k_NC = tl.load(k_ptr + place_NC, mask=within_NC, other=0.0)
    grad_k_NC = tl.load(grad_k_ptr + place_NC, mask=within_NC, other=0.0)
    for start in range(0, width, BLOCK_X):
        x_X = start + tl.arange(0, BLOCK_X)
        present_X, query_X, own_X = x_X < width, row * num_queries + first + x_X, row * width + x_X
        last_X = tl.load(last_ptr + query_X, mask=present_X, other=-1)
        if start_k <= tl.max(last_X, axis=0):
            grad_NX = tl.load(
                grad_ptr + own_X[None, :] * num_keys + key_N[:, None],
                mask=(key_N[:, None] <= last_X[None, :]) & (key_N < num_keys)[:, None],
                other=0.0,
            )
            for head in range(num_heads):
                pair_X = query_X * num_heads + head
                q_XC = tl.load(
                    q_ptr + pair_X[:, None] * DIM + c_C[None, :],
                    mask=present_X[:, None] & (c_C < DIM)[None, :],
                    other=0.0,
                )
                weight_X = tl.load(weight_ptr + pair_X, mask=present_X, other=0.0)
                products_NX = product(k_NC, tl.trans(q_XC), PRECISION)
                through_NX = rounded(tl.where(products_NX > 0.0, grad_NX * weight_X[None, :], 0.0), OPERAND)
                grad_k_NC += product(through_NX, q_XC.to(OPERAND), OPERAND_PRECISION)
    tl.store(grad_k_ptr + place_NC, grad_k_NC, mask=within_NC)
