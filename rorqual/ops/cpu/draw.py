"""A draw from a whole distribution, as a loop for one core; the torch twin is in `engines/sampling.py`.

Shapes: R rows, V vocabulary, M chunks of the vocabulary.
"""

from __future__ import annotations

import numpy as np

from rorqual.ops.cpu.compiled import compiled, exp

CHUNK = 256


@compiled
def draw_whole(
    logits_RV: np.ndarray,
    highest_R: np.ndarray,
    scale_R: np.ndarray,
    uniform_R: np.ndarray,
    token_R: np.ndarray,
    logprob_R: np.ndarray,
    entropy_R: np.ndarray,
) -> None:
    """One token a row, where the cumulative weight passes `uniform` (float64, [0, 1)) times the total.

    Also its log-prob and the entropy, in nats. highest: the row's largest logit; scale: 1 / temperature. A row that
    holds NaN gets the log-prob NaN.
    """
    num_rows, vocabulary = logits_RV.shape
    num_chunks = (vocabulary + CHUNK - 1) // CHUNK
    weights_V, sums_M = np.empty(vocabulary, dtype=np.float32), np.empty(num_chunks, dtype=np.float64)
    for r in range(num_rows):
        scale, highest = scale_R[r], highest_R[r]
        total, moment = 0.0, 0.0
        for m in range(num_chunks):
            part = slice(m * CHUNK, min((m + 1) * CHUNK, vocabulary))
            chunk_total, chunk_moment = _weigh(logits_RV[r, part], highest, scale, weights_V[part])
            sums_M[m] = chunk_total
            total += float(chunk_total)
            moment += float(chunk_moment)
        token = _place(weights_V, sums_M, uniform_R[r] * total)
        token_R[r] = token
        logprob_R[r] = (logits_RV[r, token] - highest) * scale - np.log(total)
        entropy_R[r] = np.log(total) - moment / total


@compiled
def _weigh(
    logits_C: np.ndarray, highest: np.float32, scale: np.float32, weights_C: np.ndarray
) -> tuple[np.float32, np.float32]:
    """weights = exp(scale * (logit - highest)); their sum, and that of weight times exponent."""
    total, moment, floor = np.float32(0.0), np.float32(0.0), np.float32(-1e4)
    for c in range(len(logits_C)):
        x = (logits_C[c] - highest) * scale
        x = floor if x < floor else x
        weight = exp(x)
        weights_C[c] = weight
        total += weight
        moment += weight * x
    return total, moment


@compiled
def _place(weights_V: np.ndarray, sums_M: np.ndarray, target: float) -> int:
    """The first token at which the cumulative weight passes `target`.

    Where rounding lets none of its chunk pass it, the chunk's last token of any weight.
    """
    chunk, before = 0, 0.0
    for m in range(len(sums_M)):
        if sums_M[m] > 0.0:
            chunk = m
            if before + sums_M[m] > target:
                break
            before += sums_M[m]
    last = chunk * CHUNK
    for v in range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(weights_V))):
        if weights_V[v] > 0.0:
            last = v
            before += weights_V[v]
            if before > target:
                break
    return last
