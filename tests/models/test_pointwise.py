"""RMSNorm, SwiGLU and rotation against torch's own formulas and numerical gradients in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rorqual.models.pointwise import RMSNorm, rotate_halves, swiglu


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("shape", ((5, 8), (5, 3, 8)))
def test_rms_norm(shape: tuple[int, ...]) -> None:
    norm, x = RMSNorm(8, eps=0.3).double(), random(*shape).requires_grad_()
    with torch.no_grad():
        norm.weight.copy_(random(8))
        expected = F.rms_norm(x, (8,), norm.weight, eps=0.3)
        torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)
    torch.autograd.gradcheck(lambda x, w: torch.func.functional_call(norm, {"weight": w}, (x,)), (x, norm.weight))


def test_swiglu() -> None:
    gate, up = random(5, 8).requires_grad_(), random(1, 5, 8)[0].requires_grad_()
    expected = (F.silu(gate) * up).detach()
    torch.testing.assert_close(swiglu(gate, up), expected)
    torch.autograd.gradcheck(swiglu, (gate, up))
    with torch.no_grad():
        torch.testing.assert_close(swiglu(gate.clone(), up), expected)


def test_rotation() -> None:
    x, angle = random(5, 3, 8).requires_grad_(), random(5, 4)[:, None]
    cos, sin = torch.cat((angle.cos(), angle.cos()), dim=-1), torch.cat((-angle.sin(), angle.sin()), dim=-1)
    turned = torch.view_as_complex(torch.stack(x.detach().chunk(2, dim=-1), dim=-1)) * torch.polar(
        torch.ones_like(angle), angle
    )
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    torch.testing.assert_close(rotate_halves(x, cos, sin), expected)
    torch.autograd.gradcheck(rotate_halves, (x, cos, sin))
    with torch.no_grad():
        torch.testing.assert_close(rotate_halves(x, cos, sin), expected)


def test_half_precision_is_normalised_in_single() -> None:
    x, norm = random(5, 64).bfloat16() * 1e20, RMSNorm(64, eps=1e-6).bfloat16()
    torch.testing.assert_close(norm(x).float(), F.rms_norm(x.float(), (64,)), rtol=1e-2, atol=1e-2)
