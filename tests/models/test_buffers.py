"""Casting a model leaves rotary frequencies and router biases exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rorqual.models.config import RopeConfig
from rorqual.models.decoder import Decoder
from rorqual.models.rope import Rope


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_cast_keeps_buffers(tiny_decoder: Callable[..., Decoder], dtype: torch.dtype) -> None:
    decoder = tiny_decoder("mla")
    before = {name: buffer.clone() for name, buffer in decoder.named_buffers()}
    decoder.to(dtype)
    assert decoder.embed_tokens.weight.dtype == dtype
    after = dict(decoder.named_buffers())
    assert any(name.endswith("e_score_correction_bias") for name in after)
    for name, buffer in after.items():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, before[name])


def test_far_positions_survive_bfloat16() -> None:
    """At position 100,000 a frequency rounded to bfloat16 would be off by many turns."""
    rope = Rope(RopeConfig(theta=1e6), 64)
    exact = rope(torch.tensor([100_000]), torch.float32).cos.clone()
    assert torch.equal(rope.bfloat16()(torch.tensor([100_000]), torch.float32).cos, exact)


def test_meta_device_model_has_its_frequencies() -> None:
    with torch.device("meta"):
        rope = Rope(RopeConfig(), 8)
    assert torch.equal(rope.inverse_frequency, Rope(RopeConfig(), 8).inverse_frequency)
