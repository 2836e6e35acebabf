"""Attention over selected blocks in Triton, forward and backward.

Neighbouring queries often select the same blocks. Forward, and for the gradients of queries, a program owns a few
neighbouring queries with all heads of a group, and passes over the blocks that any of them selected: a block is loaded
once for all, and each line takes part in those that its query selected. For the gradients of keys and values a program
owns a block, and passes over the queries that selected it, which a stable sort has listed. A block that very many
selected, as all do the first, is cut into items, whose sums are added in order: nothing is added by chance.

Shapes: as in `nsa.py`; D tiles of X queries, U blocks of a tile, Z lists of queries, one for each row, group and block,
I items.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from rorqual.ops.nsa_span_triton import Upstream
from rorqual.ops.nsa_tiles_triton import (
    LOG2_E,
    key_gradients,
    line_scalars,
    padded,
    plan,
    put_attention,
    put_vectors,
    query_gradient,
    take_in,
    vectors,
)

ITEM_LINES = 1 << 14
"""Lines of an item: queries that selected a block, times heads that share keys."""

SELECTED = tl.constexpr(1)
"""The branch's place among the gates."""


class Tiles(NamedTuple):
    """Blocks that X neighbouring queries select: their numbers [R, D, G, U], ascending; which of the queries selected
    each, as bits; and how many there are [R, D, G]. All int32."""

    blocks: Tensor
    members: Tensor
    number: Tensor


class Lists(NamedTuple):
    """Which queries selected each block, list after list: their numbers in the row; where the Z lists begin and end
    [Z + 1]; the item at which each begins and ends [Z + 1]; the list of each item [I], Z of those that are not
    needed."""

    queries: Tensor
    start_Z: Tensor
    item_Z: Tensor
    list_I: Tensor


