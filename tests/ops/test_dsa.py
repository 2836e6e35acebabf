"""DSA's twins against definitions written out in loops, and the tiled forms against the twins."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rorqual.ops import dsa, dsa_tiled

SCALE = 0.3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=[1 << 20, 40], ids=["one tile", "many tiles"])
def tile_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(dsa_tiled, "TILE_ELEMENTS", request.param)
    return int(request.param)


def problem(
    rows: int = 2,
    queries: int = 7,
    keys: int = 11,
    groups: int = 2,
    sharing: int = 3,
    seed: int = 0,
    valid: bool = True,
) -> dict[str, Any]:
    """Inputs of every function; row 1 has two keys switched off in front of the queries' own."""
    key_valid = torch.ones(rows, keys, dtype=torch.bool)
    if valid and rows > 1 and keys - queries >= 3:
        key_valid[1, 1:3] = False
    return {
        "q": random(rows, queries, groups * sharing, 5),
        "k": random(rows, keys, groups, 5, seed=1),
        "v": random(rows, keys, groups, 4, seed=2),
        "index_q": random(rows, queries, 3, 6, seed=3),
        "index_k": random(rows, keys, 6, seed=4),
        "weight": random(rows, queries, 3, seed=5),
        "last": torch.arange(keys - queries, keys).expand(rows, -1),
        "key_valid": key_valid if valid else None,
    }


def selection(p: dict[str, Any], top_k: int) -> Tensor:
    index = dsa.IndexerOutput(p["index_q"], p["index_k"], p["weight"])
    return dsa_tiled.select_keys(index, p["last"], p["key_valid"], top_k)


SHAPES = [
    {},
    {"rows": 1, "queries": 1, "keys": 1, "groups": 1, "sharing": 1},
    {"rows": 1, "queries": 9, "keys": 9, "valid": False},
    {"rows": 3, "queries": 1, "keys": 13, "groups": 1, "sharing": 16},
    {"rows": 2, "queries": 5, "keys": 5, "groups": 4, "sharing": 1},
]


# ---------------------------------------------------------------------------------------------------------- selection


def test_index_scores_are_their_equation() -> None:
    p = problem(rows=1, queries=3, keys=4)
    found = dsa.index_scores(p["index_q"], p["index_k"], p["weight"])
    for t, s in itertools.product(range(3), range(4)):
        terms = [
            float(p["weight"][0, t, j]) * max(0.0, float(p["index_q"][0, t, j] @ p["index_k"][0, s])) for j in range(3)
        ]
        assert float(found[0, t, s]) == pytest.approx(sum(terms), abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(
    scores=st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, math.inf, -math.inf, math.nan]), min_size=1, max_size=9
    ),
    queries=st.integers(1, 4),
    top_k=st.integers(1, 11),
    switched_off=st.sets(st.integers(0, 8)),
)
def test_selection_is_the_first_k_of_a_stable_sort(
    scores: list[float], queries: int, top_k: int, switched_off: set[int]
) -> None:
    """Plateaus, infinities, NaN and hidden keys: by score, then by position, then in ascending order."""
    num_keys, queries = len(scores), min(queries, len(scores))
    valid = torch.tensor([[key not in switched_off for key in range(num_keys)]])
    last = torch.arange(num_keys - queries, num_keys)[None]
    visible = dsa.visible_keys(last, num_keys, valid)
    found = dsa.select(torch.tensor(scores)[None, None].expand(1, queries, -1), visible, top_k)
    for query in range(queries):
        seen = [key for key in range(num_keys - queries + query + 1) if key not in switched_off]
        rank = {key: -math.inf if math.isnan(scores[key]) else scores[key] for key in seen}
        lowest = torch.finfo(torch.float32).min
        best = sorted(seen, key=lambda key: (-max(rank[key], lowest), key))[:top_k]
        expected = sorted(best) + [-1] * (min(top_k, num_keys) - len(best))
        assert found[0, query].tolist() == expected


