"""One query a row against the cache, as a loop for one core; the torch twin is in `models/attention.py`.

Each row reads its own keys and no more, in the slot where they lie, so nothing is padded, masked or copied. The keys of
a prompt that several rows share are read from one slot for all of them, which then stay in the processor's cache.

Shapes: R rows, H query heads, G key-value heads, E key width, V value width, S slots, C capacity, K keys of the longest
row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rorqual.ops.compiled import compiled, exp


class RowReads(NamedTuple):
    """Where each row's keys lie: `lengths_R` of them in slot `slots_R`, the new one last; the first `shared_lengths_R`
    also in slot `shared_slots_R`."""

    slots_R: np.ndarray
    lengths_R: np.ndarray
    shared_slots_R: np.ndarray
    shared_lengths_R: np.ndarray


@compiled
def attend_once(
    q_RHE: np.ndarray,
    k_SCGE: np.ndarray,
    v_SCGV: np.ndarray,
    reads: RowReads,
    scale: float,
    out_RHV: np.ndarray,
) -> None:
    """out = softmax(scale * q k) v. H / G consecutive heads share keys and values.

    Of a cached value the first V numbers are read.
    """
    num_rows, num_heads, _ = q_RHE.shape
    value_width = out_RHV.shape[2]
    scores_K = np.empty(reads.lengths_R.max(), dtype=np.float32)
    sharing = num_heads // k_SCGE.shape[2]
    for r in range(num_rows):
        slot, length = reads.slots_R[r], reads.lengths_R[r]
        shared_slot, shared = reads.shared_slots_R[r], reads.shared_lengths_R[r]
        for h in range(num_heads):
            g = h // sharing
            _score(q_RHE, r, h, k_SCGE, shared_slot, g, 0, shared, scale, scores_K)
            _score(q_RHE, r, h, k_SCGE, slot, g, shared, length, scale, scores_K)
            _softmax(scores_K, length)
            for v in range(value_width):
                out_RHV[r, h, v] = np.float32(0.0)
            _mix(scores_K, v_SCGV, shared_slot, g, 0, shared, out_RHV, r, h)
            _mix(scores_K, v_SCGV, slot, g, shared, length, out_RHV, r, h)


@compiled
def attend_next(
    q_RHE: np.ndarray,
    new_k_RGE: np.ndarray,
    new_v_RGE: np.ndarray,
    cos_RE: np.ndarray,
    sin_RE: np.ndarray,
    k_SCGE: np.ndarray,
    v_SCGE: np.ndarray,
    reads: RowReads,
    scale: float,
    out_RHE: np.ndarray,
) -> None:
    """Rotate each row's query and new key, store key and value as the row's last, and attend.

    `q_RHE` is overwritten by the turned queries. `sin` is negative in its first half.
    """
    num_rows, num_heads, width = q_RHE.shape
    half = width // 2
    for r in range(num_rows):
        slot, last = reads.slots_R[r], reads.lengths_R[r] - 1
        for g in range(new_k_RGE.shape[1]):
            for e in range(width):
                v_SCGE[slot, last, g, e] = new_v_RGE[r, g, e]
            for e in range(half):
                first, second = new_k_RGE[r, g, e], new_k_RGE[r, g, e + half]
                k_SCGE[slot, last, g, e] = first * cos_RE[r, e] + second * sin_RE[r, e]
                k_SCGE[slot, last, g, e + half] = second * cos_RE[r, e + half] + first * sin_RE[r, e + half]
        for h in range(num_heads):
            for e in range(half):
                first, second = q_RHE[r, h, e], q_RHE[r, h, e + half]
                q_RHE[r, h, e] = first * cos_RE[r, e] + second * sin_RE[r, e]
                q_RHE[r, h, e + half] = second * cos_RE[r, e + half] + first * sin_RE[r, e + half]
    attend_once(q_RHE, k_SCGE, v_SCGE, reads, scale, out_RHE)


@compiled
def _score(
    q: np.ndarray,
    r: int,
    h: int,
    keys: np.ndarray,
    s: int,
    g: int,
    start: int,
    stop: int,
    scale: float,
    scores_K: np.ndarray,
) -> None:
    """Four keys at a time: four sums that do not wait for one another."""
    width = q.shape[2]
    factor = np.float32(scale)
    whole = start + (stop - start) // 4 * 4
    for k in range(start, whole, 4):
        a, b, c, d = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
        for e in range(width):
            x = q[r, h, e]
            a += x * keys[s, k, g, e]
            b += x * keys[s, k + 1, g, e]
            c += x * keys[s, k + 2, g, e]
            d += x * keys[s, k + 3, g, e]
        scores_K[k], scores_K[k + 1], scores_K[k + 2], scores_K[k + 3] = a * factor, b * factor, c * factor, d * factor
    for k in range(whole, stop):
        total = np.float32(0.0)
        for e in range(width):
            total += q[r, h, e] * keys[s, k, g, e]
        scores_K[k] = total * factor


@compiled
def _softmax(scores_K: np.ndarray, length: int) -> None:
    highest = scores_K[0]
    for k in range(1, length):
        highest = max(highest, scores_K[k])
    total = np.float32(0.0)
    for k in range(length):
        weight = exp(scores_K[k] - highest)
        scores_K[k] = weight
        total += weight
    inverse = np.float32(1.0) / total
    for k in range(length):
        scores_K[k] *= inverse


@compiled
def _mix(
    weights_K: np.ndarray,
    values: np.ndarray,
    s: int,
    g: int,
    start: int,
    stop: int,
    out: np.ndarray,
    r: int,
    h: int,
) -> None:
    width = out.shape[2]
    whole = start + (stop - start) // 4 * 4
    for k in range(start, whole, 4):
        a, b, c, d = weights_K[k], weights_K[k + 1], weights_K[k + 2], weights_K[k + 3]
        for v in range(width):
            out[r, h, v] += (a * values[s, k, g, v] + b * values[s, k + 1, g, v]) + (
                c * values[s, k + 2, g, v] + d * values[s, k + 3, g, v]
            )
    for k in range(whole, stop):
        a = weights_K[k]
        for v in range(width):
            out[r, h, v] += a * values[s, k, g, v]
