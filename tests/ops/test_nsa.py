"""Native sparse attention: the twin against a loop over single queries, and the tiled form against the twin."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rorqual.ops import dsa_tiled, nsa, nsa_tiled
from rorqual.ops.nsa import BlockSizes, Branches

SIZES = BlockSizes(length=8, stride=4, selected_length=16, num_selected=3, num_initial=1, num_local=1, window=10)
OVERLAPPING = BlockSizes(length=6, stride=2, selected_length=4, num_selected=4, num_initial=0, num_local=2, window=1)
ADJACENT = BlockSizes(length=4, stride=4, selected_length=4, num_selected=2, num_initial=1, num_local=1, window=3)
FINER = BlockSizes(length=12, stride=4, selected_length=4, num_selected=5, num_initial=2, num_local=2, window=7)


def random_problem(
    sizes: BlockSizes, num_keys: int, heads: tuple[int, int], starts: tuple[int, ...], num_queries: int, seed: int = 0
) -> tuple[Tensor, Branches, Tensor, Tensor]:
    """Queries, branches, gates, and positions of `num_queries` queries from each of `starts`."""
    generator = torch.Generator().manual_seed(seed)
    (num_heads, groups), rows, dim = heads, len(starts), 5

    def random(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator, dtype=torch.float64).requires_grad_()

    counts = [nsa.num_compressed(num_keys, sizes)] * 2 + [num_keys] * 4
    branches = Branches(*(random(count, groups, dim) for count in counts))
    position_RQ = torch.tensor(starts)[:, None] + torch.arange(num_queries)
    return random(num_queries, num_heads, dim), branches, random(num_queries, num_heads, 3), position_RQ


# -------------------------------------------------------------------------------------------- the twin, query by query


def softmax_mix(q: Tensor, keys: list[Tensor], values: list[Tensor], scale: float) -> tuple[Tensor, list[float]]:
    if not keys:
        return torch.zeros_like(q), []
    weights = torch.softmax(torch.stack([q @ key * scale for key in keys]), dim=0)
    return sum((w * v for w, v in zip(weights, values, strict=True)), torch.zeros_like(q)), weights.tolist()


def by_hand(q: Tensor, branches: Branches, gates: Tensor, position: int, sizes: BlockSizes, scale: float) -> Tensor:
    """One row's one query [H, E], with the paper's formulas read literally: tokens and blocks counted from 1."""
    num_heads, (groups, t) = len(q), (branches.selected_k.shape[1], position + 1)
    ratio, overlap = sizes.selected_length // sizes.stride, sizes.length // sizes.stride
    last_compressed = (t - sizes.length) // sizes.stride + 1 if t >= sizes.length else 0
    last_block = -(-t // sizes.selected_length)
    out = torch.zeros_like(q)
    for group in range(groups):
        heads = range(group * num_heads // groups, (group + 1) * num_heads // groups)
        share = [0.0] * (last_block + 1)
        compressed = {}
        for head in heads:
            keys = [branches.compressed_k[i, group] for i in range(last_compressed)]
            values = [branches.compressed_v[i, group] for i in range(last_compressed)]
            compressed[head], weights = softmax_mix(q[head], keys, values, scale)
            for j in range(1, last_block + 1):
                for m in range(ratio):
                    for n in range(overlap):
                        i = ratio * j - m - n
                        share[j] += weights[i - 1] if 1 <= i <= last_compressed else 0.0
        forced = {j for j in range(1, last_block + 1) if j <= sizes.num_initial or j > last_block - sizes.num_local}
        order = sorted(range(1, last_block + 1), key=lambda j: (j not in forced, -share[j], j))
        tokens = [
            s
            for j in sorted(order[: sizes.num_selected])
            for s in range((j - 1) * sizes.selected_length + 1, j * sizes.selected_length + 1)
            if s <= t
        ]
        near = range(max(1, t - sizes.window + 1), t + 1)
        for head in heads:
            selected, _ = softmax_mix(
                q[head],
                [branches.selected_k[s - 1, group] for s in tokens],
                [branches.selected_v[s - 1, group] for s in tokens],
                scale,
            )
            window, _ = softmax_mix(
                q[head],
                [branches.window_k[s - 1, group] for s in near],
                [branches.window_v[s - 1, group] for s in near],
                scale,
            )
            out[head] = gates[head, 0] * compressed[head] + gates[head, 1] * selected + gates[head, 2] * window
    return out


@pytest.mark.parametrize("sizes", (SIZES, OVERLAPPING, ADJACENT, FINER), ids=str)
@pytest.mark.parametrize("heads", ((1, 1), (4, 2), (3, 3), (6, 1)), ids=str)
def test_the_twin_is_the_paper_query_by_query(sizes: BlockSizes, heads: tuple[int, int]) -> None:
    q, branches, gates, position_RQ = random_problem(sizes, 53, heads, (0, 3), 50)
    with torch.no_grad():
        out = nsa.native_sparse_attention(q, branches, gates, position_RQ, sizes, 0.4)
        for row in range(2):
            alone = Branches(*(each[row] for each in branches))
            for index in range(50):
                position = int(position_RQ[row, index])
                expected = by_hand(q[row, index], alone, gates[row, index], position, sizes, 0.4)
                torch.testing.assert_close(out[row, index], expected, rtol=1e-10, atol=1e-10)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 90), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_importance_counts_shared_tokens(per_length: int, per_selected: int, stride: int, keys: int, seed: int) -> None:
    """A compressed block counts for a block by the tokens that both hold, in strides: another way to say equation 9."""
    sizes = BlockSizes(per_length * stride, stride, per_selected * stride, 3, 1, 1, 4)
    count, num_blocks = nsa.num_compressed(keys, sizes), -(-keys // sizes.selected_length)
    weights = torch.rand(1, 1, 1, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = nsa.importance(weights, num_blocks, sizes)
    for block in range(num_blocks):
        own = set(range(block * sizes.selected_length, (block + 1) * sizes.selected_length))
        expected = sum(
            float(weights[0, 0, 0, i]) * len(own & set(range(i * stride, i * stride + sizes.length))) / stride
            for i in range(count)
        )
        assert math.isclose(float(found[0, 0, 0, block]), expected, rel_tol=1e-9, abs_tol=1e-12)


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_selected_blocks_hold_the_forced_ones_and_the_best(seed: int) -> None:
    """Coarse scores, so that many tie: then the earlier block is taken."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(3, (1, 40, 2, 10), generator=generator).double()
    position_RQ = torch.arange(40)[None]
    sizes = BlockSizes(4, 4, 4, 4, 1, 2, 3)
    chosen = nsa.select_blocks(scores, position_RQ, sizes)
    for query in range(40):
        own = query // 4
        forced = {0, own, max(0, own - 1)}
        for group in range(2):
            blocks = [block for block in chosen[0, query, group].tolist() if block >= 0]
            free = [block for block in range(own + 1) if block not in forced]
            best = sorted(free, key=lambda block: (-float(scores[0, query, group, block]), block))
            assert blocks == sorted(forced | set(best[: 4 - len(forced)]))


