"""Rotary frequencies, temperatures and rotations against `transformers` and against complex numbers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rorqual.models.config import RopeConfig
from rorqual.models.rope import Rope, Rotation, softmax_scale, yarn_temperature

transformers = pytest.importorskip("transformers")

lengths = st.sampled_from([6, 64, 4096, 32768])
yarn_options = st.fixed_dictionaries(
    {"factor": st.sampled_from([1.0, 2.0, 4.0, 40.0]), "original_max_position_embeddings": lengths},
    optional={
        "beta_fast": st.sampled_from([32.0, 8.0]),
        "beta_slow": st.sampled_from([1.0, 0.25]),
        "mscale": st.sampled_from([0.707, 1.0]),
        "mscale_all_dim": st.sampled_from([0.9, 1.0]),
        "attention_factor": st.sampled_from([0.8, 1.5]),
        "truncate": st.booleans(),
    },
)
llama3_options = st.fixed_dictionaries(
    {
        "factor": st.sampled_from([2.0, 8.0, 32.0]),
        "original_max_position_embeddings": lengths,
        "low_freq_factor": st.sampled_from([1.0, 0.5]),
        "high_freq_factor": st.sampled_from([4.0, 2.0]),
    }
)
scalings = st.one_of(
    st.tuples(st.just("none"), st.just({})),
    st.tuples(st.just("linear"), st.fixed_dictionaries({"factor": st.sampled_from([1.5, 8.0])})),
    st.tuples(st.just("llama3"), llama3_options),
    st.tuples(st.just("yarn"), yarn_options),
)


def reference_rope(theta: float, dim: int, scaling: str, options: dict[str, Any]) -> tuple[torch.Tensor, float]:
    rope_type = "default" if scaling == "none" else scaling
    config = transformers.LlamaConfig(
        hidden_size=dim,
        num_attention_heads=1,
        head_dim=dim,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": rope_type, "rope_theta": theta, **options},
    )
    module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    return module.inv_freq, module.attention_scaling


@given(st.sampled_from([50.0, 10_000.0, 500_000.0]), st.sampled_from([2, 4, 10, 64, 128]), scalings)
def test_frequencies(theta: float, dim: int, scaling: tuple[str, dict[str, Any]]) -> None:
    kind, options = scaling
    rope = Rope(RopeConfig(theta=theta, scaling=kind, **options), dim)
    expected, expected_factor = reference_rope(theta, dim, kind, options)
    torch.testing.assert_close(rope.inverse_frequency, expected, rtol=1e-6, atol=0.0)
    assert rope.attention_factor == pytest.approx(expected_factor, rel=1e-12)


@pytest.mark.parametrize("interleaved", (False, True))
def test_rotation_is_multiplication_by_a_unit_complex_number(interleaved: bool) -> None:
    """Scores after rotation equal those of complex pairs turned by position times frequency, in float64."""
    dim, generator = 10, torch.Generator().manual_seed(0)
    q_PE, k_PE = torch.randn(2, 7, dim, generator=generator, dtype=torch.float64)
    rope = Rope(RopeConfig(theta=50.0, interleaved=interleaved), dim)
    positions_P = torch.tensor([0, 1, 2, 5, 9, 100, 1000])
    rotation = rope(positions_P, torch.float64)
    found_PP = rotation.rotate(q_PE[:, None])[:, 0] @ rotation.rotate(k_PE[:, None])[:, 0].T

    def as_complex(x_PE: torch.Tensor) -> torch.Tensor:
        first, second = (x_PE[:, 0::2], x_PE[:, 1::2]) if interleaved else x_PE.chunk(2, dim=-1)
        angles = positions_P[:, None].double() * rope.inverse_frequency.double()
        return torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)

    expected_PP = (as_complex(q_PE) @ as_complex(k_PE).conj().T).real
    torch.testing.assert_close(found_PP, expected_PP, rtol=0.0, atol=1e-3)
    torch.testing.assert_close(found_PP[:5, :5], expected_PP[:5, :5], rtol=0.0, atol=1e-5)


def test_attention_factor_scales_cosine_and_sine() -> None:
    rope = Rope(RopeConfig(scaling="yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=1.5), 8)
    rotation = rope(torch.arange(5), torch.float64)
    torch.testing.assert_close(
        rotation.cos**2 + rotation.sin**2, torch.full_like(rotation.cos, 2.25), rtol=0, atol=1e-6
    )


def test_rotation_keeps_the_dtype() -> None:
    rotation = Rotation(torch.ones(3, 1, 4).bfloat16(), torch.zeros(3, 1, 4).bfloat16(), interleaved=False)
    x_PHE = torch.randn(3, 2, 4).bfloat16()
    assert torch.equal(rotation.rotate(x_PHE), x_PHE)


@pytest.mark.parametrize(("factor", "mscale_all_dim"), list(itertools.product([1.0, 4.0, 40.0], [None, 0.707, 1.0])))
def test_softmax_scale_follows_deepseek(factor: float, mscale_all_dim: float | None) -> None:
    modeling = transformers.models.deepseek_v3.modeling_deepseek_v3
    parameters = {
        "rope_type": "yarn",
        "factor": factor,
        **({"mscale_all_dim": mscale_all_dim} if mscale_all_dim else {}),
    }
    config = RopeConfig(
        scaling="yarn", factor=factor, mscale_all_dim=mscale_all_dim, original_max_position_embeddings=8
    )
    assert softmax_scale(config, 24) == pytest.approx(modeling.yarn_apply_mscale(parameters, 24**-0.5), rel=1e-12)


def test_yarn_temperature_of_the_paper() -> None:
    """Equation 22 at factor 40 (DeepSeek-V3): 0.1 ln 40 + 1."""
    assert yarn_temperature(40.0) == pytest.approx(1.3688879454, rel=1e-9)
    assert yarn_temperature(0.5) == 1.0
