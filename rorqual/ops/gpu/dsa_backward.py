"""Attention over selected keys in Triton, backward: the same bits on every run, without atomic additions.

A tile of queries at a time goes through four kernels. The first three are products of matrices in blocks of up to
128 x 128 with nothing else to hold, so that they fit any device and any width, and the keys of a query are gathered for
up to 128 heads at once. What they leave to each other is bounded by SCRATCH_BYTES:

1. `_weigh_pairs` computes the softmax anew from its stored sum: the weights P and the gradients of the scores dS of the
   tile's pairs of query and key, [X, H, S] each.
2. `_of_queries` makes the gradient of the queries of them, dS k.
3. and 4. `dsa_key_gradient.py` adds dS^T q to the keys, and P^T dO to the values.

A single program for 1 and 2, as in the forward pass, would hold a gradient [64, 576] in float32 beside two products:
for an H100 the compiler then spills registers in the loop, and an A100 has room for 32 heads only.

Shapes: as in `dsa.py`; X queries of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.ops.gpu.dsa_forward import LOG2_E, last_selected
from rorqual.ops.gpu.dsa_key_gradient import add_to_keys, column_chunk, key_lists, pair_blocks
from rorqual.ops.gpu.numbers import product, rounded

SCRATCH_BYTES = 1 << 30
"""Most memory of what a tile holds. More of it makes fewer tiles, and each tile reads and writes the totals of its keys
once."""

ALIGNED = 64
"""Places a query of P and dS are padded to, so that rows begin on whole cache lines."""


class Saved(NamedTuple):
    """What the forward pass leaves to the backward pass; the last dimensions are contiguous, all of `selected` is."""

    q_RQHE: Tensor
    k_RKGE: Tensor
    v_RKGV: Tensor
    selected_RQS: Tensor
    out_RQHV: Tensor
    log_sum_RQH: Tensor


@triton.jit(do_not_specialize=["first_query", "num_queries", "tile_queries"])  # type: ignore[untyped-decorator]
def _weigh_pairs(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    selected: tl.tensor,
    log_sum: tl.tensor,
    grad_out: tl.tensor,
    mean: tl.tensor,
    weight_scratch: tl.tensor,
    score_scratch: tl.tensor,
    scale: tl.tensor,
    scale_log2: tl.tensor,
    first_query: tl.tensor,
    num_queries: tl.tensor,
    tile_queries: tl.tensor,
    num_selected: tl.tensor,
    num_places: tl.tensor,
    num_groups: tl.tensor,
    q_row: tl.tensor,
    q_query: tl.tensor,
    q_head: tl.tensor,
    k_row: tl.tensor,
    k_key: tl.tensor,
    k_group: tl.tensor,
    v_row: tl.tensor,
    v_key: tl.tensor,
    v_group: tl.tensor,
    SHARING: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """P = exp(scale q k^T - log sum) and dS = scale P (dO v^T - D) of a query's pairs, a block of heads and keys."""
    head_blocks: tl.constexpr = (SHARING + HEADS - 1) // HEADS
    program = tl.program_id(0).to(tl.int64)
    key_blocks = tl.cdiv(num_selected, KEYS)
    place = program % key_blocks * KEYS + tl.arange(0, KEYS)
    head = program // key_blocks % head_blocks * HEADS + tl.arange(0, HEADS)
    group = program // (key_blocks * head_blocks) % num_groups
    in_tile = program // (key_blocks * head_blocks * num_groups)
    row = in_tile // tile_queries
    at = row * num_queries + first_query + in_tile % tile_queries
    key = tl.load(selected + at * num_selected + place, mask=place < num_selected, other=-1).to(tl.int64)
    if tl.max(key, axis=0) < 0:
        return
    is_key, is_head = (key >= 0)[:, None], (head < SHARING)[:, None]
    head = group * SHARING + head[:, None]
    num_heads = num_groups * SHARING

    q += row * q_row + (at - row * num_queries) * q_query + head * q_head
    k += row * k_row + group * k_group + key[:, None] * k_key
    scores = tl.zeros([HEADS, KEYS], tl.float32)
    for start in range(0, WIDTH, CHUNK):
        column = (start + tl.arange(0, CHUNK))[None]
        some_q = tl.load(q + column, mask=is_head & (column < WIDTH), other=0.0)
        some_k = tl.load(k + column, mask=is_key & (column < WIDTH), other=0.0)
        scores = product(some_q, tl.trans(some_k), scores)

    grad_out += (at * num_heads + head) * VALUE_WIDTH
    v += row * v_row + group * v_group + key[:, None] * v_key
    toward = tl.zeros([HEADS, KEYS], tl.float32)
    for start in range(0, VALUE_WIDTH, CHUNK):
        column = (start + tl.arange(0, CHUNK))[None]
        some_grad = tl.load(grad_out + column, mask=is_head & (column < VALUE_WIDTH), other=0.0)
        some_v = tl.load(v + column, mask=is_key & (column < VALUE_WIDTH), other=0.0)
        toward = product(some_grad, tl.trans(some_v), toward)

    log = tl.load(log_sum + at * num_heads + head, mask=is_head, other=0.0)
    centre = tl.load(mean + in_tile * num_heads + head, mask=is_head, other=0.0)
    weights = tl.where((key >= 0)[None], tl.exp2(scores * scale_log2 - log), 0.0)
    grad_scores = weights * (toward - centre) * scale
    pair = (in_tile * num_heads + head) * num_places + place[None]
    is_pair = is_head & (place < num_selected)[None]
    tl.store(weight_scratch + pair, rounded(weights, weight_scratch.dtype.element_ty), mask=is_pair)
    tl.store(score_scratch + pair, rounded(grad_scores, score_scratch.dtype.element_ty), mask=is_pair)


