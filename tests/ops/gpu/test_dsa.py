"""The Triton kernels of sparse attention against the twin in float64: on a GPU, and without one in Triton's
interpreter, where sizes are small because a program there takes milliseconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from rorqual.ops import dsa, dsa_tiled
from rorqual.ops.gpu import dsa as dsa_gpu
from rorqual.ops.gpu import dsa_backward, dsa_forward
from rorqual.ops.gpu.dsa_forward import Blocks, Sizes, choose_blocks, cut, padded
from rorqual.ops.gpu.dsa_key_gradient import column_chunk, key_lists, pair_blocks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}
"""Of ||a - b|| / ||b||; 1e-5 is let pass beside, because with a single key the gradient of a query is exactly 0."""


class Case(NamedTuple):
    rows: int
    queries: int
    keys: int
    groups: int
    sharing: int
    width: int
    value_width: int
    selected: int


class Problem(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    selected: Tensor
    direction: Tensor

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)


def random_selection(case: Case, generator: torch.Generator) -> Tensor:
    """Distinct keys in any order; every third place of the first query is empty, and those past the keys are."""
    rank = torch.rand(case.rows, case.queries, case.keys, generator=generator).argsort(dim=-1)
    selected = torch.full((case.rows, case.queries, case.selected), -1)
    count = min(case.keys, case.selected)
    selected[..., :count] = rank[..., :count]
    selected[:, 0, 2::3] = -1
    return selected


def problem(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    heads = case.groups * case.sharing

    def random(*shape: int) -> Tensor:
        return torch.randn(case.rows, *shape, generator=generator).to(DEVICE, dtype)

    return Problem(
        random(case.queries, heads, case.width),
        random(case.keys, case.groups, case.width),
        random(case.keys, case.groups, case.value_width),
        random_selection(case, generator).to(DEVICE),
        random(case.queries, heads, case.value_width),
    )


def results(operation: Any, p: Problem, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Output, and gradients of queries, keys and values along the direction."""
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in p[:3]]
    out = operation(*inputs, p.selected, p.scale)
    return [out.detach(), *torch.autograd.grad(out, inputs, p.direction.to(out.dtype))]


def assert_near_the_twin(found: list[Tensor], p: Problem) -> None:
    for name, ours, exact in zip(
        ("out", "dq", "dk", "dv"), found, results(dsa.sparse_attention, p, torch.float64), strict=True
    ):
        assert ours.dtype == p.q.dtype and ours.shape == exact.shape, name
        error, size = float((ours.double() - exact).norm()), float(exact.norm())
        assert error <= TOLERANCE[p.q.dtype] * size + 1e-5, f"{name}: {error:.1e} of {size:.1e}"


CASES = {
    "one of everything": Case(1, 1, 1, 1, 1, 32, 32, 1),
    "one query": Case(1, 1, 7, 1, 3, 40, 24, 5),
    "one key, rows": Case(3, 2, 1, 1, 2, 32, 32, 1),
    "fewer keys than places": Case(1, 2, 5, 1, 2, 48, 32, 9),
    "groups of 1": Case(1, 2, 6, 3, 1, 32, 32, 4),
    "groups of 3, rows": Case(2, 2, 5, 2, 3, 48, 40, 3),
    "groups of 4": Case(1, 2, 7, 2, 4, 96, 64, 5),
    "groups of 8": Case(1, 2, 7, 1, 8, 128, 128, 6),
    "groups of 16": Case(1, 2, 9, 1, 16, 192, 128, 7),
    "groups of 64": Case(1, 3, 7, 1, 64, 64, 48, 5),
    "groups of 130": Case(1, 2, 3, 1, 130, 32, 32, 3),
    "many keys": Case(1, 1, 135, 1, 2, 32, 32, 131),
    "latent": Case(1, 2, 9, 1, 20, 576, 512, 7),
}
HALF = [
    *((name, torch.bfloat16) for name in ("one query", "groups of 3, rows", "groups of 16", "groups of 64", "latent")),
    ("groups of 4", torch.float16),
]


