"""The decoder as a whole: recorded routes, initialisation, parameter counts, ties."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rorqual.models.cache import cached_layout
from rorqual.models.decoder import Decoder
from rorqual.models.layout import causal_layout


def random_ids(length: int) -> torch.Tensor:
    return torch.randint(61, (length,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ("mla", "softmax"))
def test_recorded_routes_replay_bit_for_bit(tiny_decoder: Callable[..., Decoder], kind: str) -> None:
    decoder, ids, layout = tiny_decoder(kind), random_ids(17), causal_layout([5, 12])
    free = decoder(ids, layout)
    assert free.routes.shape == (17, len(decoder.config.moe_layers), decoder.config.moe.experts_per_token)
    forced = decoder(ids, layout, free.routes)
    assert torch.equal(forced.hidden, free.hidden)
    assert torch.equal(forced.routes, free.routes)


@pytest.mark.parametrize("kind", ("mla", "softmax"))
def test_each_layer_is_forced_by_its_own_column(tiny_decoder: Callable[..., Decoder], kind: str) -> None:
    decoder, ids, layout = tiny_decoder(kind), random_ids(9), causal_layout([9])
    moe = decoder.config.moe
    routes_TLK = torch.stack(
        [
            torch.arange(moe.experts_per_token).add(token + 2 * layer).remainder(moe.num_experts)
            for token in range(9)
            for layer in range(len(decoder.config.moe_layers))
        ]
    ).view(9, -1, moe.experts_per_token)
    assert torch.equal(decoder(ids, layout, routes_TLK).routes, routes_TLK)
    routes_TLK[4] = -1
    partly = decoder(ids, layout, routes_TLK).routes
    kept = torch.arange(9) != 4
    assert torch.equal(partly[kept], routes_TLK[kept])
    assert (partly[4] >= 0).all()


def test_cached_routes_are_the_packed_ones(tiny_decoder: Callable[..., Decoder]) -> None:
    decoder, ids = tiny_decoder("mla"), random_ids(14)
    expected = decoder(ids, causal_layout([7, 7])).routes
    cache = decoder.new_cache(2, 7)
    layout = cached_layout(range(2), torch.tensor([0, 0]), 7, cache)
    found = decoder.forward_cached(ids.view(2, 7), cache, layout).routes
    assert found.sort(dim=-1).values.tolist() == expected.sort(dim=-1).values.tolist()


def test_a_dense_model_has_no_routes(tiny_decoder: Callable[..., Decoder]) -> None:
    assert tiny_decoder("gqa")(random_ids(4), causal_layout([4])).routes is None


@pytest.mark.parametrize("kind", ("gqa", "mla", "softmax"))
def test_parameter_counts(tiny_decoder: Callable[..., Decoder], kind: str) -> None:
    """Active parameters by hand: subtract the experts that a token does not visit."""
    decoder = tiny_decoder(kind)
    assert decoder.num_parameters == sum(tensor.numel() for tensor in decoder.parameters())
    idle = 0
    if decoder.config.moe is not None:
        moe = decoder.config.moe
        one_expert = 3 * decoder.config.hidden_size * moe.expert_intermediate_size
        idle = (moe.num_experts - moe.experts_per_token) * one_expert * len(decoder.config.moe_layers)
    assert decoder.num_active_parameters == decoder.num_parameters - idle


def test_initialize_is_seeded_and_scaled(tiny_decoder: Callable[..., Decoder]) -> None:
    config = tiny_decoder("mla", hidden_size=64, intermediate_size=96, initializer_range=0.02).config
    first, second = Decoder(config), Decoder(config)
    first.initialize(torch.Generator().manual_seed(4))
    second.initialize(torch.Generator().manual_seed(4))
    state = second.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.state_dict().items())
    assert first.layers[0].self_attn.q_a_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert first.layers[0].mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.1)
    assert first.layers[1].mlp.experts.down_proj.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.1)
    assert first.norm.weight.eq(1.0).all()


def test_tied_embeddings_are_one_parameter(tiny_decoder: Callable[..., Decoder]) -> None:
    decoder = tiny_decoder("gqa", tie_embeddings=True)
    assert decoder.unembedding_VD is decoder.embed_tokens.weight
    assert not any(name.startswith("lm_head") for name in decoder.state_dict())


def test_update_expert_bias_reaches_every_router(tiny_decoder: Callable[..., Decoder]) -> None:
    decoder = tiny_decoder("mla").train()
    biases = [block.mlp.gate.e_score_correction_bias for block in decoder.layers[1:]]
    before = [bias.clone() for bias in biases]
    decoder(random_ids(30), causal_layout([30]))
    decoder.update_expert_bias()
    for bias, old in zip(biases, before, strict=True):
        assert (bias - old).abs().max().item() == pytest.approx(decoder.config.moe.balance_rate, rel=1e-3)
