"""The indexer's loss in Triton against the float64 twin: compiled on a CUDA machine, interpreted elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rorqual.ops import dsa, dsa_tiled

pytest.importorskip("triton")

from rorqual.ops.gpu import dsa_kl, dsa_kl_visible, dsa_score

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
"""Of the norm of a difference, relative to the norm of what is expected."""

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|overflow) encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles in every direction, of few numbers."""
    monkeypatch.setattr(dsa_score, "TILE_BYTES", 64)
    monkeypatch.setattr(dsa_kl_visible, "SCAN", 16)


SHAPES = {
    # rows, queries, keys, heads, groups, width, index heads, index width
    "odd lengths": (2, 7, 19, 6, 2, 20, 3, 20),
    "one of each": (1, 1, 1, 1, 1, 16, 1, 16),
    "shared keys": (1, 18, 18, 4, 1, 32, 1, 32),
    "a cached query": (2, 1, 37, 17, 1, 24, 4, 64),
    "own keys, wide": (1, 5, 21, 2, 2, 72, 18, 128),
}


def problem(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0
) -> tuple[dsa_tiled.MainAttention, dsa.IndexerOutput, Tensor]:
    """The main attention, the indexer and the weights of queries; the last row's first two keys are switched off."""
    rows, queries, keys, heads, groups, width, index_heads, index_width = shape
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(DEVICE, dtype)

    last = torch.arange(keys - queries, keys, device=DEVICE).expand(rows, -1)
    valid = torch.ones(rows, keys, dtype=torch.bool, device=DEVICE)
    valid[-1, : min(2, keys - queries)] = False
    q, k = random(rows, queries, heads, width), random(rows, keys, groups, width)
    index_q, index_k = random(rows, queries, index_heads, index_width), random(rows, keys, index_width)
    index = dsa.IndexerOutput(index_q, index_k, random(rows, queries, index_heads).float() * 0.2)
    row_weight = torch.rand(rows, queries, generator=generator).to(DEVICE) / queries
    return dsa_tiled.MainAttention(q, k, width**-0.5, last, valid), index, row_weight


def selection(main: dsa_tiled.MainAttention, index: dsa.IndexerOutput, top_k: int | None) -> Tensor:
    if top_k is None:
        return dsa_tiled.select_all(main.last_RQ, main.k.shape[1], main.key_valid_RK)
    return dsa_tiled.select_keys(index, main.last_RQ, main.key_valid_RK, top_k)


def leaves(index: dsa.IndexerOutput, dtype: torch.dtype | None = None) -> dsa.IndexerOutput:
    return dsa.IndexerOutput(*(x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in index))


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    difference = (found.double() - expected.double()).norm()
    assert float(difference) <= tolerance * float(expected.double().norm()) + 1e-12


def assert_equals_twin(
    main: dsa_tiled.MainAttention, index: dsa.IndexerOutput, row_weight: Tensor, selected: Tensor | None
) -> None:
    """Loss, both divergences, and the gradients that an upstream gradient of 0.7 brings."""
    tolerance = TOLERANCE[index.q.dtype]
    precise, ours = leaves(index, torch.float64), leaves(index)
    keys = selection(main, index, None) if selected is None else selected
    scores = dsa.index_scores(*precise)
    kl, uniform = dsa.indexer_kl(main.q.double(), main.k.double(), main.scale, scores, keys)
    loss = (kl * row_weight).sum()
    found_loss, found_kl, found_uniform = dsa_kl.indexer_kl(main, ours, row_weight, selected)
    for found, expected in ((found_loss, loss), (found_kl, kl), (found_uniform, uniform)):
        assert found.dtype == torch.float32
        assert_near(found.detach(), expected.detach(), tolerance)
    gradients = torch.autograd.grad(loss * 0.7, precise)
    found_gradients = torch.autograd.grad(found_loss * 0.7, ours)
    for found, expected, of in zip(found_gradients, gradients, ours, strict=True):
        assert found.dtype == of.dtype
        assert_near(found, expected, tolerance)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [None, 5], ids=["all visible", "selected"])
def test_loss_and_gradients(name: str, dtype: torch.dtype, top_k: int | None) -> None:
    main, index, row_weight = problem(SHAPES[name], dtype)
    assert_equals_twin(main, index, row_weight, None if top_k is None else selection(main, index, top_k))


@pytest.mark.parametrize("top_k", [None, 1, 40], ids=["all visible", "one", "more than there are"])
def test_loss_and_gradients_of_float16(top_k: int | None) -> None:
    """Weights as small as those of a long batch, of which float16 has no products."""
    main, index, row_weight = problem((1, 3, 17, 2, 1, 16, 2, 16), torch.float16)
    selected = None if top_k is None else selection(main, index, top_k)
    assert_equals_twin(main, index, row_weight, selected)
    ours, small = leaves(index), leaves(index)
    (gradient,) = torch.autograd.grad(dsa_kl.indexer_kl(main, ours, row_weight, selected)[0], ours.q)
    loss = dsa_kl.indexer_kl(main, small, row_weight * 2.0**-20, selected)[0]
    assert torch.equal(torch.autograd.grad(loss * 2.0**20, small.q)[0], gradient)


