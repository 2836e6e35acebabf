"""Draws against the float64 definition of each truncation, and against the frequencies that they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rorqual.engines.sampling import Draws, Sampler, uniforms
from rorqual.records import SamplingParams


def reference_support(logits_V: Tensor, params: SamplingParams) -> list[int]:
    """The kept ids by the definition, one token at a time in descending order."""
    probs = (logits_V.double() / params.temperature).softmax(-1)
    order = probs.argsort(descending=True, stable=True).tolist()
    if params.top_k:
        order = order[: params.top_k]
    total = sum(float(probs[i]) for i in order)
    kept: list[int] = []
    mass = 0.0
    for token in order:
        if params.top_p < 1.0 and mass >= params.top_p * total:
            break
        kept.append(token)
        mass += float(probs[token])
    best = float(probs[order[0]])
    return sorted(token for token in kept if float(probs[token]) >= params.min_p * best)


def supports(draws: Draws) -> list[list[int]]:
    return [part.tolist() for part in draws.kept_ids_N.split(draws.kept_count_R.tolist())]


@settings(max_examples=60, deadline=None)
@given(
    vocabulary=st.sampled_from([3, 40, 70, 600]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 100]),
    min_p=st.sampled_from([0.0, 0.02, 0.5]),
    spread=st.sampled_from([0.1, 1.0, 6.0]),
    seed=st.integers(0, 10_000),
)
def test_truncation_keeps_what_its_definition_keeps(
    vocabulary: int, temperature: float, top_p: float, top_k: int, min_p: float, spread: float, seed: int
) -> None:
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed)
    logits_RV = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread
    draws = Sampler([params] * 3).draw(logits_RV.clone(), np.arange(3))
    whole = [list(range(vocabulary))] * 3
    kept = [reference_support(row, params) for row in logits_RV]
    assert supports(draws) == (kept if params.truncates else [[], [], []])
    for row, support in enumerate(kept if params.truncates else whole):
        probs = (logits_RV[row] / temperature).softmax(-1)
        renormalised = probs[support] / probs[support].sum()
        token = int(draws.token_R[row])
        assert token in support
        assert float(draws.logprob_R[row]) == pytest.approx(float(renormalised[support.index(token)].log()), abs=1e-9)
        assert float(draws.kept_mass_R[row]) == pytest.approx(float(probs[support].sum()), abs=1e-9)
        entropy = -torch.special.xlogy(renormalised, renormalised).sum()
        assert float(draws.entropy_R[row]) == pytest.approx(float(entropy), abs=1e-9)


@pytest.mark.parametrize("vocabulary", [5, 255, 256, 1000])
@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(top_p=0.8, temperature=0.7), SamplingParams(top_k=4)]
)
def test_frequencies_are_those_of_the_distribution(vocabulary: int, params: SamplingParams) -> None:
    num_draws = 40_000
    logits_V = torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 2
    draws = Sampler([params] * num_draws).draw(logits_V.expand(num_draws, -1).clone(), np.arange(num_draws))
    expected_V = torch.zeros(vocabulary, dtype=torch.float64)
    support = reference_support(logits_V, params)
    probs_V = (logits_V.double() / params.temperature).softmax(-1)
    expected_V[support] = probs_V[support] / probs_V[support].sum()
    found_V = torch.bincount(draws.token_R, minlength=vocabulary) / num_draws
    standard_error_V = (expected_V * (1 - expected_V) / num_draws).sqrt()
    assert bool(((found_V - expected_V).abs() <= 5 * standard_error_V + 1e-9).all())


def test_a_draw_depends_on_seed_and_counter_alone() -> None:
    logits_RV = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)) * 2
    params = [
        SamplingParams(seed=row, top_p=0.9 if row % 3 == 0 else 1.0, temperature=0.0 if row % 7 == 0 else 1.0)
        for row in range(40)
    ]
    counters = np.arange(40) * 3
    together = Sampler(params).draw(logits_RV.clone(), counters)
    for row in range(40):
        alone = Sampler([params[row]]).draw(logits_RV[row : row + 1].clone(), counters[row : row + 1])
        assert int(alone.token_R[0]) == int(together.token_R[row])
        assert supports(alone)[0] == supports(together)[row]
        assert float(alone.logprob_R[0]) == pytest.approx(float(together.logprob_R[row]), abs=1e-6)


def test_greedy_takes_the_best_token_with_certainty() -> None:
    logits_RV = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 0.0]])
    draws = Sampler([SamplingParams(temperature=0.0)] * 2).draw(logits_RV.clone(), np.zeros(2))
    assert draws.token_R.tolist() == [1, 0]
    assert draws.logprob_R.tolist() == [0.0, 0.0]
    assert draws.kept_mass_R.tolist() == pytest.approx(logits_RV.softmax(-1).max(-1).values.tolist())


def test_uniforms_look_uniform_and_independent() -> None:
    seeds, counters = np.divmod(np.arange(200_000), 500)
    values = uniforms(seeds, counters)
    assert values.min() >= 0.0 and values.max() < 1.0
    assert abs(values.mean() - 0.5) < 5 * (1 / 12 / len(values)) ** 0.5
    histogram = np.histogram(values, bins=100, range=(0, 1))[0]
    assert abs(histogram - 2000).max() < 5 * 2000**0.5
    grid = values.reshape(-1, 500)
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.02


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(temperature=0.0)])
def test_nan_logits_are_refused(params: SamplingParams) -> None:
    logits_RV = torch.zeros(3, 10)
    logits_RV[1, 4] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinite in 1 of 3 rows.*row 1"):
        Sampler([params] * 3).draw(logits_RV, np.zeros(3))
    for row in ([0.0, 1.0, math.inf, 3.0], [-math.inf] * 4):
        for dtype in (torch.float32, torch.float64):
            with pytest.raises(ValueError, match="NaN or infinite in 1 of 1 rows"):
                Sampler([params]).draw(torch.tensor([row], dtype=dtype), np.zeros(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_that_is_ruled_out_costs_nothing(dtype: torch.dtype) -> None:
    logits_RV = torch.tensor([[0.0, -math.inf, 1.0]], dtype=dtype)
    draws = Sampler([SamplingParams()]).draw(logits_RV.clone(), np.zeros(1))
    probs = torch.tensor([[0.0, 1.0]]).softmax(-1)
    assert float(draws.entropy_R) == pytest.approx(float(-(probs * probs.log()).sum()), rel=1e-5)
    assert float(draws.logprob_R) == pytest.approx(float(logits_RV.log_softmax(-1)[0, draws.token_R]), rel=1e-5)


def test_a_top_k_beyond_every_vocabulary_keeps_all() -> None:
    draws = Sampler([SamplingParams(top_k=10**30)]).draw(torch.zeros(1, 5), np.zeros(1))
    assert draws.kept_ids_N.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "field",
    [
        *({"temperature": -1.0}, {"temperature": 1e-39}, {"temperature": math.inf}, {"top_p": 0.0}, {"top_p": 1.2}),
        *({"top_k": -1}, {"min_p": 1.0}, {"max_new_tokens": 0}),
    ],
)
def test_parameters_out_of_range_are_named(field: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        SamplingParams(**field)  # type: ignore[arg-type]
