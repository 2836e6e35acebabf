"""The indexer's loss over selected keys in Triton: what the sparse stage learns from.

A program owns a query, or a query and a tile of its selected keys, which it gathers; the heads are the rows of its
tiles. The gradient of a key comes from every query that selected it: each query writes its part, a stable sort brings
the parts of a key together, and one program adds them up in that order, so that runs are equal bit by bit.

Shapes: as in `dsa.py`; X queries of a chunk, P = X S pairs of a query and a key that it selected, B heads of a program,
N selected keys of a program.
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
)
from rorqual.ops.gpu.numbers import rounded


def selected_kl(
    main: MainAttention, index: Index, row_weight_RQ: Tensor, selected_RQS: Tensor, gradients: Gradients | None
) -> tuple[Tensor, Tensor]:
    """KL, and KL to uniform, of each query [R, Q]; adds to `gradients`, which begin at 0, where they are wanted."""
    num_rows, num_queries, num_selected = selected_RQS.shape
    lse_RQH = selected_lse(main, selected_RQS)
    kl_RQ, uniform_RQ = torch.empty_like(row_weight_RQ), torch.empty_like(row_weight_RQ)
    for chunk in chunks(num_rows, num_queries, num_selected * index.q.shape[-1]):
        part = main._replace(q=main.q[chunk.rows], k=main.k[chunk.rows])
        selected = selected_RQS[chunk.rows]
        target_RXS = selected_target(part, selected, lse_RQH[chunk.rows], chunk)
        absent_RXS = selected[:, chunk.queries] < 0
        scores_RXS = _selected_scores(index.rows(chunk.rows), selected, chunk)
        log_predicted_RXS = scores_RXS.log_softmax(dim=-1).masked_fill_(absent_RXS, 0.0)
        negative_entropy_RXS = torch.special.xlogy(target_RXS, target_RXS)
        kl_RQ[chunk.rows, chunk.queries] = (negative_entropy_RXS - target_RXS * log_predicted_RXS).sum(dim=-1)
        count_RX = (~absent_RXS).sum(dim=-1).clamp(min=1)
        uniform_RQ[chunk.rows, chunk.queries] = count_RX.float().log() + negative_entropy_RXS.sum(dim=-1)
        if gradients is not None:
            grad_RXS = log_predicted_RXS.exp_().sub_(target_RXS).masked_fill_(absent_RXS, 0.0)
            grad_RXS *= row_weight_RQ[chunk.rows, chunk.queries, None]
            own = Gradients(*(x[chunk.rows] for x in gradients))
            _add_gradients(index.rows(chunk.rows), selected, grad_RXS, own, chunk)
    return kl_RQ, uniform_RQ


def selected_lse(main: MainAttention, selected_RQS: Tensor) -> Tensor:
    """log sum exp of each head's scores over the selected keys: [R, Q, H], in float32; -inf where there are none."""
    (num_rows, num_queries, num_heads, dim), (_, num_keys, groups, _) = main.q.shape, main.k.shape
    lse_RQH = torch.empty(num_rows, num_queries, num_heads, device=main.q.device)
    sharing = num_heads // groups
    block_b = min(padded(sharing), tile_of(main.k))
    blocks = triton.cdiv(sharing, block_b)
    with torch.cuda.device_of(main.q):
        _lse_kernel[(num_rows * num_queries, groups * blocks)](
            main.q,
            main.k,
            selected_RQS,
            lse_RQH,
            num_queries,
            num_keys,
            groups,
            sharing,
            blocks,
            selected_RQS.shape[-1],
            main.scale,
            DIM=dim,
            BLOCK_B=block_b,
            BLOCK_N=tile_of(main.k),
            BLOCK_E=width_of(main.k),
            PRECISION=dsa_score.PRECISION,
            num_warps=4,
            num_stages=2,
        )
    return lse_RQH


