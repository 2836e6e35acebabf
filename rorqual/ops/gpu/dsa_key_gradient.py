"""What keys are owed by the queries that selected them, in Triton: sums in a fixed order, without atomic additions.

The gradient of a key is a sum over the queries that selected it, anywhere in the row. There are three ways to that sum:

- Add to it from the queries' side, atomically. The order of additions, and with it the result, is chance.
- A program for each key reads all that its queries hold: J(E + V) numbers for 2J(E + V) operations, one operation a
  byte in half precision, where an H100 needs 300. No block of keys helps, since each key has another set of queries.
- A program for each query multiplies its own weights and vectors, [S, J] x [J, E], which is the shape that tensor cores
  like, and writes a part for each of its keys; a program for each key then adds its parts up, in the order of the
  queries. That moves 2(E + V) numbers a pair instead of J(E + V), and is what is done here.

Of 128 heads of 576 and 512 numbers, a pair costs 279 thousand operations and 4.4 kB, or 64 operations a byte: memory,
not arithmetic, sets the pace of this part. Few heads to a group fare worse, 8 a byte with 16 heads of 128; only with
one head to a group would a program for each key move less, half as much.

The list of a key's pairs is a tile's selection sorted by key; the sort is stable, so that queries ascend. Parts are
kept in the dtype of the inputs, totals in float32.

Shapes: as in `dsa.py`; X queries of a tile, W = E or V numbers of a vector, L lists of pairs, N pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.ops.gpu.dsa_forward import padded
from rorqual.ops.gpu.numbers import product, rounded


class PairBlocks(NamedTuple):
    """Heads and keys of a block of pairs, and the length of a step along what is summed over."""

    heads: int
    keys: int
    step: int
    warps: int


def pair_blocks(sharing: int, dtype: torch.dtype) -> PairBlocks:
    """128 x 128 in half precision; float32 is multiplied outside tensor cores, from registers, in smaller blocks.

    sharing: heads that share keys.
    """
    if dtype == torch.float32:
        return PairBlocks(min(32, padded(sharing)), 32, 32, 4)
    return PairBlocks(min(128, padded(sharing)), 128, 64, 8 if sharing > 32 else 4)


def column_chunk(width: int, blocks: PairBlocks) -> int:
    """Columns of a block: of 128 to 16 the largest that pads `width` least, and no more than the block has keys."""
    choices = (size for size in (128, 64, 32, 16) if size <= blocks.keys)
    return min(choices, key=lambda size: (int(triton.cdiv(width, size)) * size, -size))


@triton.jit(do_not_specialize=["first_query", "num_queries", "tile_queries"])  # type: ignore[untyped-decorator]
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


def add_to_keys(
    pair_weights_RXHS: Tensor,
    vectors_RQHW: Tensor,
    selected_RQS: Tensor,
    lists: KeyLists,
    totals_RKGW: Tensor,
    parts: Tensor,
    tile: slice,
) -> None:
    """Adds the tile's vectors, queries or gradients of the output, times the weights of their pairs to the totals.

    parts: memory for R * X * S * G * W numbers. `totals_RKGW` is float32.
    """
    num_rows, num_queries, num_heads, width = vectors_RQHW.shape
    num_keys, groups = totals_RKGW.shape[1:3]
    tile_queries, num_selected = tile.stop - tile.start, selected_RQS.shape[-1]
    blocks = pair_blocks(num_heads // groups, vectors_RQHW.dtype)
    chunk = column_chunk(width, blocks)
    programs = num_rows * tile_queries * groups * triton.cdiv(num_selected, blocks.keys) * triton.cdiv(width, chunk)
    _parts[(programs,)](
        pair_weights_RXHS,
        vectors_RQHW,
        selected_RQS,
        parts,
        tile.start,
        num_queries,
        tile_queries,
        num_selected,
        pair_weights_RXHS.shape[-1],
        groups,
        *vectors_RQHW.stride()[:3],
        SHARING=num_heads // groups,
        WIDTH=width,
        CHUNK=chunk,
        HEADS=min(blocks.step, padded(num_heads // groups)),
        KEYS=blocks.keys,
        num_warps=8 if chunk == 128 else 4,
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
