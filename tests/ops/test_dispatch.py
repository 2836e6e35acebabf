"""Which implementation is chosen, and what is said where none can be."""

from __future__ import annotations

import pytest
import torch

from rorqual.models.config import DSAConfig, ModelConfig
from rorqual.models.convert import with_attention
from rorqual.models.decoder import Decoder
from rorqual.ops import dispatch, dsa_tiled

CPU = torch.zeros(2)


def test_a_name_decides() -> None:
    assert dispatch.dsa_kernels(CPU, "tiled") is dsa_tiled


def test_float64_stays_in_torch() -> None:
    assert dispatch.dsa_kernels(CPU.double()) is dsa_tiled


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="kernels = 'cuda'; expected one of auto, tiled"):
        dispatch.dsa_kernels(CPU, "cuda")  # type: ignore[arg-type]


@pytest.mark.parametrize("kernels", ["compiled", "triton"])
def test_a_missing_extra_is_named(kernels: dispatch.Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_installed", lambda name: False)
    table = {"tiled": "t", kernels: "m"}
    with pytest.raises(ValueError, match=rf"rorqual\[{dispatch.NEEDS[kernels][1]}\]"):
        dispatch.chosen(CPU, kernels, table)
    assert dispatch.chosen(CPU, "auto", table) == "tiled"


def test_a_model_hands_its_choice_to_every_layer_and_keeps_it_when_its_attention_changes() -> None:
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_layers": 2, "context_window": 8}
    heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4}
    dsa = DSAConfig(top_k=2, num_heads=1, head_dim=4, rope_dim=2)
    model = Decoder(ModelConfig(family="qwen3", attention="dsa", dsa=dsa, **sizes, **heads))
    model.kernels = "tiled"
    other = with_attention(model, "dense")
    assert other.kernels == "tiled"
    assert {block.self_attn.rule.kernels for block in (*model.layers, *other.layers)} == {"tiled"}
