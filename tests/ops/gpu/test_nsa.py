"""Native sparse attention in Triton against the twin in float64: on a GPU, and without one in Triton's interpreter,
where sizes are small because a program there takes milliseconds."""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from rorqual.ops import dispatch, nsa
from rorqual.ops.gpu import nsa as nsa_gpu
from rorqual.ops.gpu import nsa_choice, nsa_selected, nsa_selected_backward, nsa_span, nsa_span_backward, nsa_tiles
from rorqual.ops.gpu.nsa_span import Span
from rorqual.ops.gpu.nsa_tiles import Plan, Tile
from rorqual.ops.nsa import BlockSizes, Branches

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}
"""Of ||a - b|| / max(1, ||b||); with a single key the gradient of a query is exactly 0."""

PAPER = BlockSizes(length=8, stride=4, selected_length=16, num_selected=3, num_initial=1, num_local=2, window=10)
FREE = BlockSizes(length=6, stride=2, selected_length=4, num_selected=4, num_initial=0, num_local=1, window=1)
ADJACENT = BlockSizes(length=4, stride=4, selected_length=4, num_selected=3, num_initial=1, num_local=1, window=1000)
FINER = BlockSizes(length=12, stride=4, selected_length=4, num_selected=5, num_initial=0, num_local=2, window=7)
WIDE = BlockSizes(length=4, stride=1, selected_length=40, num_selected=2, num_initial=0, num_local=1, window=45)

BACKWARD = (nsa_selected_backward, nsa_span_backward)

SMALL = Plan(*[Tile(16, 16, 4, 1)] * 3)


class Case(NamedTuple):
    sizes: BlockSizes
    groups: int
    sharing: int
    dim: int
    keys: int
    starts: tuple[int, ...]
    queries: int


class Problem(NamedTuple):
    leaves: tuple[Tensor, ...]
    position_RQ: Tensor
    sizes: BlockSizes
    direction: Tensor

    @property
    def scale(self) -> float:
        return float(self.leaves[0].shape[-1] ** -0.5)

    def run(self, module: ModuleType, dtype: torch.dtype) -> list[Tensor]:
        """The output and all gradients."""
        q, *branches, gates = leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in self.leaves]
        out = module.native_sparse_attention(q, Branches(*branches), gates, self.position_RQ, self.sizes, self.scale)
        toward = (out * self.direction.to(dtype)).sum()
        return [out.detach(), *torch.autograd.grad(toward, leaves, materialize_grads=True)]


