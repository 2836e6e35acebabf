"""The parts of a block that are no matrix product, with few passes over memory: RMSNorm, SwiGLU and rotation.

Each states its own backward, which keeps less than autograd would and needs half its passes. A second derivative is
refused by torch.

Shapes: T tokens, H heads, D the normalised dimension, E rotary dimension, I feed-forward width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PRECISE = (torch.float32, torch.float64)


class RMSNorm(nn.RMSNorm):
    """x * weight / sqrt(mean(x^2) + eps) over the last dimension (arXiv 1910.07467, eq. 4)."""

    def forward(self, x_TD: Tensor) -> Tensor:
        if x_TD.device.type != "cpu" or x_TD.dtype not in PRECISE or self.eps is None:
            return super().forward(x_TD)
        if torch.is_grad_enabled():
            result: Tensor = _RMSNorm.apply(x_TD, self.weight, self.eps)
            return result
        return (x_TD * _inverse_rms(x_TD, self.eps)).mul_(self.weight)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        inverse_T1 = _inverse_rms(x_TD, eps)
        normed_TD = x_TD * inverse_T1
        ctx.save_for_backward(normed_TD, inverse_T1, weight_D)
        return normed_TD * weight_D

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        normed_TD, inverse_T1, weight_D = ctx.saved_tensors
        product_TD = gradient_TD * normed_TD
        weight_gradient_D = product_TD.flatten(0, -2).sum(dim=0)
        mean_T1 = (product_TD @ weight_D).div_(-len(weight_D)).unsqueeze(-1)
        scaled_TD = torch.mul(gradient_TD, weight_D, out=product_TD)
        return scaled_TD.addcmul_(normed_TD, mean_T1).mul_(inverse_T1), weight_gradient_D, None


def _inverse_rms(x_TD: Tensor, eps: float) -> Tensor:
    width = x_TD.shape[-1]
    squares_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True).square_()
    return squares_T1.add_(width * eps).rsqrt_().mul_(width**0.5)


def swiglu(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202). Without gradients, `gate` is overwritten."""
    if torch.is_grad_enabled():
        result: Tensor = _SwiGLU.apply(gate_TI, up_TI)
        return result
    return F.silu(gate_TI, inplace=True).mul_(up_TI)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_TI: Tensor, up_TI: Tensor) -> Tensor:
        ctx.save_for_backward(gate_TI, up_TI)
        return F.silu(gate_TI).mul_(up_TI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TI: Tensor) -> tuple[Tensor, Tensor]:
        gate_TI, up_TI = ctx.saved_tensors
        up_gradient_TI = F.silu(gate_TI).mul_(gradient_TI)
        return torch.ops.aten.silu_backward(gradient_TI * up_TI, gate_TI), up_gradient_TI


def rotate_halves(x_THE: Tensor, cos_T1E: Tensor, sin_T1E: Tensor) -> Tensor:
    """Turn the pairs (i, i + E/2) of the last dimension; `sin` is negative in its first half."""
    if not torch.is_grad_enabled():
        return _turned(x_THE, cos_T1E, sin_T1E)
    result: Tensor = _Rotate.apply(x_THE, cos_T1E, sin_T1E)
    return result


class _Rotate(torch.autograd.Function):
    """The gradient is turned back: by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x_THE: Tensor, cos_T1E: Tensor, sin_T1E: Tensor) -> Tensor:
        ctx.save_for_backward(cos_T1E, sin_T1E)
        return _turned(x_THE, cos_T1E, sin_T1E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_THE: Tensor) -> tuple[Tensor, None, None]:
        cos_T1E, sin_T1E = ctx.saved_tensors
        return _turned(gradient_THE, cos_T1E, -sin_T1E), None, None


def _turned(x_THE: Tensor, cos_T1E: Tensor, sin_T1E: Tensor) -> Tensor:
    first, second = x_THE.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1).mul_(sin_T1E).addcmul_(x_THE, cos_T1E)
