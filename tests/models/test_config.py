"""Sizes that do not fit together are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from rorqual.models.attention import GroupedQueryAttention, MultiHeadLatentAttention, attention_class
from rorqual.models.config import MLAConfig, ModelConfig, MoEConfig
from rorqual.records import from_json, to_json

SIZES: dict[str, Any] = {
    "family": "llama",
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 2,
    "context_window": 16,
}
EXPERTS: dict[str, Any] = {"num_experts": 8, "experts_per_token": 2, "expert_intermediate_size": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, r"num_kv_heads = 3 must divide num_heads = 4"),
        ({"head_dim": 3}, r"rotary dimension is 3"),
        ({"mla": MLAConfig(qk_rope_head_dim=5)}, r"rotary dimension is 5"),
        ({"moe": MoEConfig(**{**EXPERTS, "num_groups": 3})}, r"num_groups = 3 must divide num_experts = 8"),
        ({"moe": MoEConfig(**{**EXPERTS, "num_groups": 8})}, r"experts_per_token = 2 is out of range.*1 experts"),
        ({"moe": MoEConfig(**{**EXPERTS, "experts_per_token": 0})}, r"experts_per_token = 0 is out of range"),
    ],
)
def test_misfits_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**SIZES, **changes})


def test_moe_layers_are_those_that_are_not_dense() -> None:
    assert ModelConfig(**SIZES).moe_layers == ()
    assert ModelConfig(**SIZES, moe=MoEConfig(**EXPERTS, dense_layers=(0, 2))).moe_layers == (1, 3)


def test_json_round_trip() -> None:
    config = ModelConfig(**SIZES, mla=MLAConfig(), moe=MoEConfig(**EXPERTS, dense_layers=(0,)))
    assert from_json(to_json(config), ModelConfig) == config


def test_the_attention_kind_is_a_setting_that_is_read() -> None:
    assert attention_class(ModelConfig(**SIZES)) is GroupedQueryAttention
    assert attention_class(ModelConfig(**SIZES, mla=MLAConfig())) is MultiHeadLatentAttention
    with pytest.raises(ValueError, match="no attention 'sideways'; there is dense"):
        attention_class(ModelConfig(**SIZES, attention="sideways"))
