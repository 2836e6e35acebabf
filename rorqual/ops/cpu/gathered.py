"""Attention of one query over its own selected keys, forward and backward, as loops for one core; the torch twin is
`dsa.sparse_attention`.

Keys are read where they lie; nothing is gathered into a copy. H / G consecutive heads share keys and values and take
them two by two. Backward computes the weights anew from the log-sum-exp that forward leaves. Of a key the first E
numbers are read, and of a value the first V, so that a latent serves as both.

Shapes: X queries, K keys, S selected keys, H heads, G key-value heads, C selections a query (1, which all heads share,
or G), E key width, V value width.
"""

from __future__ import annotations

import numpy as np

from rorqual.ops.cpu.compiled import compiled, exp


@compiled
def attend(
    q_XHE: np.ndarray,
    k_KGE: np.ndarray,
    v_KGV: np.ndarray,
    selected_XCS: np.ndarray,
    scale: float,
    out_XHV: np.ndarray,
    lse_XH: np.ndarray,
) -> None:
    """out = softmax(scale * q k) v over the selected keys, -1 being none; 0 where there are none at all."""
    num_queries, num_heads, _ = q_XHE.shape
    sharing = num_heads // k_KGE.shape[1]
    scores_JS = np.empty((sharing, selected_XCS.shape[2]), dtype=np.float32)
    present_S = np.empty(selected_XCS.shape[2], dtype=np.int64)
    selected = present_S[:0]
    for x in range(num_queries):
        out_XHV[x] = np.float32(0.0)
        for group in range(k_KGE.shape[1]):
            first, stop = group * sharing, (group + 1) * sharing
            if group < selected_XCS.shape[1]:
                selected = present_S[: present(selected_XCS[x, group], present_S)]
            if len(selected) == 0:
                lse_XH[x, first:stop] = np.float32(0.0)
                continue
            dots(q_XHE[x, first:stop], k_KGE, group, selected, scores_JS)
            for j in range(sharing):
                lse_XH[x, first + j] = softmax(scores_JS[j], len(selected), scale)
            mix(scores_JS, v_KGV, group, selected, out_XHV[x, first:stop])


@compiled
def attend_backward(
    q_XHE: np.ndarray,
    k_KGE: np.ndarray,
    v_KGV: np.ndarray,
    selected_XCS: np.ndarray,
    scale: float,
    out_XHV: np.ndarray,
    lse_XH: np.ndarray,
    grad_XHV: np.ndarray,
    group: int,
    grad_q_XHE: np.ndarray,
    grad_k_KGE: np.ndarray,
    grad_v_KGV: np.ndarray,
) -> None:
    """Of the heads of one group: writes the queries' gradients, adds to those of the keys and values.

    With p the weights and D = sum of grad * out: dV += p grad; dS = p * (grad . v - D) * scale; dQ = dS k; dK += dS q.
    """
    num_queries, num_heads, _ = q_XHE.shape
    sharing = num_heads // k_KGE.shape[1]
    first, stop = group * sharing, (group + 1) * sharing
    weights_JS = np.empty((sharing, selected_XCS.shape[2]), dtype=np.float32)
    slopes_JS = np.empty((sharing, selected_XCS.shape[2]), dtype=np.float32)
    present_S = np.empty(selected_XCS.shape[2], dtype=np.int64)
    which = min(group, selected_XCS.shape[1] - 1)
    factor = np.float32(scale)
    for x in range(num_queries):
        selected = present_S[: present(selected_XCS[x, which], present_S)]
        q_JE, grad_JV, grad_q_JE = q_XHE[x, first:stop], grad_XHV[x, first:stop], grad_q_XHE[x, first:stop]
        grad_q_JE[:] = np.float32(0.0)
        if len(selected) == 0:
            continue
        dots(q_JE, k_KGE, group, selected, weights_JS)
        dots(grad_JV, v_KGV, group, selected, slopes_JS)
        for j in range(sharing):
            lse, mean = lse_XH[x, first + j], np.float32(0.0)
            out, grad = out_XHV[x, first + j], grad_JV[j]
            for v in range(len(out)):
                mean += out[v] * grad[v]
            weights, slopes = weights_JS[j], slopes_JS[j]
            for s in range(len(selected)):
                weights[s] = exp(min(weights[s] * factor - lse, np.float32(0.5)))  # Never above 1 but by rounding.
                slopes[s] = weights[s] * (slopes[s] - mean) * factor
        mix(slopes_JS, k_KGE, group, selected, grad_q_JE)
        add_outer(slopes_JS, q_JE, group, selected, grad_k_KGE)
        add_outer(weights_JS, grad_JV, group, selected, grad_v_KGV)


@compiled
def present(selected_S: np.ndarray, present_S: np.ndarray) -> int:
    """Copies the keys that are there, and counts them."""
    count = 0
    for s in range(len(selected_S)):
        present_S[count] = selected_S[s]
        count += selected_S[s] >= 0
    return count