def test_a_selection_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k = 0"):
        dsa.select(random(1, 1, 2), torch.ones(1, 1, 2, dtype=torch.bool), 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("top_k", [1, 4, 50])
def test_tiled_selection(shape: dict[str, Any], top_k: int, tile_size: int) -> None:
    p = problem(**shape)
    scores = dsa.index_scores(p["index_q"], p["index_k"], p["weight"])
    visible = dsa.visible_keys(p["last"], p["k"].shape[1], p["key_valid"])
    expected = dsa.select(scores, visible, top_k)
    assert torch.equal(selection(p, top_k), expected)


# ---------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_over_all_keys_is_dense(shape: dict[str, Any]) -> None:
    p = problem(**shape)
    visible = dsa.visible_keys(p["last"], p["k"].shape[1], p["key_valid"])
    found = dsa.sparse_attention(p["q"], p["k"], p["v"], selection(p, 99), SCALE)
    q, k, v = (p[name].transpose(1, 2) for name in "qkv")
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=visible[:, None], scale=SCALE, enable_gqa=True
    )
    torch.testing.assert_close(found, dense.transpose(1, 2), rtol=1e-10, atol=1e-10)


def test_attention_sees_the_selected_keys_alone() -> None:
    p = problem(rows=1, queries=2, keys=6, groups=1, sharing=1, valid=False)
    selected = torch.tensor([[[0, 3], [4, -1]]])
    found = dsa.sparse_attention(p["q"], p["k"], p["v"], selected, SCALE)[0, :, 0]
    weights = (SCALE * p["k"][0, [0, 3], 0] @ p["q"][0, 0, 0]).softmax(0)
    torch.testing.assert_close(found[0], weights @ p["v"][0, [0, 3], 0])
    torch.testing.assert_close(found[1], p["v"][0, 4, 0])


def test_a_query_without_keys_gets_zero() -> None:
    p = problem(rows=1, queries=1, keys=3, groups=1, sharing=2, valid=False)
    nothing = torch.full((1, 1, 2), -1)
    assert not dsa.sparse_attention(p["q"], p["k"], p["v"], nothing, SCALE).any()
    kl, uniform = dsa.indexer_kl(p["q"], p["k"], SCALE, random(1, 1, 3), nothing)
    assert not kl.any() and not uniform.any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("top_k", [1, 3, 99])
def test_tiled_attention(shape: dict[str, Any], top_k: int, tile_size: int) -> None:
    p = problem(**shape)
    selected = selection(p, top_k)
    inputs = [p[name].requires_grad_() for name in "qkv"]
    expected = dsa.sparse_attention(*inputs, selected, SCALE)
    direction = random(*expected.shape, seed=9)
    gradients = torch.autograd.grad(expected, inputs, direction)
    found = dsa_tiled.sparse_attention(*inputs, selected, SCALE)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(found, inputs, direction), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_gradients_by_differences() -> None:
    p = problem(rows=2, queries=3, keys=5)
    selected = selection(p, 3)
    inputs = tuple(p[name].requires_grad_() for name in "qkv")
    assert torch.autograd.gradcheck(lambda q, k, v: dsa.sparse_attention(q, k, v, selected, SCALE), inputs)
    assert torch.autograd.gradcheck(lambda q, k, v: dsa_tiled.sparse_attention(q, k, v, selected, SCALE), inputs)


# --------------------------------------------------------------------------------------------------- the indexer's loss


