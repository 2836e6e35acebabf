"""Parameter groups and schedules."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.train.optim import OptimizerConfig, build_optimizer, learning_rate
from tests.train.fakes import build_decoder


@pytest.mark.parametrize("decay_embeddings", [False, True])
@pytest.mark.parametrize("kind", ["gqa", "mla_moe"])
def test_norms_and_biases_never_decay_and_embeddings_by_choice(kind: str, decay_embeddings: bool) -> None:
    model = build_decoder(kind)
    frozen = model.layers[0].input_layernorm.weight.requires_grad_(False)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3, decay_embeddings=decay_embeddings))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert id(frozen) not in decay
    assert len(decay) == len(list(model.parameters())) - 1
    for name, parameter in model.named_parameters():
        if parameter is frozen:
            continue
        is_embedding = "embed_tokens" in name or "lm_head" in name
        spared = parameter.dim() < 2 or (is_embedding and not decay_embeddings)
        assert decay[id(parameter)] == (0.0 if spared else 0.3), name


def test_refuses_a_frozen_model() -> None:
    with pytest.raises(ValueError, match="nothing to optimise"):
        build_optimizer(build_decoder("gqa").requires_grad_(False), OptimizerConfig())


def test_schedules_at_known_steps() -> None:
    common = {"learning_rate": 2.0, "warmup_steps": 10, "total_steps": 110, "final_fraction": 0.1}
    rates = {
        name: [
            learning_rate(OptimizerConfig(schedule=name, **common), step) for step in (0, 9, 10, 60, 90, 100, 110, 999)
        ]
        for name in ("constant", "cosine", "linear", "wsd")
    }
    assert rates["constant"] == pytest.approx([0.2, 2, 2, 2, 2, 2, 2, 2])
    assert rates["linear"] == pytest.approx([0.2, 2, 2, 1.1, 0.56, 0.38, 0.2, 0.2])
    assert rates["wsd"] == pytest.approx([0.2, 2, 2, 2, 2, 1.1, 0.2, 0.2])
    quarter = [0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi * x)) for x in (0.5, 0.8, 0.9)]
    assert rates["cosine"] == pytest.approx([0.2, 2, 2, *quarter, 0.2, 0.2])


@given(schedule=st.sampled_from(["cosine", "linear", "wsd"]), warmup=st.integers(0, 20), step=st.integers(0, 200))
def test_rates_never_rise_after_warm_up_and_stay_in_range(schedule: str, warmup: int, step: int) -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_steps=warmup, total_steps=100)
    now, later = learning_rate(config, step), learning_rate(config, step + 1)
    assert 0.0 < now <= 1.0
    assert now <= later if step + 1 < warmup else step < warmup or later <= now >= 0.1 - 1e-12


def test_refuses_bad_values() -> None:
    for field, bad in {
        "schedule": "sine",
        "learning_rate": -1.0,
        "warmup_steps": -1,
        "final_fraction": 2.0,
        "max_grad_norm": 0.0,
        "decay_fraction": 0.0,
    }.items():
        with pytest.raises(ValueError, match=field):
            OptimizerConfig(**{field: bad})
    with pytest.raises(ValueError, match="total_steps"):
        OptimizerConfig(schedule="cosine", warmup_steps=5, total_steps=5)
    with pytest.raises(ValueError, match="count from 0"):
        learning_rate(OptimizerConfig(), -1)