@compiled
def dots(q_JE: np.ndarray, keys_KGE: np.ndarray, group: int, selected: np.ndarray, out_JS: np.ndarray) -> None:
    """out = q . key: four keys and two heads at a time, eight sums that do not wait for one another."""
    sharing, width = q_JE.shape
    whole, zero = len(selected) // 4 * 4, np.float32(0.0)
    for s in range(0, whole, 4):
        first, second, third, fourth = selected[s], selected[s + 1], selected[s + 2], selected[s + 3]
        for j in range(0, sharing - 1, 2):
            a0, a1, a2, a3, b0, b1, b2, b3 = zero, zero, zero, zero, zero, zero, zero, zero
            for e in range(width):
                a, b = q_JE[j, e], q_JE[j + 1, e]
                k0, k1 = keys_KGE[first, group, e], keys_KGE[second, group, e]
                k2, k3 = keys_KGE[third, group, e], keys_KGE[fourth, group, e]
                a0, a1, a2, a3 = a0 + a * k0, a1 + a * k1, a2 + a * k2, a3 + a * k3
                b0, b1, b2, b3 = b0 + b * k0, b1 + b * k1, b2 + b * k2, b3 + b * k3
            out_JS[j, s], out_JS[j, s + 1], out_JS[j, s + 2], out_JS[j, s + 3] = a0, a1, a2, a3
            out_JS[j + 1, s], out_JS[j + 1, s + 1], out_JS[j + 1, s + 2], out_JS[j + 1, s + 3] = b0, b1, b2, b3
        if sharing % 2 == 1:
            j = sharing - 1
            a0, a1, a2, a3 = zero, zero, zero, zero
            for e in range(width):
                a = q_JE[j, e]
                a0, a1 = a0 + a * keys_KGE[first, group, e], a1 + a * keys_KGE[second, group, e]
                a2, a3 = a2 + a * keys_KGE[third, group, e], a3 + a * keys_KGE[fourth, group, e]
            out_JS[j, s], out_JS[j, s + 1], out_JS[j, s + 2], out_JS[j, s + 3] = a0, a1, a2, a3
    for s in range(whole, len(selected)):
        key = selected[s]
        for j in range(sharing):
            total = zero
            for e in range(width):
                total += q_JE[j, e] * keys_KGE[key, group, e]
            out_JS[j, s] = total


@compiled
def softmax(scores_S: np.ndarray, length: int, scale: float) -> np.float32:
    """Scores become weights; returns the log-sum-exp of the scaled scores."""
    factor = np.float32(scale)
    highest = scores_S[0] * factor
    for s in range(length):
        scores_S[s] *= factor
        highest = max(highest, scores_S[s])
    total = np.float32(0.0)
    for s in range(length):
        weight = exp(scores_S[s] - highest)
        scores_S[s] = weight
        total += weight
    inverse = np.float32(1.0) / total
    for s in range(length):
        scores_S[s] *= inverse
    return np.float32(highest + np.log(total))


@compiled
def mix(weights_JS: np.ndarray, values_KGV: np.ndarray, group: int, selected: np.ndarray, out_JV: np.ndarray) -> None:
    """out += weights . values, four values and two heads at a time."""
    sharing, width = out_JV.shape
    whole = len(selected) // 4 * 4
    for s in range(0, whole, 4):
        first, second, third, fourth = selected[s], selected[s + 1], selected[s + 2], selected[s + 3]
        for j in range(0, sharing - 1, 2):
            a0, a1, a2, a3 = weights_JS[j, s], weights_JS[j, s + 1], weights_JS[j, s + 2], weights_JS[j, s + 3]
            b0, b1 = weights_JS[j + 1, s], weights_JS[j + 1, s + 1]
            b2, b3 = weights_JS[j + 1, s + 2], weights_JS[j + 1, s + 3]
            for v in range(width):
                v0, v1 = values_KGV[first, group, v], values_KGV[second, group, v]
                v2, v3 = values_KGV[third, group, v], values_KGV[fourth, group, v]
                out_JV[j, v] += (a0 * v0 + a1 * v1) + (a2 * v2 + a3 * v3)
                out_JV[j + 1, v] += (b0 * v0 + b1 * v1) + (b2 * v2 + b3 * v3)
        if sharing % 2 == 1:
            j = sharing - 1
            a0, a1, a2, a3 = weights_JS[j, s], weights_JS[j, s + 1], weights_JS[j, s + 2], weights_JS[j, s + 3]
            for v in range(width):
                v0, v1 = values_KGV[first, group, v], values_KGV[second, group, v]
                v2, v3 = values_KGV[third, group, v], values_KGV[fourth, group, v]
                out_JV[j, v] += (a0 * v0 + a1 * v1) + (a2 * v2 + a3 * v3)
    for s in range(whole, len(selected)):
        key = selected[s]
        for j in range(sharing):
            weight = weights_JS[j, s]
            for v in range(width):
                out_JV[j, v] += weight * values_KGV[key, group, v]


@compiled
def add_outer(
    weights_JS: np.ndarray, rows_JE: np.ndarray, group: int, selected: np.ndarray, total_KGE: np.ndarray
) -> None:
    """total[key] += sum over the heads of weight * row: a key is read and written once for every four heads."""
    sharing, width = rows_JE.shape
    whole = sharing // 4 * 4
    for s in range(len(selected)):
        key = selected[s]
        for j in range(0, whole, 4):
            a0, a1, a2, a3 = weights_JS[j, s], weights_JS[j + 1, s], weights_JS[j + 2, s], weights_JS[j + 3, s]
            for e in range(width):
                of_two = a0 * rows_JE[j, e] + a1 * rows_JE[j + 1, e]
                total_KGE[key, group, e] += of_two + (a2 * rows_JE[j + 2, e] + a3 * rows_JE[j + 3, e])
        for j in range(whole, sharing):
            weight = weights_JS[j, s]
            for e in range(width):
                total_KGE[key, group, e] += weight * rows_JE[j, e]