def selected_target(main: MainAttention, selected_RQS: Tensor, lse_RQH: Tensor, chunk: Chunk) -> Tensor:
    """The main attention's share of each selected key, averaged over the heads: [R, X, S], 0 where there is none.

    All but `chunk` is of the chunk's rows alone. lse_RQH: over the selected keys, or over more of them.
    """
    (num_rows, num_queries, num_heads, dim), (_, num_keys, groups, _) = main.q.shape, main.k.shape
    num_selected = selected_RQS.shape[-1]
    target_RXS = torch.empty(num_rows, chunk.width, num_selected, device=main.q.device)
    sharing, block_n = num_heads // groups, tile_of(main.k)
    with torch.cuda.device_of(main.q):
        _target_kernel[(num_rows * chunk.width, triton.cdiv(num_selected, block_n))](
            main.q,
            main.k,
            selected_RQS,
            lse_RQH,
            target_RXS,
            chunk.first,
            chunk.width,
            num_queries,
            num_keys,
            groups,
            sharing,
            num_selected,
            main.scale,
            DIM=dim,
            BLOCK_B=min(padded(sharing), block_n),
            BLOCK_N=block_n,
            BLOCK_E=width_of(main.k),
            PRECISION=dsa_score.PRECISION,
            num_warps=4,
            num_stages=2,
        )
    return target_RXS


def _selected_scores(index: Index, selected_RQS: Tensor, chunk: Chunk) -> Tensor:
    """Index scores of the selected keys: [R, X, S], -inf where there is none."""
    num_rows, num_queries, num_heads, dim = index.q.shape
    num_selected, block_n = selected_RQS.shape[-1], tile_of(index.k)
    scores_RXS = torch.empty(num_rows, chunk.width, num_selected, device=index.q.device)
    with torch.cuda.device_of(index.q):
        _score_kernel[(num_rows * chunk.width, triton.cdiv(num_selected, block_n))](
            *index[:3],
            selected_RQS,
            scores_RXS,
            chunk.first,
            chunk.width,
            num_queries,
            index.k.shape[1],
            num_heads,
            num_selected,
            DIM=dim,
            BLOCK_B=min(padded(num_heads), block_n),
            BLOCK_N=block_n,
            BLOCK_E=width_of(index.k),
            PRECISION=dsa_score.PRECISION,
            num_warps=4,
            num_stages=2,
        )
    return scores_RXS


def _add_gradients(index: Index, selected_RQS: Tensor, grad_RXS: Tensor, gradients: Gradients, chunk: Chunk) -> None:
    """grad_RXS: of the scores."""
    num_rows, num_queries, num_heads, dim = index.q.shape
    num_keys, num_selected = index.k.shape[1], selected_RQS.shape[-1]
    parts_PC = torch.empty(grad_RXS.numel(), dim, device=index.q.device)
    operand, operand_precision = gradient_operands(index.q)
    block_b = min(padded(num_heads), tile_of(index.q))
    with torch.cuda.device_of(index.q):
        for first_head in range(0, num_heads, block_b):
            _gradient_kernel[(num_rows * chunk.width,)](
                *index[:3],
                selected_RQS,
                grad_RXS,
                gradients.q,
                gradients.weight,
                parts_PC,
                chunk.first,
                chunk.width,
                num_queries,
                num_keys,
                num_heads,
                first_head,
                num_selected,
                DIM=dim,
                IS_FIRST=first_head == 0,
                BLOCK_B=block_b,
                BLOCK_N=tile_of(index.k),
                BLOCK_C=padded(dim),
                PRECISION=dsa_score.PRECISION,
                OPERAND=operand,
                OPERAND_PRECISION=operand_precision,
                num_warps=8,
                num_stages=1,
            )
        key_P, order_P = _by_key(selected_RQS[:, chunk.queries], num_keys)
        begin_K = torch.searchsorted(key_P, torch.arange(num_rows * num_keys + 1, device=key_P.device))
        _sum_kernel[(num_rows * num_keys,)](
            parts_PC, order_P, begin_K, gradients.k, DIM=dim, BLOCK_P=32, BLOCK_C=padded(dim), num_warps=4
        )


