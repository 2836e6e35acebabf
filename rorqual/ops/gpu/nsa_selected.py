"""Attention over selected blocks in Triton; its gradients are in `nsa_selected_backward.py`.

Neighbouring queries often select the same blocks. A program owns a few neighbouring queries with all heads of a group,
and passes over the blocks that any of them selected: a block is loaded once for all, and each line takes part in those
that its query selected.

Shapes: as in `nsa.py`; D tiles of X queries, U blocks of a tile; M lines of a tile (`nsa_tiles.py`), N keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from rorqual.ops.gpu.nsa_tiles import LOG2_E, padded, plan, put_attention, take_in, vectors


class Tiles(NamedTuple):
    """Blocks that X neighbouring queries select: their numbers [R, D, G, U], ascending; which of the queries selected
    each, as bits; and how many there are [R, D, G]. All int32."""

    blocks: Tensor
    members: Tensor
    number: Tensor


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


@triton.jit  # type: ignore[untyped-decorator]
def tile_lines(
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
def block_keys(
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
    member, query, at, there = tile_lines(num_queries, num_groups, SHARING, QUERIES, LINES)
    position = tl.load(start + tl.program_id(2)) + query
    tile = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * num_groups + tl.program_id(1)
    q_tile = vectors(q, at, there, WIDTH, PADDED, True)
    highest = tl.full([LINES], -float("inf"), tl.float32)
    total = tl.zeros([LINES], tl.float32)
    weighted = tl.zeros([LINES, PADDED], tl.float32)
    for step in range(tl.load(count + tile) * PIECES):
        key_at, key_there, seen = block_keys(
            step, blocks, members, tile, most, selected_length, num_keys, num_groups, member, position, KEYS, PIECES
        )
        k_tile = vectors(k, key_at, key_there, WIDTH, PADDED, True)
        v_tile = vectors(v, key_at, key_there, WIDTH, PADDED, True)
        highest, total, weighted = take_in(q_tile, k_tile, v_tile, seen, highest, total, weighted, scale_log2, True)
    put_attention(out, log_sum, at, there, highest, total, weighted, WIDTH, PADDED)


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
