"""Gradients of attention over a span of keys in Triton: the compressed branch and the window.

A program owns a tile of queries and passes over keys, or a tile of keys and passes over queries; none adds to what
another owns.

Shapes: as in `nsa_span.py`; C parts of the queries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.ops.gpu.nsa_span import Span, is_seen, key_tiles, lines_of
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

PROGRAMS = 2048
"""Programs wanted for the gradients of keys: few compressed keys are seen by very many queries, which are then cut into
parts whose sums are added in order."""

LEAST_PART = 256
"""Fewest queries of a part."""

MOST_PARTS = 16


@triton.jit  # type: ignore[untyped-decorator]
def _query_step(
    q_tile: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    first_key: tl.tensor,
    position: tl.tensor,
    grad_out: tl.tensor,
    log: tl.tensor,
    gate: tl.tensor,
    mean: tl.tensor,
    grad_q: tl.tensor,
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
) -> tl.tensor:
    key = first_key + tl.arange(0, KEYS)
    at = (tl.program_id(2).to(tl.int64) * num_keys + key) * num_groups + tl.program_id(1)
    k_tile = vectors(k, at, key < num_keys, WIDTH, PADDED, CHECKED)
    v_tile = vectors(v, at, key < num_keys, WIDTH, PADDED, CHECKED)
    seen = is_seen(key[None], position[:, None], num_keys, length, stride, window, WINDOWED)
    return query_gradient(q_tile, k_tile, v_tile, seen, grad_out, log, gate, mean, grad_q, scale_log2, CHECKED)


@triton.jit  # type: ignore[untyped-decorator]
def _query_backward(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    start: tl.tensor,
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
    length: tl.tensor,
    stride: tl.tensor,
    window: tl.tensor,
    SHARING: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    LINES: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
    BRANCH: tl.constexpr,
) -> None:
    """Adds the branch's gradient of a tile of lines to `grad_q`, float32 [R, Q, H, E]."""
    first_line = (tl.num_programs(0) - 1 - tl.program_id(0)) * LINES
    query, at, there = lines_of(first_line, num_queries, num_groups, SHARING, LINES)
    row_start = tl.load(start + tl.program_id(2))
    position = row_start + query
    last_query = tl.minimum((first_line + LINES - 1) // SHARING, num_queries - 1)
    begin, all_begin, all_end, end = key_tiles(
        row_start + first_line // SHARING, row_start + last_query, num_keys, length, stride, window, WINDOWED, KEYS
    )
    q_tile = vectors(q, at, there, WIDTH, PADDED, True)
    grad_tile = vectors(grad_out, at, there, WIDTH, PADDED, True)
    log, gate, mean = line_scalars(log_sum, gates, grad_gates, at, there, BRANCH)
    total = tl.zeros([LINES, PADDED], tl.float32)
    if WINDOWED:
        for key in range(begin, tl.minimum(all_begin, end), KEYS):
            total = _query_step(
                q_tile, k, v, key, position, grad_tile, log, gate, mean, total, scale_log2, num_keys, num_groups,
                length, stride, window, WIDTH, PADDED, KEYS, WINDOWED, True
            )  # fmt: skip
    for key in range(all_begin, all_end, KEYS):
        total = _query_step(
            q_tile, k, v, key, position, grad_tile, log, gate, mean, total, scale_log2, num_keys, num_groups,
            length, stride, window, WIDTH, PADDED, KEYS, WINDOWED, False
        )  # fmt: skip
    for key in range(tl.maximum(all_begin, all_end), end, KEYS):
        total = _query_step(
            q_tile, k, v, key, position, grad_tile, log, gate, mean, total, scale_log2, num_keys, num_groups,
            length, stride, window, WIDTH, PADDED, KEYS, WINDOWED, True
        )  # fmt: skip
    before = vectors(grad_q, at, there, WIDTH, PADDED, True)
    put_vectors(grad_q, at, there, before + total * scale, WIDTH, PADDED)


@triton.jit  # type: ignore[untyped-decorator]
def _key_step(
    q: tl.tensor,
    k_tile: tl.tensor,
    v_tile: tl.tensor,
    log_sum: tl.tensor,
    grad_out: tl.tensor,
    gates: tl.tensor,
    grad_gates: tl.tensor,
    key: tl.tensor,
    first_line: tl.tensor,
    row_start: tl.tensor,
    grad_k: tl.tensor,
    grad_v: tl.tensor,
    scale_log2: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    num_groups: tl.tensor,
    length: tl.tensor,
    stride: tl.tensor,
    window: tl.tensor,
    end_query: tl.tensor,
    SHARING: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    LINES: tl.constexpr,
    WINDOWED: tl.constexpr,
    BRANCH: tl.constexpr,
    CHECKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    query, at, there = lines_of(first_line, num_queries, num_groups, SHARING, LINES)
    there = there & (query < end_query)
    q_tile = vectors(q, at, there, WIDTH, PADDED, CHECKED)
    grad_tile = vectors(grad_out, at, there, WIDTH, PADDED, CHECKED)
    log, gate, mean = line_scalars(log_sum, gates, grad_gates, at, there, BRANCH)
    seen = is_seen(key[:, None], (row_start + query)[None], num_keys, length, stride, window, WINDOWED)
    return key_gradients(q_tile, k_tile, v_tile, seen, grad_tile, log, gate, mean, grad_k, grad_v, scale_log2, CHECKED)


@triton.jit  # type: ignore[untyped-decorator]
def _key_backward(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    start: tl.tensor,
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
    length: tl.tensor,
    stride: tl.tensor,
    window: tl.tensor,
    num_parts: tl.tensor,
    part_queries: tl.tensor,
    SHARING: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    LINES: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
    BRANCH: tl.constexpr,
) -> None:
    """Writes the gradients of a tile of keys and values from one part of the queries, [C, R, K, G, E]."""
    part = tl.program_id(0) % num_parts
    first_key = tl.program_id(0) // num_parts * KEYS
    row = tl.program_id(2).to(tl.int64)
    key = first_key + tl.arange(0, KEYS)
    last_key = tl.minimum(first_key + KEYS, num_keys) - 1
    at = (row * num_keys + key) * num_groups + tl.program_id(1)
    k_tile = vectors(k, at, key < num_keys, WIDTH, PADDED, True)
    v_tile = vectors(v, at, key < num_keys, WIDTH, PADDED, True)
    row_start = tl.load(start + row)

    # Queries that see a key of the tile, and those that see all.
    part_end = tl.minimum((part + 1) * part_queries, num_queries)
    begin = tl.maximum(first_key * stride + length - 1 - row_start, part * part_queries)
    all_begin = tl.maximum(last_key * stride + length - 1 - row_start, begin)
    end = part_end
    all_end = part_end
    if WINDOWED:
        end = tl.minimum(part_end, (last_key + window) * stride + length - 1 - row_start)
        all_end = tl.minimum(part_end, (first_key + window) * stride + length - 1 - row_start)

    line, line_end = begin * SHARING, tl.maximum(begin, end) * SHARING
    all_line = line + ((all_begin - begin) * SHARING + LINES - 1) // LINES * LINES
    all_line_end = all_line + tl.maximum(all_end * SHARING - all_line, 0) // LINES * LINES
    grad_k_tile = tl.zeros([KEYS, PADDED], tl.float32)
    grad_v_tile = tl.zeros([KEYS, PADDED], tl.float32)
    for at_line in range(line, tl.minimum(all_line, line_end), LINES):
        grad_k_tile, grad_v_tile = _key_step(
            q, k_tile, v_tile, log_sum, grad_out, gates, grad_gates, key, at_line, row_start, grad_k_tile, grad_v_tile,
            scale_log2, num_queries, num_keys, num_groups, length, stride, window, end, SHARING, WIDTH, PADDED, LINES,
            WINDOWED, BRANCH, True
        )  # fmt: skip
    for at_line in range(all_line, all_line_end, LINES):
        grad_k_tile, grad_v_tile = _key_step(
            q, k_tile, v_tile, log_sum, grad_out, gates, grad_gates, key, at_line, row_start, grad_k_tile, grad_v_tile,
            scale_log2, num_queries, num_keys, num_groups, length, stride, window, end, SHARING, WIDTH, PADDED, LINES,
            WINDOWED, BRANCH, False
        )  # fmt: skip
    for at_line in range(all_line_end, line_end, LINES):
        grad_k_tile, grad_v_tile = _key_step(
            q, k_tile, v_tile, log_sum, grad_out, gates, grad_gates, key, at_line, row_start, grad_k_tile, grad_v_tile,
            scale_log2, num_queries, num_keys, num_groups, length, stride, window, end, SHARING, WIDTH, PADDED, LINES,
            WINDOWED, BRANCH, True
        )  # fmt: skip
    at += part.to(tl.int64) * tl.num_programs(2) * num_keys * num_groups
    put_vectors(grad_k, at, key < num_keys, grad_k_tile * scale, WIDTH, PADDED)
    put_vectors(grad_v, at, key < num_keys, grad_v_tile, WIDTH, PADDED)


def backward(
    q_RQHE: Tensor,
    kv: tuple[Tensor, Tensor],
    start_R: Tensor,
    log_sum_RQH: Tensor,
    upstream: Upstream,
    grad_q_RQHE: Tensor,
    span: Span,
    scale: float,
    branch: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of keys and values [R, K, G, E]; that of the queries is added to `grad_q_RQHE`, float32."""
    if kv[0].numel() == 0:  # No block is complete.
        return torch.zeros_like(kv[0]), torch.zeros_like(kv[1])
    (num_rows, num_queries, num_heads, width), (num_keys, groups) = q_RQHE.shape, kv[0].shape[1:3]
    tiles, sharing = plan(q_RQHE), num_heads // groups
    sizes = {"SHARING": sharing, "WIDTH": width, "PADDED": padded(width), "WINDOWED": span.window > 0, "BRANCH": branch}
    numbers = (scale, scale * LOG2_E, num_queries, num_keys, groups, *span)
    tile = tiles.query_backward
    _query_backward[(triton.cdiv(num_queries * sharing, tile.lines), groups, num_rows)](
        q_RQHE,
        *kv,
        start_R,
        log_sum_RQH,
        *upstream,
        grad_q_RQHE,
        *numbers,
        LINES=tile.lines,
        KEYS=tile.keys,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **sizes,
    )
    tile = tiles.key_backward
    key_tiles = triton.cdiv(num_keys, tile.keys)
    wanted = min(MOST_PARTS, triton.cdiv(PROGRAMS, key_tiles * groups * num_rows), num_queries // LEAST_PART)
    part_queries = triton.cdiv(num_queries, max(1, wanted))
    parts = triton.cdiv(num_queries, part_queries)
    dtype = q_RQHE.dtype if parts == 1 else torch.float32
    grad_k, grad_v = (kv[0].new_empty(parts, *kv[0].shape, dtype=dtype) for _ in range(2))
    _key_backward[(key_tiles * parts, groups, num_rows)](
        q_RQHE,
        *kv,
        start_R,
        log_sum_RQH,
        *upstream,
        grad_k,
        grad_v,
        *numbers,
        parts,
        part_queries,
        LINES=tile.lines,
        KEYS=tile.keys,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **sizes,
    )
    if parts == 1:
        return grad_k[0], grad_v[0]
    return grad_k.sum(dim=0).to(q_RQHE.dtype), grad_v.sum(dim=0).to(q_RQHE.dtype)
