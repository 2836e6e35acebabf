"""One token a row through a whole grouped-query block, as one loop for one core.

A small model decodes in steps of a millisecond, of which a call of torch for each part would take the most. This kernel
is those parts, in the same order, with products that hold four rows by four outputs in registers. The torch twin is
`Block.forward_cached` in `models/decoder.py`.

Shapes: R rows, D hidden, H query heads, G key-value heads, E head width, I feed-forward width, M rows and K columns of
an input, N outputs, S slots, C capacity.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rorqual.ops.cpu.attention import RowReads, attend_next
from rorqual.ops.cpu.compiled import compiled
from rorqual.ops.cpu.pointwise import rms_norm, swiglu

ROWS_AT_ONCE = 32


class BlockWeights(NamedTuple):
    """Weights [N, K], biases [N], norms [D] or [E]. A bias or norm that the model does not have is empty."""

    input_norm: np.ndarray
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    q_bias: np.ndarray
    k_bias: np.ndarray
    v_bias: np.ndarray
    q_norm: np.ndarray
    k_norm: np.ndarray
    o: np.ndarray
    o_bias: np.ndarray
    post_norm: np.ndarray
    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray
    gate_bias: np.ndarray
    up_bias: np.ndarray
    down_bias: np.ndarray


@compiled
def decode_block(
    x_RD: np.ndarray,
    w: BlockWeights,
    cos_RE: np.ndarray,
    sin_RE: np.ndarray,
    k_SCGE: np.ndarray,
    v_SCGE: np.ndarray,
    reads: RowReads,
    eps: float,
    scale: float,
) -> None:
    """x becomes x + attention(norm(x)), then x + feed_forward(norm(x)); the new keys and values are stored.

    A few rows at a time, so that what lies between two products stays in the processor's cache.
    """
    for first in range(0, len(x_RD), ROWS_AT_ONCE):
        part = slice(first, min(first + ROWS_AT_ONCE, len(x_RD)))
        own = RowReads(
            reads.slots_R[part], reads.lengths_R[part], reads.shared_slots_R[part], reads.shared_lengths_R[part]
        )
        _decode_rows(x_RD[part], w, cos_RE[part], sin_RE[part], k_SCGE, v_SCGE, own, eps, scale)


@compiled
def _decode_rows(
    x_RD: np.ndarray,
    w: BlockWeights,
    cos_RE: np.ndarray,
    sin_RE: np.ndarray,
    k_SCGE: np.ndarray,
    v_SCGE: np.ndarray,
    reads: RowReads,
    eps: float,
    scale: float,
) -> None:
    num_rows = len(x_RD)
    num_kv_heads, head_dim = k_SCGE.shape[2:]
    normed_RD, inverse_R = np.empty_like(x_RD), np.empty(num_rows, dtype=np.float32)
    rms_norm(x_RD, w.input_norm, eps, normed_RD, inverse_R)
    q_RHE = _linear(normed_RD, w.q, w.q_bias).reshape(num_rows, -1, head_dim)
    k_RGE = _linear(normed_RD, w.k, w.k_bias).reshape(num_rows, num_kv_heads, head_dim)
    v_RGE = _linear(normed_RD, w.v, w.v_bias).reshape(num_rows, num_kv_heads, head_dim)
    if len(w.q_norm) > 0:
        q_RHE, k_RGE = _head_norm(q_RHE, w.q_norm, eps), _head_norm(k_RGE, w.k_norm, eps)
    attended_RHE = np.empty_like(q_RHE)
    attend_next(q_RHE, k_RGE, v_RGE, cos_RE, sin_RE, k_SCGE, v_SCGE, reads, scale, attended_RHE)
    _add_bias(x_RD, w.o_bias)
    _accumulate(attended_RHE.reshape(num_rows, -1), w.o, x_RD)
    rms_norm(x_RD, w.post_norm, eps, normed_RD, inverse_R)
    gate_RI, up_RI = _linear(normed_RD, w.gate, w.gate_bias), _linear(normed_RD, w.up, w.up_bias)
    gated_RI = np.empty_like(gate_RI)
    swiglu(gate_RI, up_RI, gated_RI)
    _add_bias(x_RD, w.down_bias)
    _accumulate(gated_RI, w.down, x_RD)


@compiled
def _head_norm(x_RHE: np.ndarray, weight_E: np.ndarray, eps: float) -> np.ndarray:
    flat_NE = x_RHE.reshape(-1, x_RHE.shape[2])
    out_NE = np.empty_like(flat_NE)
    rms_norm(flat_NE, weight_E, eps, out_NE, np.empty(len(flat_NE), dtype=np.float32))
    return out_NE.reshape(x_RHE.shape)


@compiled
def _linear(x_MK: np.ndarray, weight_NK: np.ndarray, bias_N: np.ndarray) -> np.ndarray:
    out_MN = np.zeros((len(x_MK), len(weight_NK)), dtype=np.float32)
    _add_bias(out_MN, bias_N)
    _accumulate(x_MK, weight_NK, out_MN)
    return out_MN


@compiled
def _add_bias(out_MN: np.ndarray, bias_N: np.ndarray) -> None:
    if len(bias_N) > 0:
        for m in range(len(out_MN)):
            for n in range(len(bias_N)):
                out_MN[m, n] += bias_N[n]


@compiled
def _accumulate(x_MK: np.ndarray, weight_NK: np.ndarray, out_MN: np.ndarray) -> None:
    """out += x weight^T, in squares of four rows by four outputs: 16 sums that stay in registers."""
    num_rows, num_outputs = out_MN.shape
    whole_rows, whole_outputs = num_rows // 4 * 4, num_outputs // 4 * 4
    for n in range(0, whole_outputs, 4):
        for m in range(0, whole_rows, 4):
            _square(x_MK, weight_NK, m, n, out_MN)
        for m in range(whole_rows, num_rows):
            _strip(x_MK, weight_NK, m, n, out_MN)
    for n in range(whole_outputs, num_outputs):
        for m in range(num_rows):
            total = np.float32(0.0)
            for k in range(x_MK.shape[1]):
                total += x_MK[m, k] * weight_NK[n, k]
            out_MN[m, n] += total


@compiled
def _square(x_MK: np.ndarray, weight_NK: np.ndarray, m: int, n: int, out_MN: np.ndarray) -> None:
    zero = np.float32(0.0)
    a0, a1, a2, a3, b0, b1, b2, b3 = zero, zero, zero, zero, zero, zero, zero, zero
    c0, c1, c2, c3, d0, d1, d2, d3 = zero, zero, zero, zero, zero, zero, zero, zero
    for k in range(x_MK.shape[1]):
        a, b, c, d = x_MK[m, k], x_MK[m + 1, k], x_MK[m + 2, k], x_MK[m + 3, k]
        w0, w1, w2, w3 = weight_NK[n, k], weight_NK[n + 1, k], weight_NK[n + 2, k], weight_NK[n + 3, k]
        a0, a1, a2, a3 = a0 + a * w0, a1 + a * w1, a2 + a * w2, a3 + a * w3
        b0, b1, b2, b3 = b0 + b * w0, b1 + b * w1, b2 + b * w2, b3 + b * w3
        c0, c1, c2, c3 = c0 + c * w0, c1 + c * w1, c2 + c * w2, c3 + c * w3
        d0, d1, d2, d3 = d0 + d * w0, d1 + d * w1, d2 + d * w2, d3 + d * w3
    _add_four(out_MN, m, n, a0, a1, a2, a3)
    _add_four(out_MN, m + 1, n, b0, b1, b2, b3)
    _add_four(out_MN, m + 2, n, c0, c1, c2, c3)
    _add_four(out_MN, m + 3, n, d0, d1, d2, d3)


@compiled
def _strip(x_MK: np.ndarray, weight_NK: np.ndarray, m: int, n: int, out_MN: np.ndarray) -> None:
    a0, a1, a2, a3 = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for k in range(x_MK.shape[1]):
        a = x_MK[m, k]
        a0, a1 = a0 + a * weight_NK[n, k], a1 + a * weight_NK[n + 1, k]
        a2, a3 = a2 + a * weight_NK[n + 2, k], a3 + a * weight_NK[n + 3, k]
    _add_four(out_MN, m, n, a0, a1, a2, a3)


@compiled
def _add_four(
    out_MN: np.ndarray, m: int, n: int, v0: np.float32, v1: np.float32, v2: np.float32, v3: np.float32
) -> None:
    out_MN[m, n] += v0
    out_MN[m, n + 1] += v1
    out_MN[m, n + 2] += v2
    out_MN[m, n + 3] += v3
