"""DeepSeek Sparse Attention's selection in Triton: an exact top-k with a defined order, repeatable bit by bit.

A program owns a query. It finds the rank of the k-th score, eight bits at a time from the top, by counting the ranks
that begin like it (integers, so that the order of counting is no matter); then it walks over the keys once more and
keeps, in ascending order, those above, and the first of those that equal it.

Shapes: as in `dsa.py`; X queries of a chunk, N keys that a program reads at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.ops.dsa import IndexerOutput
from rorqual.ops.dsa_tiled import select_all
from rorqual.ops.gpu.dsa_score import chunks, readable, tile_of, write_scores

SCAN = 2048
"""Ranks that a program reads at a time."""


@torch.no_grad()
def select_keys(index: IndexerOutput, last_RQ: Tensor, key_valid_RK: Tensor | None, top_k: int) -> Tensor:
    """`dsa.select` of `dsa.index_scores`: int64 [R, Q, min(top_k, K)]. Nothing here is differentiated.

    Raises: ValueError for a `top_k` under 1, and for float64.
    """
    if top_k < 1:
        raise ValueError(f"top_k = {top_k}; at least one key must be selected.")
    (num_rows, num_queries), num_keys = last_RQ.shape, index.k.shape[1]
    if num_keys <= top_k:
        return select_all(last_RQ, num_keys, key_valid_RK)
    everything = readable(index, last_RQ, key_valid_RK)
    selected_RQS = torch.full((num_rows, num_queries, top_k), -1, device=last_RQ.device)
    for chunk in chunks(num_rows, num_queries, num_keys, multiple=tile_of(everything.q)):
        part = everything.rows(chunk.rows)
        rank_RXK = torch.empty(len(part.q), chunk.width, num_keys, dtype=torch.int32, device=last_RQ.device)
        write_scores(part, chunk, rank_RXK)
        with torch.cuda.device_of(rank_RXK):
            _choose_kernel[(len(part.q) * chunk.width,)](
                rank_RXK,
                part.last_RQ,
                selected_RQS[chunk.rows],
                chunk.first,
                chunk.width,
                num_queries,
                num_keys,
                top_k,
                SCAN=SCAN,
                num_warps=8,
            )
    return selected_RQS


@triton.jit  # type: ignore[untyped-decorator]
def _choose_kernel(
    rank_ptr: tl.tensor,
    last_ptr: tl.tensor,
    selected_ptr: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    top_k: tl.tensor,
    SCAN: tl.constexpr,
) -> None:
    """The keys that one query selects. Rank 0 is a hidden key."""
    x = tl.program_id(0).to(tl.int64)
    query = (x // width) * num_queries + first + x % width
    seen = tl.minimum(tl.load(last_ptr + query) + 1, num_keys)
    rank_ptr += x * num_keys
    selected_ptr += query * top_k
    offset_N, bin_B = tl.arange(0, SCAN), tl.arange(0, 256)

    kth = tl.full([], 0, dtype=tl.uint32)
    wanted = top_k + tl.full([], 0, dtype=tl.int32)  # Of the keys whose rank begins like `kth`.
    searched = tl.where(seen > top_k, seen, 0)  # Fewer are all taken: each is above rank 0.
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        count_B = tl.zeros([256], dtype=tl.int32)
        for start in range(0, searched, SCAN):
            key_N = start + offset_N
            rank_N = tl.load(rank_ptr + key_N, mask=key_N < seen, other=0).to(tl.uint32, bitcast=True)
            alike_N = (key_N < seen) & ((rank_N >> shift >> 8) == (kth >> shift >> 8))
            count_B += tl.histogram(((rank_N >> shift) & 255).to(tl.int32), 256, mask=alike_N)
        at_least_B = tl.cumsum(count_B, axis=0, reverse=True)
        digit = tl.maximum(tl.sum((at_least_B >= wanted).to(tl.int32), axis=0) - 1, 0)
        wanted -= tl.sum(tl.where(bin_B > digit, count_B, 0), axis=0)
        kth |= digit.to(tl.uint32) << shift

    taken = tl.full([], 0, dtype=tl.int32)
    equals = tl.full([], 0, dtype=tl.int32)
    for start in range(0, seen, SCAN):
        key_N = start + offset_N
        rank_N = tl.load(rank_ptr + key_N, mask=key_N < seen, other=0).to(tl.uint32, bitcast=True)
        equal_N = ((rank_N == kth) & (rank_N > 0)).to(tl.int32)
        has_room_N = equals + tl.cumsum(equal_N, axis=0) <= wanted
        take_N = ((rank_N > kth) | ((equal_N > 0) & has_room_N)).to(tl.int32)
        place_N = taken + tl.cumsum(take_N, axis=0) - 1
        tl.store(selected_ptr + place_N, key_N.to(tl.int64), mask=take_N > 0)
        taken += tl.sum(take_N, axis=0)
        equals += tl.sum(equal_N, axis=0)
