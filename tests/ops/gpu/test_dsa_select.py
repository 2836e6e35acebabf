"""DSA's selection in Triton against the twins: compiled on a CUDA machine, interpreted elsewhere."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rorqual.ops import dsa, dsa_tiled

pytest.importorskip("triton")

from rorqual.ops.gpu import dsa_score, dsa_select

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles in every direction, of few numbers."""
    monkeypatch.setattr(dsa_score, "TILE_BYTES", 64)
    monkeypatch.setattr(dsa_select, "SCAN", 32 if DEVICE.type == "cpu" else 512)  # A number a thread at least.


def integers(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-2, 3, shape, generator=generator).to(DEVICE, torch.float32)


def last_keys(rows: int, queries: int, keys: int) -> Tensor:
    return torch.arange(keys - queries, keys, device=DEVICE).expand(rows, -1)


def hidden(rows: int, keys: int) -> Tensor:
    """Row by row more keys in front are switched off; row 0 has all."""
    return torch.arange(keys, device=DEVICE) >= torch.arange(rows, device=DEVICE)[:, None]


def expected_selection(index: dsa.IndexerOutput, last_RQ: Tensor, valid_RK: Tensor | None, top_k: int) -> Tensor:
    scores_RQK = dsa.index_scores(*index)
    return dsa.select(scores_RQK, dsa.visible_keys(last_RQ, index.k.shape[1], valid_RK), top_k)


