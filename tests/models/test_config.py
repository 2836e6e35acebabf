"""Sizes that do not fit together are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from rorqual.models.attention import GroupedQueryAttention, MultiHeadLatentAttention
from rorqual.models.config import DSAConfig, MLAConfig, ModelConfig, MoEConfig
from rorqual.models.kinds import build_attention
from rorqual.models.sparse import SparseGroupedQueryAttention, SparseLatentAttention
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
        ({"attention": "dsa"}, r'attention = "dsa" needs ModelConfig.dsa'),
        ({"dsa": DSAConfig(top_k=0)}, r"top_k = 0; expected at least 1"),
        ({"dsa": DSAConfig(head_dim=32)}, r"rope_dim = 64 must be even and at most head_dim = 32"),
        ({"dsa": DSAConfig(head_dim=96, hadamard=True)}, r"power of two; it is 96"),
        ({"dsa": DSAConfig(shared_layers=(0,))}, r"layer 0 has no layer below"),
        ({"dsa": DSAConfig(shared_layers=(4,))}, r"the model has 4 layers"),
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


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, GroupedQueryAttention),
        ({"mla": MLAConfig()}, MultiHeadLatentAttention),
        ({"attention": "dsa", "dsa": DSAConfig()}, SparseGroupedQueryAttention),
        ({"attention": "dsa", "dsa": DSAConfig(), "mla": MLAConfig()}, SparseLatentAttention),
        ({"dsa": DSAConfig()}, SparseGroupedQueryAttention),
    ],
)
def test_the_attention_kind_is_a_setting_that_is_read(changes: dict[str, Any], kind: type) -> None:
    assert type(build_attention(ModelConfig(**{**SIZES, **changes}), layer=0)) is kind