def problem(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
    """Numbers of `dtype`, so that the twin is given what the kernel is."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(len(case.starts), *shape, generator=generator).to(dtype).to(DEVICE)

    heads, num_blocks = case.groups * case.sharing, nsa.num_compressed(case.keys, case.sizes)
    branches = [random(count, case.groups, case.dim) for count in [num_blocks] * 2 + [case.keys] * 4]
    leaves = (random(case.queries, heads, case.dim), *branches, random(case.queries, heads, 3))
    position_RQ = torch.tensor(case.starts)[:, None] + torch.arange(case.queries)
    return Problem(leaves, position_RQ.to(DEVICE), case.sizes, random(case.queries, heads, case.dim))


def assert_like_the_twin(p: Problem, dtype: torch.dtype) -> None:
    names = ("out", "q", *Branches._fields, "gates")
    expected, found = p.run(nsa, torch.float64), p.run(nsa_gpu, dtype)
    for name, ours, theirs in zip(names, found, expected, strict=True):
        assert ours.dtype == dtype, name
        error = float((ours.double() - theirs).norm() / max(1.0, float(theirs.norm())))
        assert error <= TOLERANCE[dtype], f"{name}: {error}"


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tiny problems have several tiles, some without a mask, items, parts and chunks."""
    for module in (*BACKWARD, nsa_choice, nsa_selected, nsa_span):
        monkeypatch.setattr(module, "plan", lambda x: SMALL)
    monkeypatch.setattr(nsa_span_backward, "LEAST_PART", 20)
    monkeypatch.setattr(nsa_span_backward, "MOST_PARTS", 3)
    monkeypatch.setattr(nsa_selected_backward, "ITEM_LINES", 24)
    monkeypatch.setattr(nsa_choice, "SCRATCH_ELEMENTS", 100)


# ------------------------------------------------------------------------------------------------ against the twin

CASES = {
    "paper": Case(PAPER, 1, 2, 16, 51, (0,), 51),
    "rows start apart": Case(FREE, 2, 1, 16, 17, (0, 6), 11),
    "adjacent": Case(ADJACENT, 1, 3, 48, 17, (0,), 17),
    "finer": Case(FINER, 1, 16, 64, 21, (0,), 21),
    "wide": Case(WIDE, 1, 1, 16, 90, (5,), 60),
    "shorter than a block": Case(PAPER, 1, 3, 16, 5, (0,), 5),
    "one token": Case(FREE, 2, 2, 16, 1, (0,), 1),
    "decode": Case(PAPER, 2, 3, 128, 50, (49, 12), 1),
    "few queries behind a prefix": Case(FINER, 1, 4, 16, 33, (30,), 3),
    "latent width": Case(ADJACENT, 1, 2, 192, 13, (0,), 13),
    "odd width": Case(ADJACENT, 1, 2, 5, 9, (0,), 9),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_and_gradients_are_those_of_the_twin(case: Case) -> None:
    assert_like_the_twin(problem(case), torch.float32)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "case",
    (
        Case(WIDE, 1, 1, 16, 48, (3,), 45),
        Case(FREE._replace(window=20), 1, 2, 16, 40, (0,), 40),
    ),
    ids=("pieces of blocks", "free"),
)
def test_many_small_tiles_give_the_same(case: Case) -> None:
    assert_like_the_twin(problem(case), torch.float32)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(
    "case", (Case(PAPER, 1, 2, 64, 40, (0,), 40), Case(FREE, 1, 4, 16, 22, (9,), 13)), ids=("paper", "free")
)
def test_half_precision_is_as_close_as_it_can_be(case: Case, dtype: torch.dtype) -> None:
    assert_like_the_twin(problem(case, dtype), dtype)


def test_repeats_are_bitwise_equal() -> None:
    length = 13 if DEVICE.type == "cpu" else 3000
    p = problem(Case(FREE, 1, 2, 16, length, (0,), length))
    for first, second in pairwise(p.run(nsa_gpu, torch.float32) for _ in range(2)):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("sharing", (1, 4, 16))
def test_the_papers_sizes_on_a_gpu(sharing: int, dtype: torch.dtype) -> None:
    sizes = BlockSizes(32, 16, 64, 16, 1, 2, 512)
    assert_like_the_twin(problem(Case(sizes, 16 // sharing, sharing, 128, 1531, (0,), 1531), dtype), dtype)


# ------------------------------------------------------------------------------------------------- choice of blocks


def choices(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks by the kernels and by the twin, and the twin's importance, in float64."""
    q, k, v, *tokens = p.leaves[:-1]
    start_R, num_keys = p.position_RQ[:, 0].int(), tokens[0].shape[1]
    span = Span(p.sizes.length, p.sizes.stride, 0)
    _, log_sum = nsa_span.forward(q, (k, v), start_R, span, p.scale)
    ours = nsa_choice.choose_blocks(q, k, start_R, log_sum, num_keys, p.sizes, p.scale)
    seen_RQ1B = nsa.compressed_visible(p.position_RQ, k.shape[1], p.sizes).unsqueeze(2)
    weights = nsa.attention_weights(q.double(), k.double(), seen_RQ1B, p.scale)
    shared = weights.unflatten(2, (k.shape[2], -1)).sum(dim=3)
    importance = nsa.importance(shared, -(-num_keys // p.sizes.selected_length), p.sizes)
    return ours, nsa.select_blocks(importance, p.position_RQ, p.sizes), importance


@pytest.mark.parametrize("small", (False, True), ids=("one tile", "tiles and chunks"))
@pytest.mark.parametrize(
    ("case", "dtype"),
    (
        (Case(FREE, 2, 2, 16, 60, (0, 17), 43), torch.float32),
        (Case(FREE, 1, 2, 16, 139, (130,), 9), torch.float32),
        (Case(FINER, 1, 3, 16, 50, (0,), 50), torch.bfloat16),
        (Case(ADJACENT._replace(num_selected=20), 1, 1, 16, 50, (0,), 50), torch.float32),
    ),
    ids=("free", "behind a prefix", "finer in bfloat16", "room for all"),
)
def test_the_chosen_blocks_are_those_of_the_twin(
    case: Case, dtype: torch.dtype, small: bool, request: pytest.FixtureRequest
) -> None:
    """Half precision chooses no worse: products, weights and sums of importance are float32."""
    if small:
        request.getfixturevalue("small_tiles")
    ours, twins, importance = choices(problem(case, dtype))
    assert ours.shape == twins.shape
    differ = (ours != twins).any(dim=-1)
    worth = [importance.gather(-1, each.clamp(min=0).long()).masked_fill(each < 0, 0.0) for each in (ours, twins)]
    gap = (worth[0].sum(dim=-1) - worth[1].sum(dim=-1)).abs()
    assert float(differ.double().mean()) <= 0.01
    assert float(gap.max()) <= 1e-5


@pytest.mark.parametrize("num_selected", (1, 4, 6))
def test_equal_importance_takes_the_earlier_block_and_a_nan_none(num_selected: int) -> None:
    """Scores of few values, straight to the selecting kernel."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(3, (1, 40, 2, 10), generator=generator).float()
    scores[0, 30:, 0, 3] = float("nan")
    position_RQ, sizes = torch.arange(40)[None], ADJACENT._replace(num_selected=num_selected, num_initial=0)
    found = torch.full((1, 40, 2, num_selected), -1, dtype=torch.int32, device=DEVICE)
    start_R = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    counts = (0, 40, 40, 10, 2, sizes.selected_length, sizes.num_initial, sizes.num_local, num_selected)
    nsa_choice._select[(20, 1)](scores.to(DEVICE).contiguous(), start_R, found, *counts, PADDED_BLOCKS=16, SELECTIONS=4)
    assert torch.equal(found.cpu().long(), nsa.select_blocks(scores.double(), position_RQ, sizes))


# --------------------------------------------------------------------------------------- lists of the selected branch


def random_blocks(generator: torch.Generator) -> Tensor:
    """Ascending blocks of 6 [R, Q, G, S], with -1 where there are fewer."""
    rank = torch.rand(2, 11, 2, 6, generator=generator).argsort(dim=-1)[..., :3]
    rank[0, :4, :, 1:] = 6
    return rank.sort(dim=-1).values.masked_fill(rank.sort(dim=-1).values == 6, -1).int()


@pytest.mark.parametrize("queries", (1, 2, 4, 16))
def test_a_tile_has_each_block_once_with_the_queries_that_selected_it(queries: int) -> None:
    blocks_RQGS = random_blocks(torch.Generator().manual_seed(queries))
    tiles = nsa_selected.tiles_of(blocks_RQGS, 6, queries)
    for row in range(2):
        for group in range(2):
            for tile in range(-(-11 // queries)):
                mine = blocks_RQGS[row, tile * queries : (tile + 1) * queries, group].tolist()
                expected = [
                    (block, sum(1 << member for member, chosen in enumerate(mine) if block in chosen))
                    for block in range(6)
                    if any(block in chosen for chosen in mine)
                ]
                count = int(tiles.number[row, tile, group])
                blocks, members = (x[row, tile, group, :count].tolist() for x in tiles[:2])
                assert list(zip(blocks, members, strict=True)) == expected


@pytest.mark.parametrize("item_queries", (1, 3, 100))
def test_every_list_has_the_queries_of_its_block_in_order_and_enough_items(item_queries: int) -> None:
    blocks_RQGS = random_blocks(torch.Generator().manual_seed(0))
    lists = nsa_selected_backward.lists_of(blocks_RQGS, 6, item_queries)
    items = []
    for which in range(2 * 2 * 6):
        row, group, block = which // 12, which // 6 % 2, which % 6
        expected = [query for query in range(11) if block in blocks_RQGS[row, query, group].tolist()]
        assert lists.queries[lists.start_Z[which] : lists.start_Z[which + 1]].tolist() == expected
        assert int(lists.item_Z[which]) == len(items)
        items += [which] * -(-len(expected) // item_queries)
    assert lists.list_I[: len(items)].tolist() == items
    assert set(lists.list_I[len(items) :].tolist()) <= {24}


# ---------------------------------------------------------------------------------------------------------- borders


def test_dtypes_without_a_kernel_are_refused() -> None:
    p = problem(Case(FREE, 1, 1, 16, 3, (0,), 3))
    with pytest.raises(ValueError, match="float64; they take"):
        p.run(nsa_gpu, torch.float64)
    q, *branches, gates = p.leaves
    with pytest.raises(ValueError, match=r"torch\.bfloat16, torch\.float32; they take"):
        nsa_gpu.native_sparse_attention(q.bfloat16(), Branches(*branches), gates, p.position_RQ, p.sizes, p.scale)


def test_it_is_chosen_by_name() -> None:
    assert dispatch.nsa_kernels(torch.zeros(1, device=DEVICE), "triton") is nsa_gpu


@pytest.mark.parametrize("width", (16, 64, 128, 256))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shared", (99 << 10, 163 << 10, 227 << 10))
def test_tiles_fit_into_shared_memory(
    width: int, dtype: torch.dtype, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stays, and what is on its way: queries, their gradients, keys and values."""
    monkeypatch.setattr(nsa_tiles, "shared_bytes", lambda device: shared)
    x = torch.zeros(1, width, dtype=dtype)
    forward, query_backward, key_backward = nsa_tiles.plan(x)
    vectors = (
        forward.lines + forward.stages * 2 * forward.keys,
        query_backward.lines * 2 + query_backward.stages * 2 * query_backward.keys,
        key_backward.keys * 2 + key_backward.stages * 2 * key_backward.lines,
    )
    assert max(vectors) * width * x.element_size() <= shared
