"""Sparse attention in compiled loops against the twins: selections exactly, outputs and gradients to float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rorqual.ops import dsa, dsa_tiled, nsa
from rorqual.ops.cpu import dsa as dsa_cpu
from rorqual.ops.cpu import nsa as nsa_cpu
from rorqual.ops.cpu.compiled import NUMBA
from rorqual.ops.cpu.workers import spread

pytestmark = pytest.mark.skipif(NUMBA is None, reason="numba, the extra `cpu`, is not installed")

BOUND = 1e-5


@pytest.fixture(params=[1, 2], ids=["one core", "two cores"])
def cores(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield int(request.param)
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(*shape: int, seed: int, most: int = 3) -> Tensor:
    """Small integers: every product and sum of them is exact, and many are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator).float()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm().clamp(min=1e-30))


def twin_selection(index: dsa.IndexerOutput, last: Tensor, valid: Tensor | None, top_k: int) -> Tensor:
    scores = dsa.index_scores(*index)
    return dsa.select(scores, dsa.visible_keys(last, scores.shape[-1], valid), top_k)


@given(
    st.integers(1, 3), st.integers(1, 70), st.integers(0, 90), st.integers(1, 40), st.integers(1, 5), st.integers(0, 99)
)
def test_selections_equal_the_twins_with_plateaus_of_equal_scores(
    rows: int, queries: int, before: int, top_k: int, heads: int, seed: int
) -> None:
    keys = queries + before
    index = dsa.IndexerOutput(
        whole(rows, queries, heads, 3, seed=seed),
        whole(rows, keys, 3, seed=seed + 1),
        whole(rows, queries, heads, seed=seed + 2),
    )
    last = torch.arange(before, keys).expand(rows, -1)
    valid = whole(rows, keys, seed=seed + 3) != 0
    for mask in (None, valid):
        found = dsa_cpu.select_keys(index, last, mask, top_k)
        assert torch.equal(found, twin_selection(index, last, mask, top_k))


@pytest.mark.parametrize("top_k", [1, 37, 300, 1500])
def test_long_rows_go_through_the_bound_of_run_maxima(top_k: int, cores: int) -> None:
    queries, keys = 5, 6000
    index = dsa.IndexerOutput(
        whole(2, queries, 4, 16, seed=1), whole(2, keys, 16, seed=2), whole(2, queries, 4, seed=3, most=9)
    )
    last = torch.tensor([[5999, 5998, 4001, 700, 2]]).expand(2, -1)
    assert torch.equal(dsa_cpu.select_keys(index, last, None, top_k), twin_selection(index, last, None, top_k))


@pytest.mark.parametrize("rows", [1, 3])
def test_one_query_before_more_keys_than_a_task_takes(rows: int, cores: int) -> None:
    keys = 2 * dsa_cpu.DECODED_KEYS + 77
    index = dsa.IndexerOutput(whole(rows, 1, 3, 4, seed=1), whole(rows, keys, 4, seed=2), whole(rows, 1, 3, seed=3))
    last = torch.tensor([[keys - 1], [dsa_cpu.DECODED_KEYS], [5]])[:rows]
    assert torch.equal(dsa_cpu.select_keys(index, last, None, 40), twin_selection(index, last, None, 40))


def test_scores_that_come_in_clusters_are_all_looked_at() -> None:
    keys, top_k = 4096, 256
    index_k = torch.zeros(1, keys, 1)
    index_k[0, 1000:1300] = torch.arange(300.0)[:, None] + 1  # All of the best in a few neighbouring runs.
    index = dsa.IndexerOutput(torch.ones(1, 1, 1, 1), index_k, torch.ones(1, 1, 1))
    found = dsa_cpu.select_keys(index, torch.tensor([[keys - 1]]), None, top_k)
    assert found[0, 0].tolist() == list(range(1300 - top_k, 1300))


def test_scores_that_are_no_numbers_rank_as_in_the_twin() -> None:
    index_k = torch.tensor([1.0, float("nan"), -1.0, float("inf"), 0.0, 2.0, -0.0, float("nan"), 3.4e38, 1.0])
    for sign in (1.0, -1.0):
        index = dsa.IndexerOutput(torch.ones(1, 1, 1, 1), index_k.view(1, -1, 1), torch.full((1, 1, 1), sign))
        for top_k in range(1, 10):
            last = torch.tensor([[9]])
            expected = twin_selection(index, last, None, top_k)
            assert torch.equal(dsa_cpu.select_keys(index, last, None, top_k), expected)


def test_at_least_one_key_is_selected() -> None:
    index = dsa.IndexerOutput(torch.ones(1, 1, 1, 1), torch.ones(1, 3, 1), torch.ones(1, 1, 1))
    with pytest.raises(ValueError, match="at least one key"):
        dsa_cpu.select_keys(index, torch.tensor([[2]]), None, 0)


