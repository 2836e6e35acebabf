"""The choice of blocks in Triton: importance, a tile of queries at a time, and the selection of the highest.

Weights of the compressed branch are made a second time, from the sums of its softmax, without gradient. A compressed
block counts for a block by the strides that both share (equation 9): where that is `c(o)` for the compressed block
number `l'/d * j + o`, each `o` is a product of queries with every `l'/d`-th compressed key, so that nothing is folded
afterwards. Importance lies in a scratch of bounded size and is read once.

Shapes: as in `nsa.py`; X queries of a chunk or a program, M lines of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.ops.gpu.nsa_span import whole_keys
from rorqual.ops.gpu.nsa_tiles import LOG2_E, padded, plan, vectors
from rorqual.ops.gpu.numbers import product
from rorqual.ops.nsa import BlockSizes

SCRATCH_ELEMENTS = 1 << 26
"""Most numbers of the importance of a chunk of queries: 256 MB in float32."""

NONE = tl.constexpr(-1)
HIGHEST = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit  # type: ignore[untyped-decorator]
def _importance(
    q: tl.tensor,
    k: tl.tensor,
    start: tl.tensor,
    log_sum: tl.tensor,
    out: tl.tensor,
    scale_log2: tl.tensor,
    first_query: tl.tensor,
    chunk_queries: tl.tensor,
    num_queries: tl.tensor,
    num_compressed: tl.tensor,
    num_blocks: tl.tensor,
    num_groups: tl.tensor,
    length: tl.tensor,
    stride: tl.tensor,
    selected_length: tl.tensor,
    SHARING: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Writes the importance of BLOCKS blocks for QUERIES queries of a chunk, [R, X, G, N]; none of blocks that no
    query of the tile may select. HEADS is SHARING, padded."""
    block_tiles = (num_blocks + BLOCKS - 1) // BLOCKS
    in_chunk = tl.program_id(0) // block_tiles * QUERIES
    first_block = tl.program_id(0) % block_tiles * BLOCKS
    group, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row_start = tl.load(start + row)
    last_query = first_query + tl.minimum(in_chunk + QUERIES, chunk_queries) - 1
    if first_block * selected_length > row_start + last_query:
        return
    line = tl.arange(0, QUERIES * HEADS)
    query, head = first_query + in_chunk + line // HEADS, line % HEADS
    there = (query <= last_query) & (head < SHARING)
    at = (row * num_queries + query) * (num_groups * SHARING) + group * SHARING + head
    q_tile = vectors(q, at, there, WIDTH, PADDED, True)
    log = tl.load(log_sum + at, mask=there, other=float("inf"))
    whole = tl.minimum(whole_keys(row_start + query, length, stride), num_compressed)

    block = first_block + tl.arange(0, BLOCKS)
    per_selected, per_compressed = selected_length // stride, length // stride
    total = tl.zeros([QUERIES * HEADS, BLOCKS], tl.float32)
    for shift in range(per_selected + per_compressed - 1):
        least = tl.minimum(shift, per_selected + per_compressed - 2 - shift)
        count = tl.minimum(least, tl.minimum(per_selected, per_compressed) - 1) + 1
        key = block * per_selected + per_selected - 1 - shift
        exists = (key >= 0) & (key < num_compressed)
        k_tile = vectors(k, (row * num_compressed + key) * num_groups + group, exists, WIDTH, PADDED, True)
        scores = product(q_tile, tl.trans(k_tile), tl.zeros([QUERIES * HEADS, BLOCKS], tl.float32)) * scale_log2
        weights = tl.exp2(scores - log[:, None]) * count.to(tl.float32)
        total += tl.where((key >= 0)[None] & (key[None] < whole[:, None]), weights, 0.0)
    of_queries = tl.sum(tl.reshape(total, [QUERIES, HEADS, BLOCKS]), axis=1)

    mine = in_chunk + tl.arange(0, QUERIES)
    place = ((row * chunk_queries + mine) * num_groups + group).to(tl.int64)[:, None] * num_blocks + block[None]
    tl.store(out + place, of_queries, mask=(mine < chunk_queries)[:, None] & (block < num_blocks)[None])