@triton.jit(do_not_specialize=["first_query", "num_queries", "tile_queries"])  # type: ignore[untyped-decorator]
def _of_queries(
    k: tl.tensor,
    selected: tl.tensor,
    score_scratch: tl.tensor,
    grad_q: tl.tensor,
    first_query: tl.tensor,
    num_queries: tl.tensor,
    tile_queries: tl.tensor,
    num_selected: tl.tensor,
    num_places: tl.tensor,
    num_groups: tl.tensor,
    k_row: tl.tensor,
    k_key: tl.tensor,
    k_group: tl.tensor,
    SHARING: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """dq = dS k over the keys of a query: a block of heads, a chunk of columns."""
    chunks: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
    head_blocks: tl.constexpr = (SHARING + HEADS - 1) // HEADS
    program = tl.program_id(0).to(tl.int64)
    column = (program % chunks * CHUNK + tl.arange(0, CHUNK))[None]
    head = (program // chunks % head_blocks * HEADS + tl.arange(0, HEADS))[:, None]
    group = program // (chunks * head_blocks) % num_groups
    in_tile = program // (chunks * head_blocks * num_groups)
    row = in_tile // tile_queries
    at = row * num_queries + first_query + in_tile % tile_queries
    is_head, is_column = head < SHARING, column < WIDTH
    head = group * SHARING + head
    k += row * k_row + group * k_group
    selected += at * num_selected
    score_scratch += (in_tile * num_groups * SHARING + head) * num_places
    total = tl.zeros([HEADS, CHUNK], tl.float32)
    for start in range(0, last_selected(selected, num_selected), KEYS):
        place = start + tl.arange(0, KEYS)
        key = tl.load(selected + place, mask=place < num_selected, other=-1).to(tl.int64)
        is_key = key >= 0  # What stands at absent keys was not written.
        grad_scores = tl.load(score_scratch + place[None], mask=is_head & is_key[None], other=0.0)
        keys = tl.load(k + key[:, None] * k_key + column, mask=is_key[:, None] & is_column, other=0.0)
        total = product(grad_scores, keys, total)
    grad_q += (at * num_groups * SHARING + head) * WIDTH + column
    tl.store(grad_q, rounded(total, grad_q.dtype.element_ty), mask=is_head & is_column)


def query_tiles(saved: Saved) -> Iterator[slice]:
    """Runs of queries whose scratch fits into SCRATCH_BYTES; one query at least."""
    (num_rows, num_queries, num_heads, width), groups = saved.q_RQHE.shape, saved.k_RKGE.shape[2]
    value_width = saved.v_RKGV.shape[-1]
    of_pairs = _places(saved) * (2 * num_heads + groups * max(width, value_width)) * saved.q_RQHE.element_size()
    per_query = num_rows * (of_pairs + 3 * 4 * num_heads * value_width)  # Three float32 tensors on the way to D.
    step = max(1, SCRATCH_BYTES // max(1, per_query))
    for start in range(0, num_queries, step):
        yield slice(start, min(start + step, num_queries))


def backward(saved: Saved, grad_RQHV: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, in their dtypes. `grad_RQHV` is contiguous."""
    q_RQHE, k_RKGE, v_RKGV, selected_RQS = saved[:4]
    grad_q_RQHE = q_RQHE.new_empty(q_RQHE.shape)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k_RKGE, v_RKGV))
    scratch: tuple[Tensor, ...] | None = None
    for tile in query_tiles(saved):
        scratch = scratch or _scratch(saved, tile)  # The first tile is the widest.
        weights, grad_scores, parts = scratch
        _weigh(saved, grad_RQHV, weights, grad_scores, tile, scale)
        _add_to_queries(saved, grad_scores, grad_q_RQHE, tile)
        lists = key_lists(selected_RQS[:, tile], k_RKGE.shape[1])
        for pair_weights, vectors, totals in ((grad_scores, q_RQHE, grad_k), (weights, grad_RQHV, grad_v)):
            add_to_keys(pair_weights, vectors, selected_RQS, lists, totals, parts, tile)
    return grad_q_RQHE, grad_k.to(k_RKGE.dtype), grad_v.to(v_RKGV.dtype)


def _places(saved: Saved) -> int:
    return int(triton.cdiv(saved.selected_RQS.shape[-1], ALIGNED)) * ALIGNED


def _scratch(saved: Saved, tile: slice) -> tuple[Tensor, ...]:
    """P and dS, [R, X, H, S padded], and the parts, [R, X, S, G, E or V]."""
    (num_rows, _, num_heads, width), groups = saved.q_RQHE.shape, saved.k_RKGE.shape[2]
    num_queries, widest = tile.stop - tile.start, max(width, saved.v_RKGV.shape[-1])
    weights, grad_scores = (saved.q_RQHE.new_empty(num_rows, num_queries, num_heads, _places(saved)) for _ in range(2))
    num_selected = saved.selected_RQS.shape[-1]
    return weights, grad_scores, saved.q_RQHE.new_empty(num_rows * num_queries * num_selected * groups * widest)


def _weigh(saved: Saved, grad_RQHV: Tensor, weights: Tensor, grad_scores: Tensor, tile: slice, scale: float) -> None:
    """P and dS of the tile. D = sum(dO * O) over the values is what the softmax takes off each gradient."""
    (num_rows, num_queries, num_heads, width), groups = saved.q_RQHE.shape, saved.k_RKGE.shape[2]
    mean_RXH = (grad_RQHV[:, tile].float() * saved.out_RQHV[:, tile].float()).sum(dim=-1)
    blocks = pair_blocks(num_heads // groups, saved.q_RQHE.dtype)
    heads = triton.cdiv(num_heads // groups, blocks.heads)
    num_selected, tile_queries = saved.selected_RQS.shape[-1], tile.stop - tile.start
    _weigh_pairs[(num_rows * tile_queries * groups * heads * triton.cdiv(num_selected, blocks.keys),)](
        *saved[:4],
        saved.log_sum_RQH,
        grad_RQHV,
        mean_RXH,
        weights,
        grad_scores,
        scale,
        scale * LOG2_E,
        tile.start,
        num_queries,
        tile_queries,
        num_selected,
        weights.shape[-1],
        groups,
        *saved.q_RQHE.stride()[:3],
        *saved.k_RKGE.stride()[:3],
        *saved.v_RKGV.stride()[:3],
        SHARING=num_heads // groups,
        WIDTH=width,
        VALUE_WIDTH=saved.v_RKGV.shape[-1],
        CHUNK=blocks.step,
        HEADS=blocks.heads,
        KEYS=blocks.keys,
        num_warps=blocks.warps,
    )


def _add_to_queries(saved: Saved, grad_scores: Tensor, grad_q_RQHE: Tensor, tile: slice) -> None:
    (num_rows, num_queries, num_heads, width), groups = saved.q_RQHE.shape, saved.k_RKGE.shape[2]
    blocks, tile_queries = pair_blocks(num_heads // groups, saved.q_RQHE.dtype), tile.stop - tile.start
    chunk = column_chunk(width, blocks)
    heads = triton.cdiv(num_heads // groups, blocks.heads)
    _of_queries[(num_rows * tile_queries * groups * heads * triton.cdiv(width, chunk),)](
        saved.k_RKGE,
        saved.selected_RQS,
        grad_scores,
        grad_q_RQHE,
        tile.start,
        num_queries,
        tile_queries,
        saved.selected_RQS.shape[-1],
        grad_scores.shape[-1],
        groups,
        *saved.k_RKGE.stride()[:3],
        SHARING=num_heads // groups,
        WIDTH=width,
        CHUNK=chunk,
        HEADS=blocks.heads,
        KEYS=blocks.step,
        num_warps=blocks.warps,
    )