def tile_queries(q_RQHE: Tensor, groups: int) -> int:
    """Neighbouring queries of a program: no more than 64 lines, and no more than 4 queries, since those further apart
    share little; but 16 lines at least, which `tl.dot` takes in any case."""
    sharing, lines = q_RQHE.shape[2] // groups, min(64, plan(q_RQHE).forward.lines)
    return max(1, 16 // sharing, min(4, lines // sharing))


def tiles_of(blocks_RQGS: Tensor, num_blocks: int, queries: int) -> Tiles:
    """The union of the selections of `queries` neighbouring queries."""
    missing = -blocks_RQGS.shape[1] % queries
    padded_RQGS = F.pad(blocks_RQGS, (0, 0, 0, 0, 0, missing), value=-1)
    blocks_RDGXS = padded_RQGS.unflatten(1, (-1, queries)).transpose(2, 3)
    member_X1 = torch.arange(queries, dtype=torch.int32, device=blocks_RQGS.device)[:, None]
    present_RDGXS = torch.where(blocks_RDGXS < 0, num_blocks, blocks_RDGXS)
    pairs_RDGU = (present_RDGXS * queries + member_X1).flatten(-2).sort(dim=-1).values
    block_RDGU = pairs_RDGU // queries
    first_RDGU = block_RDGU < num_blocks
    absent_RDGU = ~first_RDGU
    first_RDGU[..., 1:] &= block_RDGU[..., 1:] != block_RDGU[..., :-1]
    rank_RDGU = first_RDGU.cumsum(dim=-1) - 1
    rank_RDGU.masked_fill_(absent_RDGU, block_RDGU.shape[-1])  # Off the end.
    lists = pairs_RDGU.new_zeros(*block_RDGU.shape[:-1], block_RDGU.shape[-1] + 1)
    bits = torch.ones_like(pairs_RDGU) << (pairs_RDGU % queries)
    members = lists.scatter_add(-1, rank_RDGU, bits)[..., :-1].contiguous()
    blocks = lists.scatter(-1, rank_RDGU, block_RDGU)[..., :-1].contiguous()
    return Tiles(blocks, members, first_RDGU.sum(dim=-1, dtype=torch.int32))


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
def _tile_lines(
    num_queries: tl.tensor, num_groups: tl.tensor, SHARING: tl.constexpr, QUERIES: tl.constexpr, LINES: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Of this program's lines: the query's place in the tile, the query, the place in [R, Q, H], whether it is
    there."""
    line = tl.arange(0, LINES)
    member = line // SHARING
    query = tl.program_id(0) * QUERIES + member
    at = (tl.program_id(2).to(tl.int64) * num_queries + query) * (num_groups * SHARING)
    there = (member < QUERIES) & (query < num_queries)
    return member, query, at + tl.program_id(1) * SHARING + line % SHARING, there


@triton.jit  # type: ignore[untyped-decorator]
def _block_keys(
    step: tl.tensor,
    blocks: tl.tensor,
    members: tl.tensor,
    tile: tl.tensor,
    most: tl.tensor,
    selected_length: tl.tensor,
    num_keys: tl.tensor,
    num_groups: tl.tensor,
    member: tl.tensor,
    position: tl.tensor,
    KEYS: tl.constexpr,
    PIECES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The keys of a step, which is a piece of a block: places in [R, K, G], whether they are there, and which lines see
    them [M, N]."""
    offset = step % PIECES * KEYS + tl.arange(0, KEYS)
    key = tl.load(blocks + tile * most + step // PIECES) * selected_length + offset
    bits = tl.load(members + tile * most + step // PIECES)
    there = (offset < selected_length) & (key < num_keys)
    seen = (((bits >> member) & 1) > 0)[:, None] & there[None] & (key[None] <= position[:, None])
    at = (tl.program_id(2).to(tl.int64) * num_keys + key) * num_groups + tl.program_id(1)
    return at, there, seen


@triton.jit  # type: ignore[untyped-decorator]
def _forward(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    start: tl.tensor,
    blocks: tl.tensor,
    members: tl.tensor,
    count: tl.tensor,
    out: tl.tensor,
    log_sum: tl.tensor,
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
    """Writes the attention of a tile of queries [R, Q, H, E] and log2 of the sums of its softmax [R, Q, H]."""
    member, query, at, there = _tile_lines(num_queries, num_groups, SHARING, QUERIES, LINES)
    position = tl.load(start + tl.program_id(2)) + query
    tile = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * num_groups + tl.program_id(1)
    q_tile = vectors(q, at, there, WIDTH, PADDED, True)
    highest = tl.full([LINES], -float("inf"), tl.float32)
    total = tl.zeros([LINES], tl.float32)
    weighted = tl.zeros([LINES, PADDED], tl.float32)
    for step in range(tl.load(count + tile) * PIECES):
        key_at, key_there, seen = _block_keys(
            step, blocks, members, tile, most, selected_length, num_keys, num_groups, member, position, KEYS, PIECES
        )
        k_tile = vectors(k, key_at, key_there, WIDTH, PADDED, True)
        v_tile = vectors(v, key_at, key_there, WIDTH, PADDED, True)
        highest, total, weighted = take_in(q_tile, k_tile, v_tile, seen, highest, total, weighted, scale_log2, True)
    put_attention(out, log_sum, at, there, highest, total, weighted, WIDTH, PADDED)


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
    member, query, at, there = _tile_lines(num_queries, num_groups, SHARING, QUERIES, LINES)
    position = tl.load(start + tl.program_id(2)) + query
    tile = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * num_groups + tl.program_id(1)
    q_tile = vectors(q, at, there, WIDTH, PADDED, True)
    grad_tile = vectors(grad_out, at, there, WIDTH, PADDED, True)
    log, gate, mean = line_scalars(log_sum, gates, grad_gates, at, there, SELECTED)
    total = tl.zeros([LINES, PADDED], tl.float32)
    for step in range(tl.load(count + tile) * PIECES):
        key_at, key_there, seen = _block_keys(
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


def forward(
    q_RQHE: Tensor, kv: tuple[Tensor, Tensor], start_R: Tensor, tiles: Tiles, length: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention [R, Q, H, E], 0 for queries that see no key, and log2 of the sums of its softmax [R, Q, H], in float32.

    All are contiguous; start_R: int32, the positions of the rows' first queries. length: of a block, l'.
    """
    (_, num_queries, num_heads, width), (num_keys, groups) = q_RQHE.shape, kv[0].shape[1:3]
    sharing, tile = num_heads // groups, plan(q_RQHE).forward
    queries, keys = tile_queries(q_RQHE, groups), min(tile.keys, padded(length))
    out_RQHE = torch.empty_like(q_RQHE)
    log_sum_RQH = q_RQHE.new_empty(q_RQHE.shape[:3], dtype=torch.float32)
    _forward[(tiles.blocks.shape[1], groups, len(q_RQHE))](
        q_RQHE,
        *kv,
        start_R,
        *tiles,
        out_RQHE,
        log_sum_RQH,
        scale * LOG2_E,
        num_queries,
        num_keys,
        groups,
        tiles.blocks.shape[-1],
        length,
        SHARING=sharing,
        WIDTH=width,
        PADDED=padded(width),
        QUERIES=queries,
        LINES=padded(queries * sharing),
        KEYS=keys,
        PIECES=triton.cdiv(length, keys),
        num_warps=4,
        num_stages=tile.stages,
    )
    return out_RQHE, log_sum_RQH


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
