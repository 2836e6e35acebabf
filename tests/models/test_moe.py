"""The router and the experts against definitions written out, and the bookkeeping of routes and loads."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rorqual.models.config import MoEConfig
from rorqual.models.moe import FREE_ROUTE, MixtureOfExperts, Router

HIDDEN = 10


def config(**changes: Any) -> MoEConfig:
    fields = {
        "num_experts": 8,
        "experts_per_token": 3,
        "expert_intermediate_size": 6,
        "num_shared_experts": 1,
        "num_groups": 4,
        "groups_per_token": 2,
        "routed_scaling": 1.7,
    }
    return MoEConfig(**{**fields, **changes})


def mixture(moe: MoEConfig, seed: int = 0) -> MixtureOfExperts:
    module = MixtureOfExperts(moe, HIDDEN).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
        if module.gate.e_score_correction_bias is not None:
            module.gate.e_score_correction_bias.copy_(torch.randn(moe.num_experts, generator=generator) * 0.2)
    return module


def tokens(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute_force(module: MixtureOfExperts, x_TD: Tensor, experts_TK: Tensor) -> Tensor:
    """DeepSeekMoE, one token and one expert at a time (arXiv 2412.19437, equations 12 to 15)."""
    moe = module.gate.config
    rows = []
    for x_D, chosen in zip(x_TD, experts_TK.tolist(), strict=True):
        logits_X = module.gate.weight @ x_D
        scores_X = logits_X.sigmoid() if moe.scoring == "sigmoid" else logits_X.softmax(-1)
        total = sum(scores_X[expert] for expert in chosen) if moe.normalize_weights else 1.0
        out_D = torch.zeros(HIDDEN, dtype=torch.float64)
        for expert in chosen:
            gate_up = module.experts.gate_up_proj[expert]
            width = moe.expert_intermediate_size
            inner = F.silu(gate_up[:width] @ x_D) * (gate_up[width:] @ x_D)
            out_D = out_D + scores_X[expert] / total * moe.routed_scaling * (module.experts.down_proj[expert] @ inner)
        rows.append(out_D)
    out_TD = torch.stack(rows)
    return out_TD if module.shared_experts is None else out_TD + module.shared_experts(x_TD)


@given(
    st.integers(0, 1000),
    st.sampled_from(["sigmoid", "softmax"]),
    st.booleans(),
    st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 3), (8, 3), (8, 8)]),
    st.integers(1, 3),
    st.integers(0, 2),
)
def test_output_equals_the_definition(
    seed: int, scoring: Any, normalize: bool, groups: tuple[int, int], per_token: int, shared: int
) -> None:
    moe = config(
        scoring=scoring,
        normalize_weights=normalize,
        num_groups=groups[0],
        groups_per_token=groups[1],
        experts_per_token=per_token,
        num_shared_experts=shared,
    )
    module, x_TD = mixture(moe, seed), tokens(7, seed)
    out_TD, experts_TK = module(x_TD)
    torch.testing.assert_close(out_TD, brute_force(module, x_TD, experts_TK), rtol=1e-10, atol=1e-10)
    biased_TX = scores(module.gate, x_TD)
    for biased_X, chosen in zip(biased_TX.tolist(), experts_TK.tolist(), strict=True):
        assert set(chosen) == best_choice(biased_X, moe)


def scores(router: Router, x_TD: Tensor) -> Tensor:
    logits_TX = x_TD @ router.weight.T
    if router.e_score_correction_bias is None:
        return logits_TX.softmax(-1)
    return logits_TX.sigmoid() + router.e_score_correction_bias


def best_choice(biased_X: list[float], moe: MoEConfig) -> set[int]:
    """Every set of groups, then every set of experts in the best one; nothing is sorted."""
    size = moe.num_experts // moe.num_groups
    members = [range(group * size, (group + 1) * size) for group in range(moe.num_groups)]

    def worth(group: int) -> float:
        pairs = itertools.combinations(members[group], min(2, size))
        return max(sum(biased_X[expert] for expert in pair) for pair in pairs)

    groups = max(
        itertools.combinations(range(moe.num_groups), moe.groups_per_token), key=lambda kept: sum(map(worth, kept))
    )
    open_experts = [expert for group in groups for expert in members[group]]
    choices = itertools.combinations(open_experts, moe.experts_per_token)
    return set(max(choices, key=lambda chosen: sum(biased_X[expert] for expert in chosen)))


@pytest.mark.parametrize("scoring", ("sigmoid", "softmax"))
def test_forcing_the_recorded_routes_changes_nothing(scoring: Any) -> None:
    """Output and every gradient, the router's among them, are the same bits."""
    module, x_TD = mixture(config(scoring=scoring)), tokens(20)
    results = []
    recorded = module(x_TD)[1]
    for forced in (None, recorded):
        module.zero_grad()
        out_TD, experts_TK = module(x_TD, forced)
        assert torch.equal(experts_TK, recorded)
        out_TD.square().sum().backward()
        results.append([out_TD.detach(), *(parameter.grad.clone() for parameter in module.parameters())])
    assert all(torch.equal(free, forced) for free, forced in zip(*results, strict=True))
    assert module.gate.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("scoring", ("sigmoid", "softmax"))