@pytest.mark.parametrize("name", CASES)
def test_float32(name: str) -> None:
    p = problem(CASES[name])
    assert_near_the_twin(results(dsa_gpu.sparse_attention, p), p)


@pytest.mark.parametrize(("name", "dtype"), HALF)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    p = problem(CASES[name], dtype)
    assert_near_the_twin(results(dsa_gpu.sparse_attention, p), p)


def test_a_window_and_a_sink() -> None:
    """The first key is selected by every query, so that its list is the longest there can be."""
    case = Case(1, 20, 20, 1, 2, 32, 32, 4)
    query = torch.arange(20, device=DEVICE)
    window = torch.stack((query * 0, query - 2, query - 1, query), dim=-1)
    window[:, 1:] = window[:, 1:].masked_fill(window[:, 1:] < 1, -1)
    p = problem(case)._replace(selected=window[None])
    assert_near_the_twin(results(dsa_gpu.sparse_attention, p), p)


@pytest.mark.gpu
@pytest.mark.parametrize(("sharing", "groups", "width", "value_width"), [(128, 1, 576, 512), (16, 4, 128, 128)])
def test_at_full_size(sharing: int, groups: int, width: int, value_width: int) -> None:
    """What the interpreter has no time for: full blocks, many tiles, the same bits from programs that race."""
    p = problem(Case(1, 700, 700, groups, sharing, width, value_width, 300), torch.bfloat16)
    first = results(dsa_gpu.sparse_attention, p)
    assert_near_the_twin(first, p)
    for _ in range(3):
        for once, again in zip(first, results(dsa_gpu.sparse_attention, p), strict=True):
            assert torch.equal(once, again)


