"""The parts of a block that are no matrix product, with few passes over memory: RMSNorm, SwiGLU and rotation.

Each states its own backward, which keeps less than autograd would and needs half its passes; a second derivative is
refused by torch. Where compiled kernels serve, they do the same in one pass; the formulas here are their twins.

Shapes: T tokens, H heads, D the normalised dimension, E rotary dimension, I feed-forward width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rorqual.ops.cpu import pointwise as kernels
from rorqual.ops.cpu.compiled import array, serves

PRECISE = (torch.float32, torch.float64)


class RMSNorm(nn.RMSNorm):
    """x * weight / sqrt(mean(x^2) + eps) over the last dimension (arXiv 1910.07467, eq. 4)."""

    def forward(self, x_TD: Tensor) -> Tensor:
        if x_TD.device.type != "cpu" or x_TD.dtype not in PRECISE or self.eps is None:
            return super().forward(x_TD)
        if not torch.is_grad_enabled():
            return _normed(x_TD, self.weight, self.eps)[0]
        result: Tensor = _RMSNorm.apply(x_TD, self.weight, self.eps)
        return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        out_TD, inverse_T1 = _normed(x_TD, weight_D, eps)
        ctx.save_for_backward(x_TD, inverse_T1, weight_D)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        x_TD, inverse_T1, weight_D = ctx.saved_tensors
        width = len(weight_D)
        if serves(x_TD):
            out_TD, weight_gradient_D = _like(x_TD), torch.zeros_like(weight_D)
            gradient, x, out = (array(each).reshape(-1, width) for each in (gradient_TD, x_TD, out_TD))
            inverse = array(inverse_T1).reshape(-1)
            kernels.rms_norm_backward(gradient, x, array(weight_D), inverse, out, array(weight_gradient_D))
            return out_TD, weight_gradient_D, None
        normed_TD = x_TD * inverse_T1
        product_TD = gradient_TD * normed_TD
        weight_gradient_D = product_TD.flatten(0, -2).sum(dim=0)
        mean_T1 = (product_TD @ weight_D).div_(-width).unsqueeze(-1)
        scaled_TD = torch.mul(gradient_TD, weight_D, out=product_TD)
        return scaled_TD.addcmul_(normed_TD, mean_T1).mul_(inverse_T1), weight_gradient_D, None


def _normed(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x * weight / rms(x), and 1 / rms(x)."""
    width = x_TD.shape[-1]
    if serves(x_TD):
        out_TD = _like(x_TD)
        inverse_T1 = x_TD.new_empty(*x_TD.shape[:-1], 1)
        flat_in, flat_out = array(x_TD).reshape(-1, width), out_TD.numpy().reshape(-1, width)
        kernels.rms_norm(flat_in, array(weight_D), eps, flat_out, inverse_T1.numpy().reshape(-1))
        return out_TD, inverse_T1
    squares_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True).square_()
    inverse_T1 = squares_T1.add_(width * eps).rsqrt_().mul_(width**0.5)
    return (x_TD * inverse_T1).mul_(weight_D), inverse_T1


def swiglu(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202). Without gradients, `gate` may be overwritten."""
    if torch.is_grad_enabled():
        result: Tensor = _SwiGLU.apply(gate_TI, up_TI)
        return result
    return _gated(gate_TI, up_TI) if serves(gate_TI) else F.silu(gate_TI, inplace=True).mul_(up_TI)


def _gated(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    out_TI = _like(gate_TI)
    kernels.swiglu(array(gate_TI), array(up_TI), array(out_TI))
    return out_TI


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_TI: Tensor, up_TI: Tensor) -> Tensor:
        ctx.save_for_backward(gate_TI, up_TI)
        return _gated(gate_TI, up_TI) if serves(gate_TI) else F.silu(gate_TI).mul_(up_TI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TI: Tensor) -> tuple[Tensor, Tensor]:
        gate_TI, up_TI = ctx.saved_tensors
        if serves(gate_TI):
            gradients = (_like(gate_TI), _like(up_TI))
            given = (array(gradient_TI), array(gate_TI), array(up_TI))
            kernels.swiglu_backward(*given, gradients[0].numpy(), gradients[1].numpy())
            return gradients
        up_gradient_TI = F.silu(gate_TI).mul_(gradient_TI)
        return torch.ops.aten.silu_backward(gradient_TI * up_TI, gate_TI), up_gradient_TI


def rotate_halves(x_THE: Tensor, cos_T1E: Tensor, sin_T1E: Tensor) -> Tensor:
    """Turn the pairs (i, i + E/2) of the last dimension; `sin` is negative in its first half."""
    if not torch.is_grad_enabled():
        return _turned(x_THE, cos_T1E, sin_T1E, 1.0)
    result: Tensor = _Rotate.apply(x_THE, cos_T1E, sin_T1E)
    return result


class _Rotate(torch.autograd.Function):
    """The gradient is turned back: by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x_THE: Tensor, cos_T1E: Tensor, sin_T1E: Tensor) -> Tensor:
        ctx.save_for_backward(cos_T1E, sin_T1E)
        return _turned(x_THE, cos_T1E, sin_T1E, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_THE: Tensor) -> tuple[Tensor, None, None]:
        cos_T1E, sin_T1E = ctx.saved_tensors
        return _turned(gradient_THE, cos_T1E, sin_T1E, -1.0), None, None


def _turned(x_THE: Tensor, cos_T1E: Tensor, sin_T1E: Tensor, sign: float) -> Tensor:
    """sign = -1 turns back."""
    if serves(x_THE) and x_THE.dim() == cos_T1E.dim() == 3:
        out_THE = _like(x_THE)
        halves = (len(x_THE), -1, 2, x_THE.shape[-1] // 2)
        cos, sin = (array(each).reshape(len(each), 2, -1) for each in (cos_T1E, sin_T1E))
        kernels.rotate_halves(array(x_THE).reshape(halves), cos, sin, sign, out_THE.numpy().reshape(halves))
        return out_THE
    first, second = x_THE.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1).mul_(sin_T1E * sign).addcmul_(x_THE, cos_T1E)


def _like(x: Tensor) -> Tensor:
    """Unset memory of its shape, laid out as kernels want it."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)
