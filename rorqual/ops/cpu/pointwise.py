"""RMSNorm, SwiGLU and rotation as loops for one core; their torch twins are in `models/pointwise.py`.

Shapes: N tokens (or tokens times heads), D the normalised dimension, I feed-forward width, H heads, E rotary dimension.
"""

from __future__ import annotations

import numpy as np

from rorqual.ops.cpu.compiled import compiled, exp


@compiled
def rms_norm(x_ND: np.ndarray, weight_D: np.ndarray, eps: float, out_ND: np.ndarray, inverse_N: np.ndarray) -> None:
    """out = x * weight / rms(x); `inverse_N` becomes 1 / rms(x)."""
    num_tokens, width = x_ND.shape
    for n in range(num_tokens):
        total = np.float32(0.0)
        for d in range(width):
            total += x_ND[n, d] * x_ND[n, d]
        inverse = np.float32(1.0) / np.sqrt(total / np.float32(width) + np.float32(eps))
        inverse_N[n] = inverse
        for d in range(width):
            out_ND[n, d] = x_ND[n, d] * inverse * weight_D[d]


@compiled
def rms_norm_backward(
    gradient_ND: np.ndarray,
    x_ND: np.ndarray,
    weight_D: np.ndarray,
    inverse_N: np.ndarray,
    x_gradient_ND: np.ndarray,
    weight_gradient_D: np.ndarray,
) -> None:
    """Writes the gradient of x, and adds to `weight_gradient_D`."""
    num_tokens, width = x_ND.shape
    for n in range(num_tokens):
        inverse = inverse_N[n]
        total = np.float32(0.0)
        for d in range(width):
            total += gradient_ND[n, d] * weight_D[d] * x_ND[n, d]
        mean = total * inverse * inverse / np.float32(width)
        for d in range(width):
            x_gradient_ND[n, d] = (gradient_ND[n, d] * weight_D[d] - x_ND[n, d] * mean) * inverse
            weight_gradient_D[d] += gradient_ND[n, d] * x_ND[n, d] * inverse


@compiled
def swiglu(gate_NI: np.ndarray, up_NI: np.ndarray, out_NI: np.ndarray) -> None:
    """out = silu(gate) * up. Where `out_NI` is one of the others, the loop is not vectorised."""
    num_tokens, width = gate_NI.shape
    for n in range(num_tokens):
        for i in range(width):
            x = gate_NI[n, i]
            gated = x / (np.float32(1.0) + exp(min(-x, np.float32(87.0)))) * up_NI[n, i]
            out_NI[n, i] = np.float32(0.0) if x < np.float32(-1e30) else gated


@compiled
def swiglu_backward(
    gradient_NI: np.ndarray,
    gate_NI: np.ndarray,
    up_NI: np.ndarray,
    gate_gradient_NI: np.ndarray,
    up_gradient_NI: np.ndarray,
) -> None:
    """silu'(x) = s + x * s * (1 - s) with s = sigmoid(x)."""
    num_tokens, width = gate_NI.shape
    for n in range(num_tokens):
        for i in range(width):
            x, gradient = gate_NI[n, i], gradient_NI[n, i]
            s = np.float32(1.0) / (np.float32(1.0) + exp(min(-x, np.float32(87.0))))
            s = np.float32(0.0) if x < np.float32(-1e30) else s
            up_gradient_NI[n, i] = gradient * x * s
            gate_gradient_NI[n, i] = gradient * up_NI[n, i] * (s + x * s * (np.float32(1.0) - s))


@compiled
def rotate_halves(
    x_NH2E: np.ndarray, cos_N2E: np.ndarray, sin_N2E: np.ndarray, sign: float, out_NH2E: np.ndarray
) -> None:
    """Turn the pairs ([0, e], [1, e]); `sin` is negative for the first. sign = -1 turns back."""
    num_tokens, num_heads, _, half = x_NH2E.shape
    factor = np.float32(sign)
    for n in range(num_tokens):
        for h in range(num_heads):
            for e in range(half):
                first, second = x_NH2E[n, h, 0, e], x_NH2E[n, h, 1, e]
                out_NH2E[n, h, 0, e] = first * cos_N2E[n, 0, e] + second * sin_N2E[n, 0, e] * factor
                out_NH2E[n, h, 1, e] = second * cos_N2E[n, 1, e] + first * sin_N2E[n, 1, e] * factor