@pytest.mark.parametrize("scratch", [1 << 30, 1])
def test_repeated_runs_give_the_same_bits(scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one tile of queries, and in as many as there are queries."""
    monkeypatch.setattr(dsa_backward, "SCRATCH_BYTES", scratch)
    p = problem(Case(2, 3, 4, 1, 3, 32, 32, 3), torch.bfloat16)
    first = results(dsa_gpu.sparse_attention, p)
    assert_near_the_twin(first, p)
    for once, again in zip(first, results(dsa_gpu.sparse_attention, p), strict=True):
        assert torch.equal(once, again)


def test_tiles_are_within_their_memory_and_take_every_query_once(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(Case(2, 7, 5, 1, 3, 32, 40, 3))
    saved = dsa_backward.Saved(*p[:4], p.direction, p.direction)
    per_query = 2 * (64 * (2 * 3 + 40) * 4 + 3 * 4 * 3 * 40)
    monkeypatch.setattr(dsa_backward, "SCRATCH_BYTES", 3 * per_query + 1)
    assert list(dsa_backward.query_tiles(saved)) == [slice(0, 3), slice(3, 6), slice(6, 7)]


def test_what_nobody_selects_gets_no_gradient_and_who_selects_nothing_gets_zero() -> None:
    p = problem(Case(1, 3, 6, 2, 2, 32, 32, 3))
    p.selected[:] = torch.tensor([[4, 1, -1], [-1, -1, -1], [-1, 4, -1]])
    p.k[:, [0, 2, 3, 5]], p.v[:, [0, 2, 3, 5]] = torch.nan, torch.nan  # They are not even looked at.
    out, grad_q, grad_k, grad_v = results(dsa_gpu.sparse_attention, p)
    assert not out[:, 1].any() and not grad_q[:, 1].any()
    for gradient in (grad_k, grad_v):
        assert not gradient[:, [0, 2, 3, 5]].any()
        assert gradient[:, [1, 4]].ne(0).all(dim=-1).all()
    finite = p._replace(k=p.k.nan_to_num(), v=p.v.nan_to_num())
    assert_near_the_twin([out, grad_q, grad_k, grad_v], finite)


@pytest.fixture
def filled_memory() -> Iterator[None]:
    """New memory holds NaN, so that what is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("scratch", [1 << 30, 1])
def test_memory_is_written_before_it_is_read(
    scratch: int, filled_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole blocks of absent keys, which kernels pass over, in front of present ones and behind them."""
    assert torch.empty(3).isnan().all()
    monkeypatch.setattr(dsa_backward, "SCRATCH_BYTES", scratch)
    p = problem(Case(1, 2, 5, 1, 2, 32, 48, 99))
    p.selected[:] = -1
    p.selected[0, 0, [40, 41, 95]] = torch.tensor([3, 0, 2], device=DEVICE)
    p.selected[0, 1, 33] = 2
    assert_near_the_twin(results(dsa_gpu.sparse_attention, p), p)


def test_nothing_at_all() -> None:
    p = problem(Case(1, 2, 3, 1, 2, 32, 32, 1))
    for selected in (p.selected.fill_(-1), p.selected[..., :0]):
        assert not any(x.any() for x in results(dsa_gpu.sparse_attention, p._replace(selected=selected)))


def test_all_keys_are_dense_attention_and_empty_places_change_no_bit() -> None:
    p = problem(Case(1, 6, 6, 1, 2, 32, 32, 6))
    everything = dsa_tiled.select_all(torch.arange(6, device=DEVICE)[None], 6, None)
    found = dsa_gpu.sparse_attention(*p[:3], everything, p.scale)
    q, k, v = (x.transpose(1, 2).double() for x in p[:3])
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=p.scale, enable_gqa=True)
    torch.testing.assert_close(found.double(), dense.transpose(1, 2), rtol=1e-5, atol=1e-6)
    wider = torch.nn.functional.pad(everything, (0, 5), value=-1)
    assert torch.equal(dsa_gpu.sparse_attention(*p[:3], wider, p.scale), found)


def test_narrow_indices_and_strides_change_no_bit() -> None:
    p = problem(Case(2, 2, 5, 2, 2, 32, 32, 3))
    expected = results(dsa_gpu.sparse_attention, p)
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in p[:3]]
    last = p.direction.transpose(2, 3).contiguous().transpose(2, 3)
    strided = Problem(*apart, p.selected.int(), last)
    for ours, theirs in zip(results(dsa_gpu.sparse_attention, strided), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("width", "value_width"), [(48, 32), (32, 32), (48, 16)])
def test_values_that_are_a_part_of_the_keys(width: int, value_width: int) -> None:
    """As in latent attention; they are loaded with the keys where they fill the main part of the cut."""
    p = problem(Case(2, 2, 5, 1, 3, width, value_width, 3))
    sizes = dsa_forward.sizes_of(p.q, p.k, p.k[..., :value_width])
    assert sizes.values_are_keys == (value_width == 32)
    q, k = (x.detach().requires_grad_() for x in p[:2])
    exact_q, exact_k = (x.detach().double().requires_grad_() for x in p[:2])
    out = dsa_gpu.sparse_attention(q, k, k[..., :value_width], p.selected, p.scale)
    exact = dsa.sparse_attention(exact_q, exact_k, exact_k[..., :value_width], p.selected, p.scale)
    found = [out, *torch.autograd.grad(out, (q, k), p.direction)]
    expected = [exact, *torch.autograd.grad(exact, (exact_q, exact_k), p.direction.double())]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs).detach().norm() <= 1e-5 * theirs.detach().norm()


def test_the_list_of_a_key_is_the_queries_that_selected_it_in_order() -> None:
    selected = problem(Case(2, 9, 6, 1, 1, 32, 32, 4)).selected
    lists = key_lists(selected, 6)
    flat = selected.flatten().tolist()
    for row in range(2):
        for key in range(6):
            begin, end = lists.begin_L[row * 6 + key : row * 6 + key + 2].tolist()
            assert lists.pairs_N[begin:end].tolist() == [
                pair for pair in range(row * 36, row * 36 + 36) if flat[pair] == key
            ]


# -------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("width", [1, 5, 16, 24, 32, 40, 48, 80, 96, 100, 128, 192, 576, 1000])
def test_a_cut_covers_its_width_with_powers_of_two(width: int) -> None:
    main, rest = cut(width)
    assert main & (main - 1) == 0 and main >= 16 and (rest == 0 or (rest & (rest - 1) == 0 and rest >= 16))
    assert width <= main + rest < 2 * max(width, 16)
    assert padded(width) >= max(16, width) and padded(width) < 2 * max(16, width)


def test_blocks_by_hand() -> None:
    """That they fit where they are used is seen when they are compiled, in `test_dsa_compiles.py`."""
    latent = Sizes(128, 576, 512, 2, False)
    assert choose_blocks(latent, 227 << 10) == Blocks(64, 32, 2, 8)
    assert choose_blocks(latent, 163 << 10) == Blocks(64, 32, 1, 8)
    assert choose_blocks(latent._replace(values_are_keys=True), 163 << 10) == Blocks(64, 32, 2, 8)
    assert choose_blocks(latent._replace(values_are_keys=True), 99 << 10) == Blocks(16, 32, 2, 8)
    assert choose_blocks(Sizes(4, 128, 128, 2, False), 99 << 10) == Blocks(16, 64, 2, 4)
    assert choose_blocks(latent._replace(itemsize=4), 163 << 10) == Blocks(16, 16, 1, 8)
    with pytest.raises(ValueError, match="do not fit into the 101376 bytes"):
        choose_blocks(latent._replace(itemsize=4), 99 << 10)


def test_columns_are_padded_least() -> None:
    half = pair_blocks(128, torch.bfloat16)
    widths = {576: 64, 512: 128, 192: 64, 128: 128, 96: 32, 48: 16, 40: 16, 5: 16}
    assert {width: column_chunk(width, half) for width in widths} == widths
    assert column_chunk(512, pair_blocks(128, torch.float32)) == 32


def test_a_device_with_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one block of heads to a group, and of keys to a query."""
    monkeypatch.setattr(dsa_forward, "shared_bytes", lambda device: 20 << 10)
    p = problem(Case(1, 1, 40, 1, 40, 64, 64, 37), torch.bfloat16)
    assert choose_blocks(Sizes(40, 64, 64, 2, False), 20 << 10) == Blocks(32, 32, 1, 4)
    assert_near_the_twin(results(dsa_gpu.sparse_attention, p), p)


# ------------------------------------------------------------------------------------------------------------- refusal


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(Case(1, 2, 3, 2, 2, 32, 32, 1))
    for q, k, v, selected in (
        (p.q[..., :16], *p[1:4]),
        (p.q[:, :, :3], *p[1:4]),
        (p.q, p.k[:, :2], *p[2:4]),
        (*p[:3], p.selected[:, :1]),
    ):
        with pytest.raises(ValueError, match=r"expected \[R, Q, H, E\]"):
            dsa_gpu.sparse_attention(q, k, v, selected, p.scale)
    for q in (p.q.bfloat16(), p.q.double()):
        with pytest.raises(ValueError, match="the Triton kernels take one dtype for all"):
            dsa_gpu.sparse_attention(q, *p[1:4], p.scale)
    with pytest.raises(ValueError, match="the Triton kernels take one dtype for all"):
        dsa_gpu.sparse_attention(*(x.double() for x in p[:3]), p.selected, p.scale)
    monkeypatch.setattr(dsa_gpu, "INTERPRETED", type(dsa_gpu.INTERPRETED)(False))
    with pytest.raises(ValueError, match="tensors are on 'cpu'.*kernels = 'tiled'"):
        dsa_gpu.sparse_attention(*(x.cpu() for x in p[:4]), p.scale)
