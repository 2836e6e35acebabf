"""Attention over selected keys in Triton, backward: the same bits on every run, without atomic additions.

The gradient of a query is a sum over its own keys, and its program has them at hand. That of a key is a sum over the
queries that selected it, anywhere in the row. There are three ways to that sum:

- Add to it from the queries' side, atomically. The order of additions, and with it the result, is chance.
- A program for each key reads all that its queries hold: J(E + V) numbers for 4J(E + V) operations, two operations a
  byte in half precision, where an H100 needs 300. No block of keys helps, since each key has another set of queries.
- A program for each query multiplies its own weights and queries, [S, J] x [J, E], which is the shape that tensor cores
  like, and writes a part for each of its keys; a program for each key then adds its parts up, in the order of the
  queries. That moves 2(E + V) numbers a pair instead of J(E + V), and is what is done here.

A tile of queries at a time goes through three kernels, so that what they leave to each other is bounded by
SCRATCH_BYTES:

1. `_of_queries` computes the softmax anew from its stored sum, writes the gradient of the queries, and leaves the
   weights P and the gradients of the scores dS of its pairs: [X, H, S] each.
2. `_parts` makes of them what a query adds to each of its keys: dS^T q, and for values P^T dO.
3. `_add_parts` adds up the parts of each key in float32. Its list of pairs (query, place) is the tile's selection
   sorted by key; the sort is stable, so that queries ascend.

Parts are kept in the dtype of the inputs; 2 and 3 run for keys, then for values, in the same memory. The totals are
float32, [R, K, G, E] and [R, K, G, V].

Shapes: as in `dsa.py`; X queries of a tile, L lists of pairs, N pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.ops.dsa_forward_triton import (
    LOG2_E,
    choose_blocks,
    cut,
    last_selected,
    padded,
    shared_bytes,
    sizes_of,
)
from rorqual.ops.numbers_triton import product, rounded

SCRATCH_BYTES = 1 << 30
"""Most memory of a tile's weights, score gradients and parts. More of it makes fewer tiles, and for each tile the
totals of its keys are read and written once."""

ALIGNED = 64
"""Places a query of P and dS are padded to, so that rows begin on whole cache lines."""

PARTS_KEYS = 128
"""Keys of a block of parts."""


class Saved(NamedTuple):
    """What the forward pass leaves to the backward pass; the last dimensions are contiguous, all of `selected` is."""

    q_RQHE: Tensor
    k_RKGE: Tensor
    v_RKGV: Tensor
    selected_RQS: Tensor
    out_RQHV: Tensor
    log_sum_RQH: Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _of_queries(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    selected: tl.tensor,
    out: tl.tensor,
    log_sum: tl.tensor,
    grad_out: tl.tensor,
    grad_q: tl.tensor,
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
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    VALUES: tl.constexpr,
    VALUES_ARE_KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """A program for a query of the tile and a block of heads: dq, and P and dS of its pairs.

    With D = sum(dO * O) over the values: dP = dO v^T, dS = scale P (dP - D), dq = dS k.
    """
    head_blocks: tl.constexpr = (SHARING + HEADS - 1) // HEADS
    program = tl.program_id(0).to(tl.int64)
    group = program // head_blocks % num_groups
    in_tile = program // (head_blocks * num_groups)
    row = in_tile // tile_queries
    query = first_query + in_tile % tile_queries
    at = row * num_queries + query
    head = program % head_blocks * HEADS + tl.arange(0, HEADS)
    is_head = (head < SHARING)[:, None]
    head = group * SHARING + head
    num_heads = num_groups * SHARING
    main, rest, value = tl.arange(0, MAIN), MAIN + tl.arange(0, REST if REST else 1), tl.arange(0, VALUES)
    is_main, is_rest, is_value = (main < WIDTH)[None], (rest < WIDTH)[None], (value < VALUE_WIDTH)[None]

    q += row * q_row + query * q_query + head[:, None] * q_head
    q_main = tl.load(q + main[None], mask=is_head & is_main, other=0.0)
    if REST:
        q_rest = tl.load(q + rest[None], mask=is_head & is_rest, other=0.0)
    values_at = (at * num_heads + head)[:, None] * VALUE_WIDTH + value[None]
    grad = tl.load(grad_out + values_at, mask=is_head & is_value, other=0.0)
    answer = tl.load(out + values_at, mask=is_head & is_value, other=0.0)
    mean = tl.sum(grad.to(tl.float32) * answer.to(tl.float32), axis=1)
    log = tl.load(log_sum + at * num_heads + head[:, None], mask=is_head, other=0.0)
    k += row * k_row + group * k_group
    v += row * v_row + group * v_group
    selected += at * num_selected
    scratch_at = (in_tile * num_heads + head)[:, None] * num_places

    grad_main = tl.zeros([HEADS, MAIN], tl.float32)
    if REST:
        grad_rest = tl.zeros([HEADS, REST], tl.float32)
    end = last_selected(selected, num_selected)
    for start in range(0, end, KEYS):
        place = start + tl.arange(0, KEYS)
        key = tl.load(selected + place, mask=place < end, other=-1).to(tl.int64)
        is_key = (key >= 0)[:, None]
        k_main = tl.load(k + key[:, None] * k_key + main[None], mask=is_key & is_main, other=0.0)
        scores = product(q_main, tl.trans(k_main), tl.zeros([HEADS, KEYS], tl.float32))
        if REST:
            k_rest = tl.load(k + key[:, None] * k_key + rest[None], mask=is_key & is_rest, other=0.0)
            scores = product(q_rest, tl.trans(k_rest), scores)
        if VALUES_ARE_KEYS:
            values = k_main
        else:
            values = tl.load(v + key[:, None] * v_key + value[None], mask=is_key & is_value, other=0.0)
        toward = product(grad, tl.trans(values), tl.zeros([HEADS, KEYS], tl.float32))
        weights = tl.where((key >= 0)[None], tl.exp2(scores * scale_log2 - log), 0.0)
        grad_scores = rounded(weights * (toward - mean[:, None]) * scale, k.dtype.element_ty)
        grad_main = product(grad_scores, k_main, grad_main)
        if REST:
            grad_rest = product(grad_scores, k_rest, grad_rest)
        is_pair = is_head & (place < num_selected)[None]
        tl.store(weight_scratch + scratch_at + place[None], rounded(weights, v.dtype.element_ty), mask=is_pair)
        tl.store(score_scratch + scratch_at + place[None], grad_scores, mask=is_pair)

    grad_q += (at * num_heads + head)[:, None] * WIDTH
    tl.store(grad_q + main[None], rounded(grad_main, grad_q.dtype.element_ty), mask=is_head & is_main)
    if REST:
        tl.store(grad_q + rest[None], rounded(grad_rest, grad_q.dtype.element_ty), mask=is_head & is_rest)


@triton.jit  # type: ignore[untyped-decorator]
def _parts(
    scratch: tl.tensor,
    vectors: tl.tensor,
    selected: tl.tensor,
    parts: tl.tensor,
    first_query: tl.tensor,
    num_queries: tl.tensor,
    tile_queries: tl.tensor,
    num_selected: tl.tensor,
    num_places: tl.tensor,
    num_groups: tl.tensor,
    vector_row: tl.tensor,
    vector_query: tl.tensor,
    vector_head: tl.tensor,
    SHARING: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """What a query adds to a block of its keys: sum over the heads of a group, [J, S]^T x [J, WIDTH], a chunk of it."""
    chunks: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
    program = tl.program_id(0).to(tl.int64)
    column = program % chunks * CHUNK + tl.arange(0, CHUNK)
    key_blocks = tl.cdiv(num_selected, KEYS)
    place = program // chunks % key_blocks * KEYS + tl.arange(0, KEYS)
    group = program // (chunks * key_blocks) % num_groups
    in_tile = program // (chunks * key_blocks * num_groups)
    row = in_tile // tile_queries
    query = first_query + in_tile % tile_queries
    is_place, is_column = place < num_selected, (column < WIDTH)[None]
    key = tl.load(selected + (row * num_queries + query) * num_selected + place, mask=is_place, other=-1)
    if tl.max(key, axis=0) < 0:
        return
    vectors += row * vector_row + query * vector_query
    scratch += (in_tile * num_groups + group) * SHARING * num_places
    total = tl.zeros([KEYS, CHUNK], tl.float32)
    for start in range(0, SHARING, HEADS):
        head = start + tl.arange(0, HEADS)
        is_head = (head < SHARING)[:, None]
        weights = tl.load(scratch + head[:, None] * num_places + place[None], mask=is_head & is_place[None], other=0.0)
        vector = vectors + (group * SHARING + head)[:, None] * vector_head + column[None]
        total = product(tl.trans(weights), tl.load(vector, mask=is_head & is_column, other=0.0), total)
    pair = (in_tile * num_selected + place)[:, None]
    answer = rounded(total, parts.dtype.element_ty)
    tl.store(parts + (pair * num_groups + group) * WIDTH + column[None], answer, mask=is_place[:, None] & is_column)


@triton.jit  # type: ignore[untyped-decorator]
def _add_parts(
    parts: tl.tensor,
    pairs: tl.tensor,
    begin: tl.tensor,
    totals: tl.tensor,
    num_groups: tl.tensor,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    PAIRS: tl.constexpr,
) -> None:
    """A program for a key and a group: the parts of its pairs, in their order, onto its total. No list, no access."""
    program = tl.program_id(0).to(tl.int64)
    group, which = program % num_groups, program // num_groups
    first, end = tl.load(begin + which), tl.load(begin + which + 1)
    if first == end:
        return
    column = tl.arange(0, PADDED)
    is_column = column < WIDTH
    total = tl.zeros([PADDED], tl.float32)
    for start in range(first, end, PAIRS):
        place = start + tl.arange(0, PAIRS)
        is_pair = place < end
        pair = tl.load(pairs + place, mask=is_pair, other=0)
        part = parts + (pair * num_groups + group)[:, None] * WIDTH + column[None]
        found = tl.load(part, mask=is_pair[:, None] & is_column[None], other=0.0)
        total += tl.sum(found.to(tl.float32), axis=0)
    totals += program * WIDTH + column
    tl.store(totals, tl.load(totals, mask=is_column, other=0.0) + total, mask=is_column)


class KeyLists(NamedTuple):
    """The pairs of every key: those of key L are `pairs_N[begin_L[L] : begin_L[L + 1]]`, queries ascending.

    A key is `row * K + key`, a pair `(row * X + query) * S + place`. Absent keys stand behind the last list.
    """

    begin_L: Tensor
    pairs_N: Tensor


def key_lists(selected_RXS: Tensor, num_keys: int) -> KeyLists:
    """The inverse of a selection."""
    num_lists = len(selected_RXS) * num_keys
    dtype = torch.int32 if num_lists < torch.iinfo(torch.int32).max else torch.int64
    first_R11 = torch.arange(0, num_lists, num_keys, device=selected_RXS.device, dtype=dtype)[:, None, None]
    list_RXS = torch.where(selected_RXS < 0, num_lists, selected_RXS + first_R11).to(dtype)
    sorted_N, pairs_N = list_RXS.flatten().sort(stable=True)
    every_L = torch.arange(num_lists + 1, device=selected_RXS.device, dtype=dtype)
    return KeyLists(torch.searchsorted(sorted_N, every_L), pairs_N)


def query_tiles(saved: Saved) -> Iterator[slice]:
    """Runs of queries whose scratch fits into SCRATCH_BYTES; one query at least."""
    (num_rows, num_queries, num_heads, width), groups = saved.q_RQHE.shape, saved.k_RKGE.shape[2]
    numbers = 2 * num_heads + groups * max(width, saved.v_RKGV.shape[-1])
    per_query = num_rows * _places(saved) * numbers * saved.q_RQHE.element_size()
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
        _gradients_of_queries(saved, grad_RQHV, grad_q_RQHE, (weights, grad_scores), tile, scale)
        lists = key_lists(selected_RQS[:, tile], k_RKGE.shape[1])
        for pair_weights, vectors, totals in ((grad_scores, q_RQHE, grad_k), (weights, grad_RQHV, grad_v)):
            _add_to_keys(saved, pair_weights, vectors, parts, lists, totals, tile)
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


def _gradients_of_queries(
    saved: Saved, grad_RQHV: Tensor, grad_q_RQHE: Tensor, scratch: tuple[Tensor, Tensor], tile: slice, scale: float
) -> None:
    (num_rows, num_queries, _, width), groups = saved.q_RQHE.shape, saved.k_RKGE.shape[2]
    sizes, tile_queries = sizes_of(*saved[:3]), tile.stop - tile.start
    held = sum(cut(width)) + padded(sizes.value_width)
    blocks = choose_blocks(sizes, shared_bytes(saved.q_RQHE.device), held)
    _of_queries[(num_rows * tile_queries * groups * triton.cdiv(sizes.sharing, blocks.heads),)](
        *saved,
        grad_RQHV,
        grad_q_RQHE,
        *scratch,
        scale,
        scale * LOG2_E,
        tile.start,
        num_queries,
        tile_queries,
        saved.selected_RQS.shape[-1],
        _places(saved),
        groups,
        *saved.q_RQHE.stride()[:3],
        *saved.k_RKGE.stride()[:3],
        *saved.v_RKGV.stride()[:3],
        SHARING=sizes.sharing,
        WIDTH=width,
        VALUE_WIDTH=sizes.value_width,
        MAIN=cut(width).main,
        REST=cut(width).rest,
        VALUES=padded(sizes.value_width),
        VALUES_ARE_KEYS=sizes.values_are_keys,
        HEADS=blocks.heads,
        KEYS=blocks.keys,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )


def _add_to_keys(
    saved: Saved,
    pair_weights: Tensor,
    vectors_RQHW: Tensor,
    parts: Tensor,
    lists: KeyLists,
    totals_RKGW: Tensor,
    tile: slice,
) -> None:
    """The tile's weighted vectors, queries or gradients of the output, onto the totals of their keys."""
    num_rows, num_queries, num_heads, width = vectors_RQHW.shape
    num_keys, groups = totals_RKGW.shape[1:3]
    tile_queries, num_selected = tile.stop - tile.start, saved.selected_RQS.shape[-1]
    chunk = _chunk(width)
    blocks = triton.cdiv(num_selected, PARTS_KEYS) * triton.cdiv(width, chunk)
    _parts[(num_rows * tile_queries * groups * blocks,)](
        pair_weights,
        vectors_RQHW,
        saved.selected_RQS,
        parts,
        tile.start,
        num_queries,
        tile_queries,
        num_selected,
        _places(saved),
        groups,
        *vectors_RQHW.stride()[:3],
        SHARING=num_heads // groups,
        WIDTH=width,
        CHUNK=chunk,
        HEADS=min(64, padded(num_heads // groups)),
        KEYS=PARTS_KEYS,
        num_warps=4,
    )
    whole = triton.next_power_of_2(width)
    _add_parts[(num_rows * num_keys * groups,)](
        parts,
        lists.pairs_N,
        lists.begin_L,
        totals_RKGW,
        groups,
        WIDTH=width,
        PADDED=whole,
        PAIRS=max(1, min(16, 4096 // whole)),
        num_warps=4,
    )


def _chunk(width: int) -> int:
    """Columns of a block of parts: of 128 to 16 the largest that pads `width` least."""
    return min((128, 64, 32, 16), key=lambda size: (int(triton.cdiv(width, size)) * size, -size))