SHAPES = {
    # rows, queries, keys, heads, width
    "odd lengths": (2, 17, 37, 3, 20),
    "square": (1, 18, 18, 1, 32),
    "a query": (3, 1, 70, 4, 64),
    "a few queries": (2, 3, 40, 8, 16),
    "an odd few": (1, 5, 21, 2, 128),
    "one key": (1, 1, 1, 1, 16),
    "two keys": (2, 1, 2, 1, 16),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("top_k", [1, 6, 99])
@pytest.mark.usefixtures("small_tiles")
def test_selection_is_exact_where_scores_are(name: str, top_k: int) -> None:
    """Small integers: every score is exact in float32, and many are equal, most of them 0."""
    rows, queries, keys, heads, width = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    index = dsa.IndexerOutput(
        integers(rows, queries, heads, width, generator=generator),
        integers(rows, keys, width, generator=generator),
        integers(rows, queries, heads, generator=generator),
    )
    last, valid = last_keys(rows, queries, keys), hidden(rows, keys)
    for each in (None, valid) if rows > 1 else (None,):
        found = dsa_select.select_keys(index, last, each, top_k)
        assert torch.equal(found, expected_selection(index, last, each, top_k))


@pytest.mark.usefixtures("small_tiles")
def test_queries_may_end_anywhere() -> None:
    """Neither in order nor at the end, and one that sees nothing."""
    generator = torch.Generator().manual_seed(1)
    index = dsa.IndexerOutput(
        *(integers(*shape, generator=generator) for shape in ((1, 18, 2, 16), (1, 50, 16), (1, 18, 2)))
    )
    last = torch.randint(-1, 50, (1, 18), generator=generator).to(DEVICE)
    last[0, 3] = -1
    found = dsa_select.select_keys(index, last, hidden(1, 50), 7)
    assert torch.equal(found, expected_selection(index, last, hidden(1, 50), 7))
    assert (found[0, 3] == -1).all()


@pytest.mark.parametrize(("rows", "queries"), [(6, 1), (1, 18)])
@pytest.mark.parametrize("top_k", [1, 5, 17])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.usefixtures("small_tiles")
def test_order_of_what_is_no_common_number(rows: int, queries: int, top_k: int) -> None:
    """Infinities rank with the largest numbers of their sign, NaN with -inf; -0 equals 0; ties go to the first."""
    generator, keys = torch.Generator().manual_seed(top_k), 40
    weights = torch.tensor([1.0, -1.0, -0.0, math.inf, -math.inf, math.nan]).repeat(3)[: rows * queries]
    numbers = torch.tensor([0.0, -0.0, 1.0, 2.0, -1.0, torch.finfo(torch.float32).max, 1e-30, math.inf, math.nan])
    index = dsa.IndexerOutput(
        torch.zeros(rows, queries, 1, 16, device=DEVICE),
        torch.zeros(rows, keys, 16, device=DEVICE),
        weights.to(DEVICE).view(rows, queries, 1),
    )
    index.q[..., 0] = 1.0
    index.k[..., 0] = numbers[torch.randint(len(numbers), (rows, keys), generator=generator)].to(DEVICE)
    found = dsa_select.select_keys(index, last_keys(rows, queries, keys), None, top_k)
    assert torch.equal(found, expected_selection(index, last_keys(rows, queries, keys), None, top_k))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.usefixtures("small_tiles")
def test_a_head_that_is_none_adds_nothing() -> None:
    """A few queries fill the tile with their heads; those that it has too many of must not turn inf into NaN."""
    index = dsa.IndexerOutput(
        torch.ones(1, 1, 3, 16, device=DEVICE),
        torch.zeros(1, 9, 16, device=DEVICE),
        torch.ones(1, 1, 3, device=DEVICE),
    )
    index.k[0, 4] = math.inf
    found = dsa_select.select_keys(index, last_keys(1, 1, 9), None, 1)
    assert found.tolist() == [[[4]]]


@pytest.mark.usefixtures("small_tiles")
def test_a_plateau_is_taken_from_its_front() -> None:
    index = dsa.IndexerOutput(
        torch.ones(1, 20, 2, 16, device=DEVICE),
        -torch.ones(1, 60, 16, device=DEVICE),
        torch.ones(1, 20, 2, device=DEVICE),
    )
    index.k[0, 35] = 1.0
    found = dsa_select.select_keys(index, last_keys(1, 20, 60), hidden(1, 60), 4)
    assert found.tolist() == [[[0, 1, 2, 35]] * 20]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("small_tiles")
def test_selection_by_score(dtype: torch.dtype) -> None:
    """What differs from the float64 twin differs where scores are as good as equal."""
    generator = torch.Generator().manual_seed(2)
    shapes = ((1, 17, 3, 24), (1, 45, 24), (1, 17, 3))
    index = dsa.IndexerOutput(*(torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes))
    last, top_k = last_keys(1, 17, 45), 9
    found = dsa_select.select_keys(index, last, None, top_k)
    scores = dsa.index_scores(*(x.double() for x in index))
    expected = dsa.select(scores, dsa.visible_keys(last, 45), top_k)
    assert_as_good(found, expected, scores, tolerance=1e-5)
    assert torch.equal(found, dsa_select.select_keys(index, last, None, top_k)), "a second run differs"


def assert_as_good(found: Tensor, expected: Tensor, scores: Tensor, tolerance: float) -> None:
    assert torch.equal(found >= 0, expected >= 0)
    present, pairs = found >= 0, (found[..., 1:] >= 0)
    assert (found[..., 1:] > found[..., :-1])[pairs].all(), "in ascending order"
    ours, theirs = (scores.gather(-1, x.clamp(min=0)).masked_fill(~present, math.inf) for x in (found, expected))
    gap = ours.sort(dim=-1).values - theirs.sort(dim=-1).values
    assert float(gap[present.sort(dim=-1, descending=True).values].abs().max()) <= tolerance


@pytest.mark.usefixtures("small_tiles")
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, 18, 2, 16), (2, 25, 16), (2, 18, 2))
    index = dsa.IndexerOutput(*(integers(*shape, generator=generator) for shape in shapes))
    whole = dsa_select.select_keys(index, last_keys(2, 18, 25), None, 6)
    monkeypatch.setattr(dsa_score, "SCRATCH_ELEMENTS", 25 * 16)
    assert torch.equal(dsa_select.select_keys(index, last_keys(2, 18, 25), None, 6), whole)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(0, 5),
    queries=st.integers(0, 50),
    each=st.integers(1, 300),
    multiple=st.sampled_from([1, 16]),
    limit=st.integers(1, 9000),
)
def test_chunks_hold_every_query_once(rows: int, queries: int, each: int, multiple: int, limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dsa_score, "SCRATCH_ELEMENTS", limit)
        found = list(dsa_score.chunks(rows, queries, each, multiple))
    seen = [pair for c in found for pair in itertools.product(range(rows)[c.rows], range(queries)[c.queries])]
    assert sorted(seen) == list(itertools.product(range(rows), range(queries)))
    for chunk in found:
        size = (chunk.rows.stop - chunk.rows.start) * chunk.width
        assert size * each <= limit or size <= multiple


def test_what_is_refused() -> None:
    index = dsa.IndexerOutput(torch.zeros(1, 1, 1, 16), torch.zeros(1, 3, 16), torch.zeros(1, 1, 1))
    with pytest.raises(ValueError, match="top_k = 0"):
        dsa_select.select_keys(index, last_keys(1, 1, 3), None, 0)
    doubles = dsa.IndexerOutput(*(x.double() for x in index))
    with pytest.raises(ValueError, match="float64; they take float32"):
        dsa_select.select_keys(doubles, last_keys(1, 1, 3), None, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_size_of_a_model(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    shapes = ((1, 700, 64, 128), (1, 9000, 128), (1, 700, 64))
    index = dsa.IndexerOutput(*(torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes))
    last, top_k = last_keys(1, 700, 9000), 2048
    found = dsa_select.select_keys(index, last, None, top_k)
    precise = dsa.IndexerOutput(*(x.double() for x in index))
    expected = dsa_tiled.select_keys(precise, last, None, top_k)
    tiles = zip(precise.q.split(50, dim=1), precise.weight.split(50, dim=1), strict=True)
    scores = torch.cat([dsa.index_scores(q, precise.k, weight) for q, weight in tiles], dim=1)
    assert_as_good(found, expected, scores, tolerance=1e-2)
    assert torch.equal(found, dsa_select.select_keys(index, last, None, top_k))