def test_a_nan_score_is_never_preferred() -> None:
    scores = torch.zeros(1, 1, 1, 8).double()
    scores[..., 2] = math.nan
    sizes = BlockSizes(4, 4, 4, 6, 1, 1, 3)
    assert nsa.select_blocks(scores, torch.tensor([[31]]), sizes).flatten().tolist() == [0, 1, 3, 4, 5, 7]


def test_with_room_for_all_blocks_the_selected_branch_is_dense() -> None:
    q, branches, gates, position_RQ = random_problem(SIZES, 40, (4, 2), (0,), 40)
    sizes = SIZES._replace(num_selected=3, window=40)
    only_selected = torch.zeros_like(gates).index_fill(-1, torch.tensor([1]), 1.0)
    only_window = torch.zeros_like(gates).index_fill(-1, torch.tensor([2]), 1.0)
    for gate, first in ((only_selected, 2), (only_window, 4)):
        out = nsa_tiled.native_sparse_attention(q, branches, gate, position_RQ, sizes, 0.4)
        k, v = (branches[i].transpose(1, 2) for i in (first, first + 1))
        dense = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, is_causal=True, scale=0.4, enable_gqa=True
        )
        torch.testing.assert_close(out, dense.transpose(1, 2), rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------------- tiled against twin


@pytest.mark.parametrize("tile_elements", (1 << 20, 37))
@pytest.mark.parametrize("sizes", (SIZES, OVERLAPPING, ADJACENT, FINER), ids=str)
@pytest.mark.parametrize(
    ("heads", "num_keys", "starts", "num_queries"),
    (((4, 2), 53, (0, 3), 50), ((3, 1), 5, (0,), 5), ((2, 2), 1, (0,), 1), ((6, 2), 70, (69, 12), 1)),
    ids=str,
)
def test_tiles_give_outputs_and_gradients_of_the_twin(
    monkeypatch: pytest.MonkeyPatch,
    sizes: BlockSizes,
    heads: tuple[int, int],
    num_keys: int,
    starts: tuple[int, ...],
    num_queries: int,
    tile_elements: int,
) -> None:
    monkeypatch.setattr(dsa_tiled, "TILE_ELEMENTS", tile_elements)
    monkeypatch.setattr(nsa_tiled, "WINDOW_TILE", 16)
    q, branches, gates, position_RQ = random_problem(sizes, num_keys, heads, starts, num_queries)
    leaves = [q, *branches, gates]
    results = []
    for function in (nsa.native_sparse_attention, nsa_tiled.native_sparse_attention):
        out = function(q, branches, gates, position_RQ, sizes, 0.4)
        toward = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        results.append([out, *torch.autograd.grad((out * toward).sum(), leaves, materialize_grads=True)])
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("function", (nsa.native_sparse_attention, nsa_tiled.native_sparse_attention))
def test_gradients_are_those_of_the_function(function: object) -> None:
    q, branches, gates, position_RQ = random_problem(ADJACENT, 14, (2, 1), (0,), 14)

    def of(*leaves: Tensor) -> Tensor:
        assert callable(function)
        out: Tensor = function(leaves[0], Branches(*leaves[1:7]), leaves[7], position_RQ, ADJACENT, 0.4)
        return out

    assert torch.autograd.gradcheck(of, (q, *branches, gates))


def test_repeats_are_bitwise_equal() -> None:
    q, branches, gates, position_RQ = random_problem(SIZES, 53, (4, 2), (0, 3), 50)
    runs = []
    for _ in range(3):
        out = nsa_tiled.native_sparse_attention(q, branches, gates, position_RQ, SIZES, 0.4)
        runs.append([out, *torch.autograd.grad(out.square().sum(), [q, *branches, gates])])
    for first, second in pairwise(runs):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