@triton.jit  # type: ignore[untyped-decorator]
def _select(
    importance: tl.tensor,
    start: tl.tensor,
    out: tl.tensor,
    first_query: tl.tensor,
    chunk_queries: tl.tensor,
    num_queries: tl.tensor,
    num_blocks: tl.tensor,
    num_groups: tl.tensor,
    selected_length: tl.tensor,
    num_initial: tl.tensor,
    num_local: tl.tensor,
    num_selected: tl.tensor,
    PADDED_BLOCKS: tl.constexpr,
    SELECTIONS: tl.constexpr,
) -> None:
    """Writes the blocks, ascending, of SELECTIONS pairs of a query and a group; `out` [R, Q, G, S] holds -1.

    A block's rank is one integer: its score's bits, which order as numbers that are not negative do, above its number
    counted from the end. Ranks are distinct, so that the n highest are those from the n-th on.
    """
    pair = tl.program_id(0) * SELECTIONS + tl.arange(0, SELECTIONS)
    row = tl.program_id(1).to(tl.int64)
    own = ((tl.load(start + row) + first_query + pair // num_groups) // selected_length)[:, None]
    block = tl.arange(0, PADDED_BLOCKS)[None]
    visible = (block < num_blocks) & (block <= own) & (pair < chunk_queries * num_groups)[:, None]
    forced = (block < num_initial) | (block > own - num_local)
    place = (row * chunk_queries * num_groups + pair)[:, None] * num_blocks + block
    score = tl.load(importance + place, mask=visible & (forced == 0), other=float("inf"))
    bits = tl.where(score == score, score.to(tl.int32, bitcast=True).to(tl.int64) + 1, 0)
    rank = tl.where(visible, (bits << 31) | (PADDED_BLOCKS - 1 - block).to(tl.int64), NONE)
    lowest = tl.zeros([SELECTIONS], tl.int64)
    if tl.max(own) >= num_selected:
        lowest += HIGHEST
        for _ in range(num_selected):
            lowest = tl.max(tl.where(rank < lowest[:, None], rank, NONE), axis=1)
    chosen = visible & (rank >= lowest[:, None])
    slot = tl.cumsum(chosen.to(tl.int32), axis=1) - 1
    to = ((row * num_queries + first_query) * num_groups + pair)[:, None] * num_selected + slot
    tl.store(out + to, block + slot * 0, mask=chosen)


def choose_blocks(
    q_RQHE: Tensor,
    k_RBGE: Tensor,
    start_R: Tensor,
    log_sum_RQH: Tensor,
    num_keys: int,
    sizes: BlockSizes,
    scale: float,
) -> Tensor:
    """The blocks that each query's groups read, as `nsa.select_blocks` has them: int32 [R, Q, G, S]."""
    (num_rows, num_queries, num_heads, width), (num_compressed, groups) = q_RQHE.shape, k_RBGE.shape[1:3]
    num_blocks, heads = triton.cdiv(num_keys, sizes.selected_length), triton.next_power_of_2(num_heads // groups)
    num_selected, padded_blocks = min(sizes.num_selected, num_blocks), triton.next_power_of_2(num_blocks)
    blocks_RQGS = start_R.new_full((num_rows, num_queries, groups, num_selected), -1)
    tile = plan(q_RQHE).forward
    queries = max(1, tile.lines // heads, 16 // heads)
    width_X = max(queries, min(num_queries, SCRATCH_ELEMENTS // (num_rows * groups * num_blocks)))
    selections = min(128, max(1, 4096 // padded_blocks))
    scratch_RXGN = q_RQHE.new_empty(num_rows * width_X * groups * num_blocks, dtype=torch.float32)
    for first in range(0, num_queries, width_X):
        count = min(width_X, num_queries - first)
        grid = (triton.cdiv(count, queries) * triton.cdiv(num_blocks, tile.keys), groups, num_rows)
        _importance[grid](
            q_RQHE,
            k_RBGE,
            start_R,
            log_sum_RQH,
            scratch_RXGN,
            scale * LOG2_E,
            first,
            count,
            num_queries,
            num_compressed,
            num_blocks,
            groups,
            sizes.length,
            sizes.stride,
            sizes.selected_length,
            SHARING=num_heads // groups,
            HEADS=heads,
            WIDTH=width,
            PADDED=padded(width),
            QUERIES=queries,
            BLOCKS=tile.keys,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        _select[(triton.cdiv(count * groups, selections), num_rows)](
            scratch_RXGN,
            start_R,
            blocks_RQGS,
            first,
            count,
            num_queries,
            num_blocks,
            groups,
            sizes.selected_length,
            sizes.num_initial,
            sizes.num_local,
            num_selected,
            PADDED_BLOCKS=padded_blocks,
            SELECTIONS=selections,
            num_warps=4 if padded_blocks <= 8192 else 8,
        )
    return blocks_RQGS