def test_forced_experts_are_weighed_by_the_current_router(scoring: Any) -> None:
    module, x_TD = mixture(config(scoring=scoring)), tokens(20)
    forced_TK = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(i))[:3] for i in range(20)])
    out_TD, experts_TK = module(x_TD, forced_TK)
    assert torch.equal(experts_TK, forced_TK)
    torch.testing.assert_close(out_TD, brute_force(module, x_TD, forced_TK), rtol=1e-10, atol=1e-10)


def test_gradient_of_a_forced_router_is_that_of_the_definition() -> None:
    module, x_TD = mixture(config()), tokens(5)
    forced_TK = torch.tensor([[0, 5, 2]] * 5)
    wanted = torch.autograd.grad(brute_force(module, x_TD, forced_TK).square().sum(), list(module.parameters()))
    found = torch.autograd.grad(module(x_TD, forced_TK)[0].square().sum(), list(module.parameters()))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", (torch.int16, torch.int64))
def test_rows_of_minus_one_stay_free(dtype: torch.dtype) -> None:
    module, x_TD = mixture(config()), tokens(12)
    free_TK = module(x_TD)[1]
    forced_TK = torch.tensor([[7, 0, 3]] * 12, dtype=dtype)
    forced_TK[::3] = FREE_ROUTE
    chosen_TK = module(x_TD, forced_TK)[1]
    assert torch.equal(chosen_TK[::3], free_TK[::3])
    assert torch.equal(chosen_TK[1::3], forced_TK[1::3].long())
    assert torch.equal(chosen_TK[2::3], forced_TK[2::3].long())


def test_bias_steers_the_choice_and_never_the_weights() -> None:
    module, x_TD = mixture(config(num_groups=1, groups_per_token=1)), tokens(10)
    with torch.no_grad():
        module.gate.e_score_correction_bias.zero_()
        module.gate.e_score_correction_bias[5] = 100.0
    weights_TK, experts_TK = module.gate(x_TD)
    assert (experts_TK == 5).any(dim=-1).all()
    assert (weights_TK <= 1.7).all()
    torch.testing.assert_close(weights_TK.sum(dim=-1), torch.full((10,), 1.7, dtype=torch.float64))


def test_router_scores_in_float32_for_a_bfloat16_model() -> None:
    """The choice is that of the float32 product of the stored bfloat16 numbers."""
    module, x_TD = mixture(config()).bfloat16(), tokens(200).bfloat16()
    weights_TK, experts_TK = module.gate(x_TD)
    exact = mixture(config())
    with torch.no_grad():
        exact.gate.weight.copy_(module.gate.weight.double())
    assert weights_TK.dtype == torch.float32
    expected_TK = exact.gate(x_TD.double())[1]
    assert experts_TK.sort(dim=-1).values.tolist() == expected_TK.sort(dim=-1).values.tolist()


# ------------------------------------------------------------------------------------------------------------ balancing


def test_balance_moves_each_bias_one_step_against_its_load() -> None:
    router = mixture(config(balance_rate=0.25)).gate.train()
    router.e_score_correction_bias.zero_()
    router.count(torch.tensor([[0, 1, 2], [0, 1, 3]]))
    router.count(torch.tensor([[0, 1, 4], [0, 1, 5]]))
    router.balance()
    mean = 12 / 8
    load = [4, 4, 1, 1, 1, 1, 0, 0]
    assert router.e_score_correction_bias.tolist() == [0.25 if count < mean else -0.25 for count in load]
    before = router.e_score_correction_bias.clone()
    router.balance()
    assert torch.equal(router.e_score_correction_bias, before), "loads are counted anew after each call"


def test_an_even_load_moves_nothing() -> None:
    router = mixture(config(experts_per_token=4, num_groups=1, groups_per_token=1)).gate.train()
    before = router.e_score_correction_bias.clone()
    router.count(torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]]))
    router.balance()
    assert torch.equal(router.e_score_correction_bias, before)


def test_softmax_router_has_no_bias_to_move() -> None:
    router = mixture(config(scoring="softmax")).gate.train()
    router.count(router(tokens(5))[1])
    router.balance()
    assert router.e_score_correction_bias is None
    assert not router.load_X.any()


def test_balancing_makes_a_lopsided_router_even() -> None:
    """Biases that begin far apart end with every expert near the mean load."""
    router = mixture(config(balance_rate=0.02, num_groups=1, groups_per_token=1)).gate.train()
    router.e_score_correction_bias.copy_(torch.linspace(-0.6, 0.6, 8))
    x_TD = tokens(400)

    def violation() -> float:
        load = torch.bincount(router(x_TD)[1].flatten(), minlength=8).double()
        return float(load.max() / load.mean() - 1)

    assert violation() > 0.7
    for _ in range(80):
        router.count(router(x_TD)[1])
        router.balance()
    assert violation() < 0.15