@pytest.mark.parametrize("top_k", [None, 3])
def test_queries_may_end_anywhere_and_see_nothing(top_k: int | None) -> None:
    main, index, row_weight = problem((2, 18, 20, 2, 1, 16, 2, 16), torch.float32)
    last = torch.randint(0, 20, (2, 18), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    last[0, 2], last[1, 3] = -1, 1
    main = main._replace(last_RQ=last)
    assert_equals_twin(main, index, row_weight, None if top_k is None else selection(main, index, top_k))
    kl, uniform = dsa_kl.indexer_kl(main, index, row_weight, None)[1:]
    assert not kl[[0, 1], [2, 3]].any() and not uniform[[0, 1], [2, 3]].any()


@pytest.mark.parametrize(("top_k", "scratch"), [(None, 20 * 16), (3, 3 * 16 * 5)])
def test_chunks_of_queries(top_k: int | None, scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of keys add up over chunks and rows."""
    monkeypatch.setattr(dsa_score, "SCRATCH_ELEMENTS", scratch)
    main, index, row_weight = problem((2, 18, 20, 2, 1, 16, 2, 16), torch.float32)
    assert_equals_twin(main, index, row_weight, None if top_k is None else selection(main, index, top_k))


@pytest.mark.parametrize("top_k", [None, 4])
def test_runs_are_equal_bit_by_bit(top_k: int | None) -> None:
    main, index, row_weight = problem(SHAPES["odd lengths"], torch.float32)
    selected = None if top_k is None else selection(main, index, top_k)
    runs = []
    for _ in range(2):
        ours = leaves(index)
        outputs = dsa_kl.indexer_kl(main, ours, row_weight, selected)
        runs.append([*outputs, *torch.autograd.grad(outputs[0], ours)])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_warm_up_reaches_every_visible_key() -> None:
    """The last query alone counts; of its keys, those that are selected or all."""
    main, index, _ = problem((1, 18, 18, 2, 1, 16, 2, 16), torch.float32)
    index = dsa.IndexerOutput(index.q.abs(), index.k.abs(), index.weight)
    last_query = torch.zeros(1, 18, device=DEVICE)
    last_query[0, -1] = 1.0
    for selected, reached in ((None, 18), (selection(main, index, 3), 3)):
        ours = leaves(index)
        loss, _, _ = dsa_kl.indexer_kl(main, ours, last_query, selected)
        (gradient,) = torch.autograd.grad(loss, ours.k)
        assert int(gradient.any(dim=-1).sum()) == reached


def test_the_target_is_a_constant_and_no_gradient_is_made_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    main, index, row_weight = problem(SHAPES["odd lengths"], torch.float32)
    main = main._replace(q=main.q.requires_grad_(), k=main.k.requires_grad_())
    loss, kl, uniform = dsa_kl.indexer_kl(main, leaves(index), row_weight, None)
    assert not kl.requires_grad and not uniform.requires_grad
    assert torch.autograd.grad(loss, (main.q, main.k), allow_unused=True) == (None, None)
    monkeypatch.delattr(dsa_kl_visible, "_add_gradients")
    with torch.no_grad():
        assert torch.equal(dsa_kl.indexer_kl(main, leaves(index), row_weight, None)[0], loss)
    assert torch.equal(dsa_kl.indexer_kl(main, index, row_weight, None)[0], loss)


def test_an_indexer_that_knows_nothing_is_as_good_as_uniform() -> None:
    main, index, row_weight = problem(SHAPES["odd lengths"], torch.float32)
    nothing = dsa.IndexerOutput(*(x * 0 for x in index))
    _, kl, uniform = dsa_kl.indexer_kl(main, nothing, row_weight, None)
    torch.testing.assert_close(kl, uniform, rtol=1e-5, atol=1e-6)


def test_not_a_number_is_not_lost() -> None:
    main, index, row_weight = problem((1, 3, 17, 2, 1, 16, 2, 16), torch.float32)
    index.k[0, 4, 1] = float("nan")
    for selected in (None, selection(main, index, 40)):
        assert dsa_kl.indexer_kl(main, index, row_weight, selected)[1].isnan().all()
    main, index, row_weight = problem((1, 3, 17, 2, 1, 16, 2, 16), torch.float32)
    main.q[0, 1, 0, 0] = float("nan")
    for selected in (None, selection(main, index, 5)):
        kl = dsa_kl.indexer_kl(main, index, row_weight, selected)[1]
        assert kl.isnan().tolist() == [[False, True, False]]


@pytest.mark.parametrize("top_k", [1, 4, 99])
def test_recall(top_k: int) -> None:
    main, index, _ = problem(SHAPES["odd lengths"], torch.float32)
    found = dsa_kl.attention_recall(main, index, top_k)
    precise = main._replace(q=main.q.double(), k=main.k.double())
    expected = dsa_tiled.attention_recall(precise, dsa.IndexerOutput(*(x.double() for x in index)), top_k)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_float64_is_refused() -> None:
    main, index, row_weight = problem(SHAPES["one of each"], torch.float64)
    with pytest.raises(ValueError, match="float64; they take float32, bfloat16 and float16"):
        dsa_kl.indexer_kl(main, index, row_weight)
