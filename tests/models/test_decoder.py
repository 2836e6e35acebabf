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


@pytest.mark.parametrize(
    ("kind", "shape", "needed"),
    (
        ("mla", (9, 1, 3), r"\[9, 1, 3\].*\[9, 2, 3\]"),
        ("mla", (8, 2, 3), r"\[8, 2, 3\]"),
        ("gqa", (9, 1, 2), r"\[9, 0, 0\]"),
    ),
)
def test_routes_of_another_model_are_refused(
    tiny_decoder: Callable[..., Decoder], kind: str, shape: tuple[int, ...], needed: str
) -> None:
    with pytest.raises(ValueError, match=needed):
        tiny_decoder(kind)(random_ids(9), causal_layout([9]), torch.zeros(shape, dtype=torch.int16))


def test_cached_routes_are_the_packed_ones(tiny_decoder: Callable[..., Decoder]) -> None:
    decoder, ids = tiny_decoder("mla"), random_ids(14)
    expected = decoder(ids, causal_layout([7, 7])).routes
    cache = decoder.new_cache(2, 7)
    layout = cached_layout(range(2), [0, 0], 7, cache)
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


def test_evaluation_counts_no_load(tiny_decoder: Callable[..., Decoder]) -> None:
    decoder = tiny_decoder("mla").eval()
    decoder(random_ids(30), causal_layout([30]))
    assert not any(block.mlp.gate.load_X.any() for block in decoder.layers[1:])


def trained(decoder: Decoder, between: Callable[[], None] = lambda: None) -> tuple[list[torch.Tensor | None], int]:
    """Gradients of a pass in training mode, and how many numbers backward kept; `between` runs before backward."""
    decoder.train()
    decoder.zero_grad(set_to_none=True)
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_TD = decoder(random_ids(40), causal_layout([10, 30])).hidden
    between()
    (hidden_TD * torch.linspace(-1, 1, hidden_TD.numel(), dtype=hidden_TD.dtype).view_as(hidden_TD)).sum().backward()
    return [parameter.grad for parameter in decoder.parameters()], sum(kept)


@pytest.mark.parametrize("kind", ("gqa", "mla", "softmax"))
def test_checkpointed_activations_give_the_same_gradients_and_loads(
    tiny_decoder: Callable[..., Decoder], kind: str
) -> None:
    plain, frugal = tiny_decoder(kind), tiny_decoder(kind)
    frugal.checkpoint_activations = True
    expected, kept = trained(plain)
    found, fewer = trained(frugal)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)
    assert any(gradient is not None and gradient.any() for gradient in expected)
    assert fewer * 10 < kept
    for mine, theirs in zip(frugal.buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_backward_visits_the_experts_that_were_chosen(tiny_decoder: Callable[..., Decoder]) -> None:
    """Even where the router would choose others by then."""
    plain, frugal = tiny_decoder("mla"), tiny_decoder("mla")
    frugal.checkpoint_activations = True

    def steer() -> None:
        for block in frugal.layers[1:]:
            block.mlp.gate.e_score_correction_bias.add_(torch.linspace(-9, 9, block.mlp.gate.config.num_experts))

    for mine, theirs in zip(trained(frugal, steer)[0], trained(plain)[0], strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)
