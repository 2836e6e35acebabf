"""Attention over a span of keys in Triton: the compressed branch and the window; its gradients are in
`nsa_span_backward.py`.

In both a query sees consecutive keys. Key i is whole from position `i * stride + length - 1` on, and is left behind
when `window` later ones are whole. Compressed blocks have the paper's length and stride and no window; tokens have
length and stride 1. Tiles of keys that all lines of a tile see are taken without a mask.

Shapes: as in `nsa.py`, K keys of the branch, B blocks or tokens; M lines of a tile (`nsa_tiles.py`), N keys of a
tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.ops.gpu.nsa_tiles import LOG2_E, padded, plan, put_attention, take_in, vectors


class Span(NamedTuple):
    """Which keys a query sees; `window` 0 is none."""

    length: int
    stride: int
    window: int


@triton.jit  # type: ignore[untyped-decorator]
def whole_keys(position: tl.tensor, length: tl.tensor, stride: tl.tensor) -> tl.tensor:
    """How many keys are whole at a position, were there no end to them."""
    return tl.maximum(position + 1 - length + stride, 0) // stride


@triton.jit  # type: ignore[untyped-decorator]
def key_tiles(
    first: tl.tensor,
    last: tl.tensor,
    num_keys: tl.tensor,
    length: tl.tensor,
    stride: tl.tensor,
    window: tl.tensor,
    WINDOWED: tl.constexpr,
    KEYS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """For queries at positions first to last: where keys that any sees begin, those that all see begin and end, and
    where those that any sees end. All but the last are multiples of KEYS."""
    end = tl.minimum(whole_keys(last, length, stride), num_keys)
    all_end = tl.minimum(whole_keys(first, length, stride), num_keys) // KEYS * KEYS
    begin = end * 0
    all_begin = begin
    if WINDOWED:
        begin = tl.maximum(whole_keys(first, length, stride) - window, 0) // KEYS * KEYS
        all_begin = (tl.maximum(whole_keys(last, length, stride) - window, 0) + KEYS - 1) // KEYS * KEYS
    return begin, all_begin, all_end, end


@triton.jit  # type: ignore[untyped-decorator]
def is_seen(
    key: tl.tensor,
    position: tl.tensor,
    num_keys: tl.tensor,
    length: tl.tensor,
    stride: tl.tensor,
    window: tl.tensor,
    WINDOWED: tl.constexpr,
) -> tl.tensor:
    """Shapes that broadcast."""
    whole = whole_keys(position, length, stride)
    seen = (key < whole) & (key < num_keys)
    return seen & (key >= whole - window) if WINDOWED else seen


@triton.jit  # type: ignore[untyped-decorator]
def lines_of(
    first_line: tl.tensor, num_queries: tl.tensor, num_groups: tl.tensor, SHARING: tl.constexpr, LINES: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Query, place in [R, Q, H], and whether it is there, of the lines from `first_line` on of this program's row and
    group."""
    line = first_line + tl.arange(0, LINES)
    query = line // SHARING
    at = (tl.program_id(2).to(tl.int64) * num_queries + query) * (num_groups * SHARING)
    return query, at + tl.program_id(1) * SHARING + line % SHARING, query < num_queries