SHAPES = [
    # rows, queries, keys, groups, sharing, key width, value width, selected
    (1, 1, 1, 1, 1, 8, 8, 1),
    (2, 7, 11, 2, 3, 5, 4, 6),
    (1, 70, 70, 1, 8, 48, 32, 9),
    (2, 33, 40, 2, 4, 64, 64, 64),
    (1, 9, 30, 3, 1, 33, 17, 5),
    (1, 5, 12, 1, 16, 576, 512, 7),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_and_every_gradient_equal_the_twins(shape: tuple[int, ...], cores: int) -> None:
    rows, queries, keys, groups, sharing, width, value, top_k = shape
    inputs = (random(rows, queries, groups * sharing, width), random(rows, keys, groups, width, seed=1))
    inputs = (*inputs, random(rows, keys, groups, value, seed=2))
    index = dsa.IndexerOutput(random(rows, queries, 2, 4), random(rows, keys, 4, seed=3), random(rows, queries, 2))
    last = torch.arange(keys - queries, keys).expand(rows, -1)
    selected = dsa_tiled.select_keys(index, last, None, top_k)
    found, expected = ([each.to(dtype).requires_grad_() for each in inputs] for dtype in (torch.float32, torch.float64))
    out, twin = dsa_cpu.sparse_attention(*found, selected, 0.3), dsa.sparse_attention(*expected, selected, 0.3)
    upstream = random(*twin.shape, seed=5)
    assert error(out, twin) < BOUND
    gradients = torch.autograd.grad(out, found, upstream.float())
    for gradient, of_twin in zip(gradients, torch.autograd.grad(twin, expected, upstream), strict=True):
        assert error(gradient, of_twin) < BOUND
    again = torch.autograd.grad(dsa_cpu.sparse_attention(*found, selected, 0.3), found, upstream.float())
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


def test_a_key_that_is_absent_counts_nothing_wherever_it_stands() -> None:
    q, k, v = random(1, 3, 2, 4), random(1, 5, 1, 4, seed=1), random(1, 5, 1, 4, seed=2)
    selected = torch.tensor([[[-1, 3, -1, 0], [-1, -1, -1, -1], [4, -1, 1, 2]]])
    leaves = [each.float().requires_grad_() for each in (q, k, v)]
    out = dsa_cpu.sparse_attention(*leaves, selected, 0.5)
    assert error(out, dsa.sparse_attention(q, k, v, selected, 0.5)) < BOUND
    assert not out[0, 1].any()
    out.sum().backward()
    assert all(torch.isfinite(each.grad).all() for each in leaves)
    assert not leaves[0].grad[0, 1].any()


def test_half_precision_is_computed_in_float32_and_given_back_as_it_came() -> None:
    inputs = [random(1, 9, 4, 16).bfloat16(), random(1, 9, 2, 16, seed=1).bfloat16(), random(1, 9, 2, 8).bfloat16()]
    leaves = [each.requires_grad_() for each in inputs]
    selected = dsa.select(random(1, 9, 9), dsa.visible_keys(torch.arange(9)[None], 9), 4)
    out = dsa_cpu.sparse_attention(*leaves, selected, 0.25)
    out.sum().backward()
    twin = dsa.sparse_attention(*(each.detach().double() for each in leaves), selected, 0.25)
    assert out.dtype == torch.bfloat16 and error(out, twin) < 5e-3
    assert all(each.grad.dtype == torch.bfloat16 for each in leaves)


@pytest.mark.parametrize("tokens", [3, 40, 61])
def test_native_sparse_attention_equals_its_twin(tokens: int, cores: int) -> None:
    sizes = nsa.BlockSizes(8, 4, 8, 3, 1, 1, 5)
    blocks = nsa.num_compressed(tokens, sizes)
    shapes = ((blocks, 2, 6),) * 2 + ((tokens, 2, 6),) * 4
    inputs = [random(1, tokens, 4, 6), random(1, tokens, 4, 3), *(random(1, *s, seed=i) for i, s in enumerate(shapes))]
    position = torch.arange(tokens)[None]
    results = []
    for dtype, function in (
        (torch.float64, nsa.native_sparse_attention),
        (torch.float32, nsa_cpu.native_sparse_attention),
    ):
        leaves = [each.to(dtype).requires_grad_() for each in inputs]
        out = function(leaves[0], nsa.Branches(*leaves[2:]), leaves[1], position, sizes, 0.4)
        used = [each for each in leaves if each.numel()]
        results.append([out, *torch.autograd.grad(out.square().sum(), used, allow_unused=True)])
    for found, expected in zip(results[1], results[0], strict=True):
        assert (found is None) == (expected is None)
        assert found is None or error(found, expected) < BOUND


def test_an_error_in_a_worker_is_raised_here(cores: int) -> None:
    def fail(task: int) -> None:
        if task == 3:
            raise ValueError("the fourth")

    with pytest.raises(ValueError, match="the fourth"):
        spread(fail, range(6))


def test_workers_take_one_core_each_and_leave_the_setting_alone() -> None:
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        spread(lambda task: seen.append(torch.get_num_threads()), range(4))
        assert (seen, torch.get_num_threads()) == ([1, 1, 1, 1], 2)
    finally:
        torch.set_num_threads(before)


def test_a_cache_is_read_where_it_lies() -> None:
    """A latent that is key and value at once, in a slot that has room for more tokens, is not copied."""
    slot = random(2, 12, 1, 10).float()
    keys, values = slot[:, :9], slot[:, :9, :, :6]
    for rows, cached in ((dsa_cpu._rows(keys[1]), slot[1]), (dsa_cpu._rows(values[1]), slot[1])):
        assert rows.base is not None and rows.__array_interface__["data"][0] == cached.data_ptr()
    q, selected = random(2, 1, 4, 10, seed=1), torch.tensor([[[0, 3, 8]], [[2, 4, -1]]])
    found = dsa_cpu.sparse_attention(q.float(), keys, values, selected, 0.3)
    assert error(found, dsa.sparse_attention(q, keys.double(), values.double(), selected, 0.3)) < BOUND


def test_values_that_end_with_their_storage_are_copied_rather_than_read_past_it() -> None:
    slot = random(1, 5, 1, 10).float()
    q, selected = random(1, 2, 3, 10, seed=1), torch.tensor([[[0, 4], [1, 3]]])
    values = slot[..., 4:]
    found = dsa_cpu.sparse_attention(q.float(), slot, values, selected, 0.3)
    assert error(found, dsa.sparse_attention(q, slot.double(), values.double(), selected, 0.3)) < BOUND


@pytest.mark.parametrize("top_k", [None, 3, 50])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_indexers_loss_and_its_gradients_equal_the_twins(groups: int, top_k: int | None, cores: int) -> None:
    rows, queries, keys = 2, 17, 21
    last = torch.arange(keys - queries, keys).expand(rows, -1)
    valid = torch.ones(rows, keys, dtype=torch.bool)
    valid[1, 1:4] = False
    q, k = random(rows, queries, 6, 20), random(rows, keys, groups, 20, seed=1)
    index = [random(rows, queries, 3, 6, seed=2), random(rows, keys, 6, seed=3), random(rows, queries, 3, seed=4)]
    weight = random(rows, queries, seed=5)
    everything = dsa_tiled.select_all(last, keys, valid)
    selected = everything if top_k is None else twin_selection(dsa.IndexerOutput(*index), last, valid, top_k)
    results = []
    for dtype in (torch.float64, torch.float32):
        leaves = [each.to(dtype).requires_grad_() for each in index]
        if dtype == torch.float64:
            scores = dsa.index_scores(*leaves)
            kl, uniform = dsa.indexer_kl(q, k, 0.3, scores, selected)
            loss = (kl * weight).sum()
        else:
            main = dsa_tiled.MainAttention(q.float(), k.float(), 0.3, last, valid)
            given = None if top_k is None else selected
            loss, kl, uniform = dsa_cpu.indexer_kl(main, dsa.IndexerOutput(*leaves), weight.float(), given)
        results.append([loss, kl, uniform, *torch.autograd.grad(loss * 1.7, leaves)])
    for found, expected in zip(results[1], results[0], strict=True):
        assert error(found, expected) < BOUND


def test_a_query_that_sees_no_key_adds_nothing_to_the_indexers_loss() -> None:
    main = dsa_tiled.MainAttention(
        random(1, 2, 2, 4).float(),
        random(1, 3, 1, 4).float(),
        0.5,
        torch.tensor([[1, 2]]),
        torch.tensor([[False, False, True]]),
    )
    leaves = [each.float().requires_grad_() for each in (random(1, 2, 2, 4), random(1, 3, 4), random(1, 2, 2))]
    loss, kl, uniform = dsa_cpu.indexer_kl(main, dsa.IndexerOutput(*leaves), torch.ones(1, 2))
    loss.backward()
    assert kl.tolist() == [[0.0, 0.0]] and uniform.tolist() == [[0.0, 0.0]]  # Of one key there is nothing to predict.
    assert all(not each.grad.any() for each in leaves)


@pytest.mark.parametrize("top_k", [1, 4, 30])
def test_recall_equals_the_tiled_form(top_k: int, cores: int) -> None:
    last = torch.arange(4, 21).expand(2, -1)
    valid = torch.ones(2, 21, dtype=torch.bool)
    valid[1, 1:4] = False
    main = dsa_tiled.MainAttention(random(2, 17, 6, 8), random(2, 21, 2, 8, seed=1), 0.3, last, valid)
    index = dsa.IndexerOutput(random(2, 17, 3, 6, seed=2), random(2, 21, 6, seed=3), random(2, 17, 3, seed=4))
    expected = dsa_tiled.attention_recall(main, index, top_k)
    single = main._replace(q=main.q.float(), k=main.k.float())
    found = dsa_cpu.attention_recall(single, dsa.IndexerOutput(*(each.float() for each in index)), top_k)
    assert error(found, expected) < BOUND