def _by_key(selected_RXS: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """The pairs of a query and a key in the order of keys, then of queries: their keys, counted through all rows, and
    where the pairs were. Absent ones come last."""
    num_rows = len(selected_RXS)
    row_R11 = torch.arange(num_rows, device=selected_RXS.device)[:, None, None] * num_keys
    key_RXS = torch.where(selected_RXS < 0, num_rows * num_keys, selected_RXS + row_R11)
    return torch.sort(key_RXS.flatten(), stable=True)


@triton.jit  # type: ignore[untyped-decorator]
def _lse_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    selected_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    groups: tl.tensor,
    sharing: tl.tensor,
    blocks: tl.tensor,
    num_selected: tl.tensor,
    scale: tl.tensor,
    DIM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One query, and some heads that share their keys: a running maximum, and the sum over it."""
    query = tl.program_id(0).to(tl.int64)
    row = query // num_queries
    group = tl.program_id(1) // blocks
    shared_B = (tl.program_id(1) % blocks) * BLOCK_B + tl.arange(0, BLOCK_B)
    q_row_B = query * groups * sharing + group * sharing + shared_B
    top_B = tl.full([BLOCK_B], float("-inf"), dtype=tl.float32)
    sum_B = tl.zeros([BLOCK_B], dtype=tl.float32)
    for start in range(0, num_selected, BLOCK_N):
        s_N = start + tl.arange(0, BLOCK_N)
        key_N = tl.load(selected_ptr + query * num_selected + s_N, mask=s_N < num_selected, other=-1)
        k_row_N = (row * num_keys + key_N) * groups + group
        scores_BN = scale * products_of_rows(
            q_ptr, k_ptr, q_row_B, shared_B < sharing, k_row_N, key_N >= 0, DIM, BLOCK_B, BLOCK_N, BLOCK_E, PRECISION
        )
        scores_BN = tl.where((key_N >= 0)[None, :], scores_BN, float("-inf"))
        new_top_B = tl.maximum(top_B, tl.max(scores_BN, axis=1))
        base_B = tl.where(new_top_B == float("-inf"), 0.0, new_top_B)
        sum_B = sum_B * tl.exp(top_B - base_B) + tl.sum(tl.exp(scores_BN - base_B[:, None]), axis=1)
        top_B = new_top_B
    tl.store(lse_ptr + q_row_B, top_B + tl.log(sum_B), mask=shared_B < sharing)


@triton.jit  # type: ignore[untyped-decorator]
def _target_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    selected_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    target_ptr: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    groups: tl.tensor,
    sharing: tl.tensor,
    num_selected: tl.tensor,
    scale: tl.tensor,
    DIM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One query and one tile of its selected keys: softmax of every head, averaged."""
    x = tl.program_id(0).to(tl.int64)
    row, query = x // width, (x // width) * num_queries + first + x % width
    s_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    key_N = tl.load(selected_ptr + query * num_selected + s_N, mask=s_N < num_selected, other=-1)
    total_N = tl.zeros([BLOCK_N], dtype=tl.float32)
    for group in range(groups):
        k_row_N = (row * num_keys + key_N) * groups + group
        for start in range(0, sharing, BLOCK_B):
            shared_B = start + tl.arange(0, BLOCK_B)
            present_B = shared_B < sharing
            q_row_B = query * groups * sharing + group * sharing + shared_B
            scores_BN = scale * products_of_rows(
                q_ptr, k_ptr, q_row_B, present_B, k_row_N, key_N >= 0, DIM, BLOCK_B, BLOCK_N, BLOCK_E, PRECISION
            )
            lse_B = tl.load(lse_ptr + q_row_B, mask=present_B, other=0.0)
            weights_BN = tl.where(present_B[:, None], tl.exp(scores_BN - lse_B[:, None]), 0.0)
            total_N += tl.sum(weights_BN, axis=0)
    target_N = tl.where(key_N >= 0, total_N / (groups * sharing), 0.0)
    tl.store(target_ptr + x * num_selected + s_N, target_N, mask=s_N < num_selected)


@triton.jit  # type: ignore[untyped-decorator]
def _score_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    selected_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    num_heads: tl.tensor,
    num_selected: tl.tensor,
    DIM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One query and one tile of its selected keys."""
    x = tl.program_id(0).to(tl.int64)
    row, query = x // width, (x // width) * num_queries + first + x % width
    s_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    key_N = tl.load(selected_ptr + query * num_selected + s_N, mask=s_N < num_selected, other=-1)
    scores_N = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in range(0, num_heads, BLOCK_B):
        head_B = start + tl.arange(0, BLOCK_B)
        present_B, q_row_B = head_B < num_heads, query * num_heads + head_B
        products_BN = products_of_rows(
            q_ptr,
            k_ptr,
            q_row_B,
            present_B,
            row * num_keys + key_N,
            key_N >= 0,
            DIM,
            BLOCK_B,
            BLOCK_N,
            BLOCK_E,
            PRECISION,
        )
        weight_B = tl.load(weight_ptr + q_row_B, mask=present_B, other=0.0)
        weighted_BN = tl.where(products_BN < 0.0, 0.0, products_BN) * weight_B[:, None]  # A NaN stays one.
        scores_N += tl.sum(tl.where(present_B[:, None], weighted_BN, 0.0), axis=0)
    scores_N = tl.where(key_N >= 0, scores_N, float("-inf"))
    tl.store(scores_ptr + x * num_selected + s_N, scores_N, mask=s_N < num_selected)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    selected_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    grad_q_ptr: tl.tensor,
    grad_weight_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    num_heads: tl.tensor,
    first_head: tl.tensor,
    num_selected: tl.tensor,
    DIM: tl.constexpr,
    IS_FIRST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    OPERAND_PRECISION: tl.constexpr,
) -> None:
    """One query with some of its index heads: its own gradients, and its part in that of each key that it selected,
    added to that of earlier heads."""
    x = tl.program_id(0).to(tl.int64)
    row, query = x // width, (x // width) * num_queries + first + x % width
    head_B, c_C = first_head + tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_C)
    present_B, pair_B = head_B < num_heads, query * num_heads + head_B
    within_BC = present_B[:, None] & (c_C < DIM)[None, :]
    place_BC = pair_B[:, None] * DIM + c_C[None, :]
    q_BC = tl.load(q_ptr + place_BC, mask=within_BC, other=0.0)
    weight_B = tl.load(weight_ptr + pair_B, mask=present_B, other=0.0)
    grad_q_BC = tl.zeros([BLOCK_B, BLOCK_C], dtype=tl.float32)
    grad_weight_B = tl.zeros([BLOCK_B], dtype=tl.float32)
    for start in range(0, num_selected, BLOCK_N):
        s_N = start + tl.arange(0, BLOCK_N)
        key_N = tl.load(selected_ptr + query * num_selected + s_N, mask=s_N < num_selected, other=-1)
        grad_N = tl.load(grad_ptr + x * num_selected + s_N, mask=s_N < num_selected, other=0.0)
        k_NC = tl.load(
            k_ptr + (row * num_keys + key_N)[:, None] * DIM + c_C[None, :],
            mask=(key_N >= 0)[:, None] & (c_C < DIM)[None, :],
            other=0.0,
        )
        products_BN = product(q_BC, tl.trans(k_NC), PRECISION)
        active_BN = products_BN > 0.0
        grad_weight_B += tl.sum(tl.where(active_BN, products_BN, 0.0) * grad_N[None, :], axis=1)
        through_BN = tl.where(active_BN, grad_N[None, :], 0.0)
        grad_q_BC += product(rounded(through_BN, OPERAND), k_NC.to(OPERAND), OPERAND_PRECISION)
        weighted_NB = tl.trans(rounded(through_BN * weight_B[:, None], OPERAND))
        part_NC = product(weighted_NB, q_BC.to(OPERAND), OPERAND_PRECISION)
        place_NC = parts_ptr + (x * num_selected + s_N)[:, None] * DIM + c_C[None, :]
        within_NC = (s_N < num_selected)[:, None] & (c_C < DIM)[None, :]
        if not IS_FIRST:
            part_NC += tl.load(place_NC, mask=within_NC, other=0.0)
        tl.store(place_NC, part_NC, mask=within_NC)
    grad_q = rounded(grad_q_BC * weight_B[:, None], grad_q_ptr.dtype.element_ty)
    tl.store(grad_q_ptr + place_BC, grad_q, mask=within_BC)
    tl.store(grad_weight_ptr + pair_B, grad_weight_B, mask=present_B)


@triton.jit  # type: ignore[untyped-decorator]
def _sum_kernel(
    parts_ptr: tl.tensor,
    order_ptr: tl.tensor,
    begin_ptr: tl.tensor,
    grad_k_ptr: tl.tensor,
    DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """One key: the parts of every query that selected it, added to its gradient in the order of queries."""
    key = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(begin_ptr + key), tl.load(begin_ptr + key + 1)
    c_C = tl.arange(0, BLOCK_C)
    if begin < end:
        total_C = tl.load(grad_k_ptr + key * DIM + c_C, mask=c_C < DIM, other=0.0)
        for start in range(begin, end, BLOCK_P):
            p_P = start + tl.arange(0, BLOCK_P)
            pair_P = tl.load(order_ptr + p_P, mask=p_P < end, other=0)
            part_PC = tl.load(
                parts_ptr + pair_P[:, None] * DIM + c_C[None, :],
                mask=(p_P < end)[:, None] & (c_C < DIM)[None, :],
                other=0.0,
            )
            total_C += tl.sum(part_PC, axis=0)
        tl.store(grad_k_ptr + key * DIM + c_C, total_C, mask=c_C < DIM)
