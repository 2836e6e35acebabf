"""Gradients of attention over selected blocks in Triton.

Those of queries are made as the attention is. For those of keys and values a program owns a block, and passes over the
queries that selected it, which a stable sort has listed. A block that very many selected, as all do the first, is cut
into items, whose sums are added in order: no program adds to what another owns.

Shapes: as in `nsa_selected.py`; Z lists of queries, one for each row, group and block; I items.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from rorqual.ops.gpu.nsa_selected import Tiles, block_keys, tile_lines, tile_queries
from rorqual.ops.gpu.nsa_tiles import (
    LOG2_E,
    Upstream,
    key_gradients,
    line_scalars,
    padded,
    plan,
    put_vectors,
    query_gradient,
    vectors,
)

ITEM_LINES = 1 << 14
"""Lines of an item: queries that selected a block, times heads that share keys."""

SELECTED = tl.constexpr(1)
"""The branch's place among the gates."""


class Lists(NamedTuple):
    """Which queries selected each block, list after list: their numbers in the row; where the Z lists begin and end
    [Z + 1]; the item at which each begins and ends [Z + 1]; the list of each item [I], Z of those that are not
    needed."""

    queries: Tensor
    start_Z: Tensor
    item_Z: Tensor
    list_I: Tensor


def lists_of(blocks_RQGS: Tensor, num_blocks: int, item_queries: int) -> Lists:
    """The inverse of the selection, by a stable sort; nothing waits for the device."""
    (num_rows, num_queries, groups, num_selected), device = blocks_RQGS.shape, blocks_RQGS.device
    num_lists = num_rows * groups * num_blocks
    first_R1G1 = torch.arange(num_rows * groups, dtype=torch.int32, device=device).view(num_rows, 1, groups, 1)
    list_RQGS = torch.where(blocks_RQGS < 0, num_lists, first_R1G1 * num_blocks + blocks_RQGS)
    sorted_lists, order = list_RQGS.flatten().sort(stable=True)
    queries = (order // (groups * num_selected) % num_queries).int()
    wanted = torch.arange(num_lists + 1, dtype=torch.int32, device=device)
    start_Z = torch.searchsorted(sorted_lists, wanted)
    items_Z = (start_Z.diff() + item_queries - 1) // item_queries
    item_Z = F.pad(items_Z.cumsum(dim=0), (1, 0))
    item_I = torch.arange(num_lists + len(queries) // item_queries, device=device)
    list_I = torch.searchsorted(item_Z[1:].contiguous(), item_I, right=True)
    return Lists(queries, start_Z, item_Z, list_I)


@triton.jit  # type: ignore[untyped-decorator]
def _query_backward(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    start: tl.tensor,
    blocks: tl.tensor,
    members: tl.tensor,
    count: tl.tensor,
    log_sum: tl.tensor,
    grad_out: tl.tensor,
    gates: tl.tensor,
    grad_gates: tl.tensor,
    grad_q: tl.tensor,
    scale: tl.tensor,
    scale_log2: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    num_groups: tl.tensor,
    most: tl.tensor,
    selected_length: tl.tensor,
    SHARING: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
    LINES: tl.constexpr,
    KEYS: tl.constexpr,
    PIECES: tl.constexpr,
) -> None:
    """Writes the branch's gradient of a tile of queries, float32 [R, Q, H, E]."""
    member, query, at, there = tile_lines(num_queries, num_groups, SHARING, QUERIES, LINES)
    position = tl.load(start + tl.program_id(2)) + query
    tile = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * num_groups + tl.program_id(1)
    q_tile = vectors(q, at, there, WIDTH, PADDED, True)
    grad_tile = vectors(grad_out, at, there, WIDTH, PADDED, True)
    log, gate, mean = line_scalars(log_sum, gates, grad_gates, at, there, SELECTED)
    total = tl.zeros([LINES, PADDED], tl.float32)
    for step in range(tl.load(count + tile) * PIECES):
        key_at, key_there, seen = block_keys(
            step, blocks, members, tile, most, selected_length, num_keys, num_groups, member, position, KEYS, PIECES
        )
        k_tile = vectors(k, key_at, key_there, WIDTH, PADDED, True)
        v_tile = vectors(v, key_at, key_there, WIDTH, PADDED, True)
        total = query_gradient(q_tile, k_tile, v_tile, seen, grad_tile, log, gate, mean, total, scale_log2, True)
    put_vectors(grad_q, at, there, total * scale, WIDTH, PADDED)


@triton.jit  # type: ignore[untyped-decorator]
def _key_backward(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    start: tl.tensor,
    queries: tl.tensor,
    list_start: tl.tensor,
    item_start: tl.tensor,
    list_of_item: tl.tensor,
    log_sum: tl.tensor,
    grad_out: tl.tensor,
    gates: tl.tensor,
    grad_gates: tl.tensor,
    grad_k: tl.tensor,
    grad_v: tl.tensor,
    scale: tl.tensor,
    scale_log2: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    num_groups: tl.tensor,
    num_blocks: tl.tensor,
    num_lists: tl.tensor,
    selected_length: tl.tensor,
    item_queries: tl.tensor,
    SHARING: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    LINES: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """Writes the gradients of a piece of a block from the queries of one item, float32 [I, l', E]."""
    item = tl.program_id(0).to(tl.int64)
    which = tl.load(list_of_item + item)
    if which >= num_lists:
        return
    block, group, row = which % num_blocks, which // num_blocks % num_groups, which // (num_blocks * num_groups)
    offset = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    key = block * selected_length + offset
    key_there = (offset < selected_length) & (key < num_keys)
    key_at = (row * num_keys + key) * num_groups + group
    k_tile = vectors(k, key_at, key_there, WIDTH, PADDED, True)
    v_tile = vectors(v, key_at, key_there, WIDTH, PADDED, True)
    row_start = tl.load(start + row)
    first = tl.load(list_start + which) + (item - tl.load(item_start + which)) * item_queries
    lines = tl.minimum(tl.load(list_start + which + 1) - first, item_queries).to(tl.int32) * SHARING
    grad_k_tile = tl.zeros([KEYS, PADDED], tl.float32)
    grad_v_tile = tl.zeros([KEYS, PADDED], tl.float32)
    for first_line in range(0, lines, LINES):
        line = first_line + tl.arange(0, LINES)
        there = line < lines
        query = tl.load(queries + first + line // SHARING, mask=there, other=0)
        at = (row * num_queries + query) * (num_groups * SHARING) + group * SHARING + line % SHARING
        q_tile = vectors(q, at, there, WIDTH, PADDED, True)
        grad_tile = vectors(grad_out, at, there, WIDTH, PADDED, True)
        log, gate, mean = line_scalars(log_sum, gates, grad_gates, at, there, SELECTED)
        seen = key[:, None] <= (row_start + query)[None]
        grad_k_tile, grad_v_tile = key_gradients(
            q_tile, k_tile, v_tile, seen, grad_tile, log, gate, mean, grad_k_tile, grad_v_tile, scale_log2, True
        )
    at = item * selected_length + offset
    put_vectors(grad_k, at, offset < selected_length, grad_k_tile * scale, WIDTH, PADDED)
    put_vectors(grad_v, at, offset < selected_length, grad_v_tile, WIDTH, PADDED)


@triton.jit  # type: ignore[untyped-decorator]
def _add_items(
    items_k: tl.tensor,
    items_v: tl.tensor,
    item_start: tl.tensor,
    grad_k: tl.tensor,
    grad_v: tl.tensor,
    num_keys: tl.tensor,
    num_groups: tl.tensor,
    num_blocks: tl.tensor,
    selected_length: tl.tensor,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """Writes the gradients of a piece of a block [R, K, G, E], the sum of its items in their order."""
    which = tl.program_id(0).to(tl.int64)
    offset = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    there = offset < selected_length
    total_k = tl.zeros([KEYS, PADDED], tl.float32)
    total_v = tl.zeros([KEYS, PADDED], tl.float32)
    for item in range(tl.load(item_start + which), tl.load(item_start + which + 1)):
        total_k += vectors(items_k, item * selected_length + offset, there, WIDTH, PADDED, True)
        total_v += vectors(items_v, item * selected_length + offset, there, WIDTH, PADDED, True)
    key = which % num_blocks * selected_length + offset
    there = there & (key < num_keys)
    row_group = which // num_blocks
    at = (row_group // num_groups * num_keys + key) * num_groups + row_group % num_groups
    put_vectors(grad_k, at, there, total_k, WIDTH, PADDED)
    put_vectors(grad_v, at, there, total_v, WIDTH, PADDED)


def backward(
    q_RQHE: Tensor,
    kv: tuple[Tensor, Tensor],
    start_R: Tensor,
    blocks_RQGS: Tensor,
    tiles: Tiles,
    log_sum_RQH: Tensor,
    upstream: Upstream,
    length: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the queries [R, Q, H, E], float32, and of keys and values [R, K, G, E]."""
    (num_rows, num_queries, num_heads, width), (num_keys, groups) = q_RQHE.shape, kv[0].shape[1:3]
    sharing, num_blocks, both = num_heads // groups, triton.cdiv(num_keys, length), (scale, scale * LOG2_E)
    sizes = {"WIDTH": width, "PADDED": padded(width)}
    grad_q_RQHE = torch.empty_like(q_RQHE, dtype=torch.float32)
    tile = plan(q_RQHE).query_backward
    queries, keys = tile_queries(q_RQHE, groups), min(tile.keys, padded(length))
    _query_backward[(tiles.blocks.shape[1], groups, num_rows)](
        q_RQHE,
        *kv,
        start_R,
        *tiles,
        log_sum_RQH,
        *upstream,
        grad_q_RQHE,
        *both,
        num_queries,
        num_keys,
        groups,
        tiles.blocks.shape[-1],
        length,
        SHARING=sharing,
        QUERIES=queries,
        LINES=padded(queries * sharing),
        KEYS=keys,
        PIECES=triton.cdiv(length, keys),
        num_warps=4,
        num_stages=tile.stages,
        **sizes,
    )
    item_queries = max(1, ITEM_LINES // sharing)
    lists = lists_of(blocks_RQGS, num_blocks, item_queries)
    num_items, num_lists = len(lists.list_I), num_rows * groups * num_blocks
    items_k, items_v = (q_RQHE.new_empty(num_items, length, width, dtype=torch.float32) for _ in range(2))
    tile = plan(q_RQHE).key_backward
    keys = min(tile.keys, padded(length))
    pieces = triton.cdiv(length, keys)
    _key_backward[(num_items, pieces)](
        q_RQHE,
        *kv,
        start_R,
        *lists,
        log_sum_RQH,
        *upstream,
        items_k,
        items_v,
        *both,
        num_queries,
        num_keys,
        groups,
        num_blocks,
        num_lists,
        length,
        item_queries,
        SHARING=sharing,
        LINES=tile.lines,
        KEYS=keys,
        num_warps=4 if keys <= 64 else tile.warps,
        num_stages=tile.stages,
        **sizes,
    )
    grad_k, grad_v = torch.empty_like(kv[0]), torch.empty_like(kv[1])
    _add_items[(num_lists, pieces)](
        items_k, items_v, lists.item_Z, grad_k, grad_v, num_keys, groups, num_blocks, length, KEYS=keys, **sizes
    )
    return grad_q_RQHE, grad_k, grad_v
