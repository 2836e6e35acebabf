"""One query a row against the cache, as a loop for one core; the torch twin is in `models/attention.py`.

Each row reads its own keys and no more, in the slot where they lie, so nothing is padded, masked or copied. The keys of
a prompt that several rows share are read from one slot for all of them, which then stay in the processor's cache.

Shapes: R rows, H query heads, G key-value heads, E key width, V value width, S slots, C capacity, K keys of the longest
row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rorqual.ops.cpu.compiled import compiled, exp


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
    """out = softmax(scale * q k) v. H / G consecutive heads share keys and values, and take them two by two.

    Of a cached value the first V numbers are read.
    """
    num_groups = k_SCGE.shape[2]
    sharing = q_RHE.shape[1] // num_groups
    scores_2K = np.empty((2, reads.lengths_R.max()), dtype=np.float32)
    out_RHV[:] = np.float32(0.0)
    for r in range(len(q_RHE)):
        own, length = reads.slots_R[r], reads.lengths_R[r]
        shared, split = reads.shared_slots_R[r], reads.shared_lengths_R[r]
        for g in range(num_groups):
            for h in range(g * sharing, (g + 1) * sharing - 1, 2):
                _score_two(q_RHE, r, h, k_SCGE, shared, g, 0, split, scale, scores_2K)
                _score_two(q_RHE, r, h, k_SCGE, own, g, split, length, scale, scores_2K)
                _softmax(scores_2K[0], length)
                _softmax(scores_2K[1], length)
                _mix_two(scores_2K, v_SCGV, shared, g, 0, split, out_RHV, r, h)
                _mix_two(scores_2K, v_SCGV, own, g, split, length, out_RHV, r, h)
            if sharing % 2 == 1:
                h = (g + 1) * sharing - 1
                _score(q_RHE, r, h, k_SCGE, shared, g, 0, split, scale, scores_2K[0])
                _score(q_RHE, r, h, k_SCGE, own, g, split, length, scale, scores_2K[0])
                _softmax(scores_2K[0], length)
                _mix(scores_2K[0], v_SCGV, shared, g, 0, split, out_RHV, r, h)
                _mix(scores_2K[0], v_SCGV, own, g, split, length, out_RHV, r, h)


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
def _score_two(
    q: np.ndarray,
    r: int,
    h: int,
    keys: np.ndarray,
    s: int,
    g: int,
    start: int,
    stop: int,
    scale: float,
    scores_2K: np.ndarray,
) -> None:
    """Heads h and h + 1 against the same keys, four at a time: eight sums that do not wait for one another."""
    width = q.shape[2]
    factor, zero = np.float32(scale), np.float32(0.0)
    whole = start + (stop - start) // 4 * 4
    for k in range(start, whole, 4):
        a0, a1, a2, a3, b0, b1, b2, b3 = zero, zero, zero, zero, zero, zero, zero, zero
        for e in range(width):
            a, b = q[r, h, e], q[r, h + 1, e]
            k0, k1, k2, k3 = keys[s, k, g, e], keys[s, k + 1, g, e], keys[s, k + 2, g, e], keys[s, k + 3, g, e]
            a0, a1, a2, a3 = a0 + a * k0, a1 + a * k1, a2 + a * k2, a3 + a * k3
            b0, b1, b2, b3 = b0 + b * k0, b1 + b * k1, b2 + b * k2, b3 + b * k3
        scores_2K[0, k], scores_2K[0, k + 1], scores_2K[0, k + 2], scores_2K[0, k + 3] = a0, a1, a2, a3
        scores_2K[1, k], scores_2K[1, k + 1], scores_2K[1, k + 2], scores_2K[1, k + 3] = b0, b1, b2, b3
    for k in range(whole, stop):
        a0, b0 = zero, zero
        for e in range(width):
            a0 += q[r, h, e] * keys[s, k, g, e]
            b0 += q[r, h + 1, e] * keys[s, k, g, e]
        scores_2K[0, k], scores_2K[1, k] = a0, b0
    for k in range(start, stop):
        scores_2K[0, k] *= factor
        scores_2K[1, k] *= factor


@compiled
def _mix_two(
    weights_2K: np.ndarray,
    values: np.ndarray,
    s: int,
    g: int,
    start: int,
    stop: int,
    out: np.ndarray,
    r: int,
    h: int,
) -> None:
    """Heads h and h + 1 over the same values."""
    width = out.shape[2]
    whole = start + (stop - start) // 4 * 4
    for k in range(start, whole, 4):
        a0, a1, a2, a3 = weights_2K[0, k], weights_2K[0, k + 1], weights_2K[0, k + 2], weights_2K[0, k + 3]
        b0, b1, b2, b3 = weights_2K[1, k], weights_2K[1, k + 1], weights_2K[1, k + 2], weights_2K[1, k + 3]
        for v in range(width):
            v0, v1, v2, v3 = values[s, k, g, v], values[s, k + 1, g, v], values[s, k + 2, g, v], values[s, k + 3, g, v]
            out[r, h, v] += (a0 * v0 + a1 * v1) + (a2 * v2 + a3 * v3)
            out[r, h + 1, v] += (b0 * v0 + b1 * v1) + (b2 * v2 + b3 * v3)
    for k in range(whole, stop):
        a0, b0 = weights_2K[0, k], weights_2K[1, k]
        for v in range(width):
            out[r, h, v] += a0 * values[s, k, g, v]
            out[r, h + 1, v] += b0 * values[s, k, g, v]


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