def kl_by_definition(p: dict[str, Any], row: int, query: int, keys: list[int]) -> tuple[float, float]:
    heads, groups = p["q"].shape[2], p["k"].shape[2]
    target = torch.zeros(len(keys), dtype=torch.float64)
    for head in range(heads):
        target += (SCALE * p["k"][row, keys, head * groups // heads] @ p["q"][row, query, head]).softmax(0)
    target /= target.sum()
    products = (p["index_k"][row, keys] @ p["index_q"][row, query].T).relu()
    predicted = (products @ p["weight"][row, query]).softmax(0)
    uniform = torch.full_like(target, 1 / len(keys))
    return float((target * (target / predicted).log()).sum()), float((target * (target / uniform).log()).sum())


@pytest.mark.parametrize("top_k", [3, 99])
def test_kl_is_its_definition(top_k: int) -> None:
    p = problem()
    selected = selection(p, top_k)
    scores = dsa.index_scores(p["index_q"], p["index_k"], p["weight"])
    kl, uniform = dsa.indexer_kl(p["q"], p["k"], SCALE, scores, selected)
    for row, query in itertools.product(range(2), range(7)):
        keys = [key for key in selected[row, query].tolist() if key >= 0]
        expected = kl_by_definition(p, row, query, keys)
        assert (float(kl[row, query]), float(uniform[row, query])) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("top_k", [1, 3, None])
def test_tiled_kl(shape: dict[str, Any], top_k: int | None, tile_size: int) -> None:
    """Value and all gradients, over a selection and, in the warm-up, over all visible keys."""
    p = problem(**shape)
    index = dsa.IndexerOutput(*(p[name].requires_grad_() for name in ("index_q", "index_k", "weight")))
    q, k = p["q"].requires_grad_(), p["k"].requires_grad_()
    row_weight = random(*q.shape[:2], seed=8)
    scores = dsa.index_scores(*index)
    everything = selection(p, 99)
    selected = everything if top_k is None else selection(p, top_k)
    expected, expected_uniform = dsa.indexer_kl(q, k, SCALE, scores, selected)
    gradients = torch.autograd.grad((expected * row_weight).sum() * 0.7, index)
    main = dsa_tiled.MainAttention(q, k, SCALE, p["last"], p["key_valid"])
    loss, kl, uniform = dsa_tiled.indexer_kl(main, index, row_weight, None if top_k is None else selected)
    torch.testing.assert_close(kl, expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(uniform, expected_uniform, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss, (expected * row_weight).sum(), rtol=1e-10, atol=1e-12)
    found = torch.autograd.grad(loss * 0.7, (*index, q, k), allow_unused=True)
    assert found[3] is None and found[4] is None, "the target is a constant"
    for ours, theirs in zip(found[:3], gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_warm_up_reaches_every_visible_key() -> None:
    """Restricted to the selection, the loss would teach an untrained indexer its own ranking."""
    p = problem(rows=1, queries=8, keys=8, valid=False)
    index = dsa.IndexerOutput(p["index_q"].abs(), p["index_k"].abs().requires_grad_(), p["weight"])
    last_query = torch.zeros(1, 8, dtype=torch.float64)
    last_query[0, -1] = 1.0
    for selected, reached in ((None, 8), (selection(p, 3), 3)):
        main = dsa_tiled.MainAttention(p["q"], p["k"], SCALE, p["last"])
        loss, _, _ = dsa_tiled.indexer_kl(main, index, last_query, selected)
        (gradient,) = torch.autograd.grad(loss, index.k)
        assert int(gradient.any(dim=-1).sum()) == reached


# ------------------------------------------------------------------------------------------------------ representation


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_hadamard_keeps_products(size: int) -> None:
    a, b = random(5, size), random(5, size, seed=1)
    torch.testing.assert_close((dsa.hadamard(a) * dsa.hadamard(b)).sum(-1), (a * b).sum(-1))
    matrix = dsa.hadamard(torch.eye(size, dtype=torch.float64)) * size**0.5
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    torch.testing.assert_close(matrix, torch.tensor(signs, dtype=torch.float64))


def test_hadamard_needs_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="power of two; the index dimension is 12"):
        dsa.hadamard(random(12))


def e4m3_values() -> list[float]:
    """Every non-negative number of float8 e4m3fn, from its definition."""
    subnormal = [mantissa / 8 * 2.0**-6 for mantissa in range(8)]
    normal = [(1 + mantissa / 8) * 2.0 ** (exponent - 7) for exponent in range(1, 16) for mantissa in range(8)]
    return [*subnormal, *normal][:-1]  # The last pattern is NaN.


def test_fp8_is_the_nearest_number_at_the_least_power_of_two() -> None:
    values = e4m3_values()
    assert values[-1] == dsa.FP8_MAX
    for seed, magnitude in enumerate((1e-6, 1e-3, 1.0, 448.0, 449.0, 3e4)):
        x = random(16, seed=seed).float() * magnitude
        quantized, scale = dsa.fp8_quantize(x)
        amax = max(float(x.abs().max()), 1e-4)
        exponent = math.log2(float(scale))
        assert exponent == int(exponent)
        assert amax <= 448 * float(scale) and amax > 448 * float(scale) / 2
        for exact, found in zip(x.tolist(), quantized.float().tolist(), strict=True):
            distance = min(abs(abs(exact) / float(scale) - value) for value in values)
            assert abs(found - exact / float(scale)) == pytest.approx(distance, abs=1e-12)


@pytest.mark.parametrize("exponent", [-20, -3, 0, 5])
def test_fp8_scale_at_its_borders(exponent: int) -> None:
    """An amax of exactly 448 * 2^n still fits; the next float32 needs the next power."""
    border = torch.tensor(448.0 * 2.0**exponent).clamp(min=1e-4)
    above = torch.nextafter(border, torch.tensor(math.inf))
    if float(border) > 1e-4:
        assert float(dsa.fp8_quantize(border[None])[1]) == 2.0**exponent
        assert float(dsa.fp8_quantize(above[None])[1]) == 2.0 ** (exponent + 1)


def test_fp8_rounding_lets_gradients_pass() -> None:
    x = random(3, 8).requires_grad_()
    dsa.fp8_round(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert not torch.equal(dsa.fp8_round(x), x)


@pytest.mark.parametrize("top_k", [1, 3, 99])
def test_recall_is_the_share_of_attention_on_the_selected_keys(top_k: int, tile_size: int) -> None:
    p = problem()
    index = dsa.IndexerOutput(p["index_q"], p["index_k"], p["weight"])
    main = dsa_tiled.MainAttention(p["q"], p["k"], SCALE, p["last"], p["key_valid"])
    found = dsa_tiled.attention_recall(main, index, top_k)
    everything, selected = selection(p, 99), selection(p, top_k)
    weights = dsa.attention_weights(p["q"], p["k"], everything, SCALE).mean(dim=2)
    for row, query in itertools.product(range(2), range(7)):
        chosen = set(selected[row, query].tolist()) - {-1}
        keys = everything[row, query].tolist()
        expected = sum(float(weights[row, query, at]) for at, key in enumerate(keys) if key in chosen)
        assert float(found[row, query]) == pytest.approx(expected, abs=1e-12)
    assert torch.allclose(found, torch.ones_like(found)) == (top_k == 99)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_many_heads_in_half_precision_still_add_up_to_one(dtype: torch.dtype) -> None:
    """An indexer that knows nothing has the KL of the uniform prediction, however many heads are summed up."""
    heads, tokens = 64, 300
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, tokens, number, 8, generator=generator).to(dtype) for number in (heads, 1))
    index = dsa.IndexerOutput(q[:, :, :1] * 0, k[:, :, 0] * 0, q[:, :, :1, 0] * 0)
    last = torch.arange(tokens)[None]
    main = dsa_tiled.MainAttention(q, k, SCALE, last)
    everything = dsa_tiled.select_all(last, tokens, None)
    for selected in (None, everything):
        _, kl, uniform = dsa_tiled.indexer_kl(main, index, torch.ones(1, tokens), selected)
        torch.testing.assert_close(kl, uniform, rtol=1e-3, atol=1e-5)
    assert dsa_tiled.attention_recall(main, index, tokens).sub(1).abs().max() < 1e-5