@triton.jit  # type: ignore[untyped-decorator]
def _attend(
    q_tile: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    first_key: tl.tensor,
    position: tl.tensor,
    highest: tl.tensor,
    total: tl.tensor,
    weighted: tl.tensor,
    scale_log2: tl.tensor,
    num_keys: tl.tensor,
    num_groups: tl.tensor,
    length: tl.tensor,
    stride: tl.tensor,
    window: tl.tensor,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
    CHECKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    key = first_key + tl.arange(0, KEYS)
    at = (tl.program_id(2).to(tl.int64) * num_keys + key) * num_groups + tl.program_id(1)
    k_tile = vectors(k, at, key < num_keys, WIDTH, PADDED, CHECKED)
    v_tile = vectors(v, at, key < num_keys, WIDTH, PADDED, CHECKED)
    seen = is_seen(key[None], position[:, None], num_keys, length, stride, window, WINDOWED)
    return take_in(q_tile, k_tile, v_tile, seen, highest, total, weighted, scale_log2, CHECKED)


@triton.jit  # type: ignore[untyped-decorator]
def _forward(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    start: tl.tensor,
    out: tl.tensor,
    log_sum: tl.tensor,
    scale_log2: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    num_groups: tl.tensor,
    length: tl.tensor,
    stride: tl.tensor,
    window: tl.tensor,
    SHARING: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    LINES: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
) -> None:
    """Writes the attention of a tile of lines [R, Q, H, E] and log2 of the sums of its softmax [R, Q, H]. The last
    lines, which see most, go first."""
    first_line = (tl.num_programs(0) - 1 - tl.program_id(0)) * LINES
    query, at, there = lines_of(first_line, num_queries, num_groups, SHARING, LINES)
    row_start = tl.load(start + tl.program_id(2))
    position = row_start + query
    last_query = tl.minimum((first_line + LINES - 1) // SHARING, num_queries - 1)
    begin, all_begin, all_end, end = key_tiles(
        row_start + first_line // SHARING, row_start + last_query, num_keys, length, stride, window, WINDOWED, KEYS
    )
    q_tile = vectors(q, at, there, WIDTH, PADDED, True)
    highest = tl.full([LINES], -float("inf"), tl.float32)
    total = tl.zeros([LINES], tl.float32)
    weighted = tl.zeros([LINES, PADDED], tl.float32)
    if WINDOWED:
        for key in range(begin, tl.minimum(all_begin, end), KEYS):
            highest, total, weighted = _attend(
                q_tile, k, v, key, position, highest, total, weighted, scale_log2, num_keys, num_groups,
                length, stride, window, WIDTH, PADDED, KEYS, WINDOWED, True
            )  # fmt: skip
    for key in range(all_begin, all_end, KEYS):
        highest, total, weighted = _attend(
            q_tile, k, v, key, position, highest, total, weighted, scale_log2, num_keys, num_groups,
            length, stride, window, WIDTH, PADDED, KEYS, WINDOWED, False
        )  # fmt: skip
    for key in range(tl.maximum(all_begin, all_end), end, KEYS):
        highest, total, weighted = _attend(
            q_tile, k, v, key, position, highest, total, weighted, scale_log2, num_keys, num_groups,
            length, stride, window, WIDTH, PADDED, KEYS, WINDOWED, True
        )  # fmt: skip
    put_attention(out, log_sum, at, there, highest, total, weighted, WIDTH, PADDED)


def forward(
    q_RQHE: Tensor, kv: tuple[Tensor, Tensor], start_R: Tensor, span: Span, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention [R, Q, H, E], 0 for queries that see no key, and log2 of the sums of its softmax [R, Q, H], in float32.

    All are contiguous; start_R: int32, the positions of the rows' first queries.
    """
    (num_rows, num_queries, num_heads, width), (num_keys, groups) = q_RQHE.shape, kv[0].shape[1:3]
    tile, sharing = plan(q_RQHE).forward, num_heads // groups
    out_RQHE = torch.empty_like(q_RQHE)
    log_sum_RQH = q_RQHE.new_empty(q_RQHE.shape[:3], dtype=torch.float32)
    _forward[(triton.cdiv(num_queries * sharing, tile.lines), groups, num_rows)](
        q_RQHE,
        *kv,
        start_R,
        out_RQHE,
        log_sum_RQH,
        scale * LOG2_E,
        num_queries,
        num_keys,
        groups,
        *span,
        SHARING=sharing,
        WIDTH=width,
        PADDED=padded(width),
        LINES=tile.lines,
        KEYS=tile.keys,
        WINDOWED=span.window > 0,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out_RQHE, log_sum_RQH
