"""Exact top-k selection for a CPU, as loops for one core; the torch twin is `dsa.select`.

A score becomes an unsigned integer that is ordered alike ("rank"): 0 for a key that may not be seen, and the least
number above for -inf and NaN. Of long rows the largest rank in every run of a few neighbours is taken first: the k-th
largest of those bounds the k-th largest of all from below, so that few keys are left to be looked at one by one.

Shapes: X queries of a tile, I index heads, K keys, N keys of one block, S selected keys.
"""

from __future__ import annotations

import numpy as np

from rorqual.ops.cpu.compiled import compiled, inlined

BINS = 2048
"""Of one pass of the radix search: 11 of 32 bits."""


LARGEST = np.int32(0x7F7FFFFF)
"""The bits of the largest float32."""

INFINITY = np.int32(0x7F800000)
"""The bits of infinity; those of a NaN are more."""


@compiled
def rank_scores(
    products_XIN: np.ndarray,
    weight_XI: np.ndarray,
    valid_K: np.ndarray,
    last_X: np.ndarray,
    first: int,
    total_N: np.ndarray,
    rank_XK: np.ndarray,
) -> None:
    """`rank(sum_j w[j] ReLU(product[j]))` of the keys from `first` on. valid_K: empty where all keys are valid."""
    num_queries, num_heads, width = products_XIN.shape
    zero = np.float32(0.0)
    for x in range(num_queries):
        count = min(width, last_X[x] + 1 - first)
        total = total_N[: max(count, 0)]
        total[:] = zero
        for head in range(num_heads):
            weight, products = weight_XI[x, head], products_XIN[x, head]
            for n in range(count):
                total[n] += weight * (zero if products[n] < zero else products[n])
        rank, bits = rank_XK[x, first : first + width], total.view(np.int32)
        for n in range(count):
            rank[n] = to_rank(bits[n])
        for n in range(max(count, 0), width):
            rank[n] = np.uint32(0)
        if len(valid_K):
            for n in range(count):
                if not valid_K[first + n]:
                    rank[n] = np.uint32(0)


@inlined
def to_rank(bits: np.int32) -> np.uint32:
    """Of a float32 by its bits. Equal for 0 and -0; the infinities rank as the largest numbers, NaN as the least."""
    size = bits & np.int32(0x7FFFFFFF)
    held = min(size, LARGEST)
    signed = -held if (bits < 0) | (size > INFINITY) else held
    return np.uint32(signed) ^ np.uint32(0x80000000)


@compiled
def select_rows(rank_XK: np.ndarray, last_X: np.ndarray, top_k: int, selected_XS: np.ndarray) -> None:
    """The `top_k` keys of highest rank in each row, of equal ones the first, in ascending order; -1 behind them."""
    num_keys = rank_XK.shape[1]
    place_K, rank_K = np.empty(num_keys, dtype=np.int64), np.empty(num_keys, dtype=np.uint32)
    bins = np.empty(BINS, dtype=np.int64)
    for x in range(len(rank_XK)):
        seen = min(num_keys, last_X[x] + 1)
        count = _candidates(rank_XK[x, : max(seen, 0)], top_k, bins, place_K, rank_K)
        least, room = np.uint32(0), top_k
        if count > top_k:
            least, room = kth_largest(rank_K[:count], top_k, bins)
        taken = 0
        for c in range(count):
            rank = rank_K[c]
            if rank > least:
                selected_XS[x, taken] = place_K[c]
                taken += 1
            elif rank == least and room > 0 and rank > 0:
                selected_XS[x, taken] = place_K[c]
                taken += 1
                room -= 1
        selected_XS[x, taken:] = -1


@compiled
def _candidates(rank_K: np.ndarray, top_k: int, bins: np.ndarray, place_K: np.ndarray, kept_K: np.ndarray) -> int:
    """Keys that may be among the `top_k`, in ascending order, and how many: all, or those above a lower bound."""
    num_keys, count = len(rank_K), 0
    run = 16
    while run > 1 and num_keys // run < 2 * top_k:
        run //= 2
    if run == 1:
        for k in range(num_keys):
            if rank_K[k] > 0:
                place_K[count], kept_K[count] = k, rank_K[k]
                count += 1
        return count
    num_runs = -(-num_keys // run)
    highest = kept_K[-num_runs:]
    for i in range(num_runs):
        best = np.uint32(0)
        for k in range(i * run, min(num_keys, (i + 1) * run)):
            best = max(best, rank_K[k])
        highest[i] = best
    bound, _ = kth_largest(highest, top_k, bins)
    bound = max(bound, np.uint32(1))
    for i in range(num_runs):  # What is kept never overtakes the run maxima that are still to be read.
        if highest[i] >= bound:
            for k in range(i * run, min(num_keys, (i + 1) * run)):
                if rank_K[k] >= bound:
                    place_K[count], kept_K[count] = k, rank_K[k]
                    count += 1
    return count


@compiled
def kth_largest(rank_K: np.ndarray, k: int, bins: np.ndarray) -> tuple[np.uint32, int]:
    """The k-th largest number, and how many equal to it are among the first k: 11 bits at a time, from the top."""
    prefix, mask, room = np.uint32(0), np.uint32(0), k
    for shift in (21, 10, 0):
        bits = np.uint32(2047) if shift else np.uint32(1023)
        bins[:] = 0
        for i in range(len(rank_K)):
            if rank_K[i] & mask == prefix:
                bins[(rank_K[i] >> np.uint32(shift)) & bits] += 1
        digit = int(bits)
        while bins[digit] < room:
            room -= bins[digit]
            digit -= 1
        prefix |= np.uint32(digit) << np.uint32(shift)
        mask |= bits << np.uint32(shift)
    return prefix, room
