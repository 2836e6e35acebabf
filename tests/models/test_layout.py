"""Packed layouts against the definition: a token sees its run's prefix, then its run up to itself, each key once."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rorqual.models.decoder import Decoder
from rorqual.models.layout import PackedLayout, TokenRun, causal_layout, layout_from_runs


@st.composite
def packings(draw: st.DrawFn) -> list[TokenRun]:
    """Lone sequences and groups with a shared prompt, in any order, passed to the layout in any order."""
    shapes = draw(
        st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(1, 40), max_size=4)), min_size=1, max_size=5)
    )
    runs, start = [], 0
    for prompt, completions in shapes:
        runs.append(TokenRun(start, prompt))
        prompt_start, start = start, start + prompt
        for length in completions:
            runs.append(TokenRun(start, length, prompt_start, prompt))
            start += length
    return draw(st.permutations(runs))


def definition(runs: list[TokenRun]) -> tuple[Tensor, Tensor]:
    """How often each token (row) sees each key (column), and each token's position, one by one."""
    num_tokens = sum(run.length for run in runs)
    seen_TT = torch.zeros(num_tokens, num_tokens, dtype=torch.int64)
    positions_T = torch.empty(num_tokens, dtype=torch.int64)
    for run in runs:
        for offset in range(run.length):
            token = run.start + offset
            positions_T[token] = run.prefix_length + offset
            seen_TT[token, run.prefix_start : run.prefix_start + run.prefix_length] += 1
            seen_TT[token, run.start : token + 1] += 1
    return seen_TT, positions_T


def unfold(layout: PackedLayout, num_tokens: int) -> tuple[Tensor, Tensor]:
    """What the blocks say: how often each token sees each key, and how often each token is a query."""
    seen_TT = torch.zeros(num_tokens, num_tokens, dtype=torch.int64)
    times_T = torch.zeros(num_tokens, dtype=torch.int64)
    for block in layout.blocks:
        num_rows, num_queries = block.query_index_RQ.shape
        num_keys = block.key_index_RK.shape[1]
        mask_RQK = block.mask_RQK()
        if mask_RQK is None:
            assert num_queries == num_keys
            mask_RQK = torch.ones(num_queries, num_keys, dtype=torch.bool).tril()[None]
        mask_RQK = mask_RQK.expand(num_rows, num_queries, num_keys)
        assert mask_RQK.any(dim=-1).all(), "a query with no key gives NaN"
        valid_RQ = (
            torch.ones_like(block.query_index_RQ) if block.query_valid_RQ is None else block.query_valid_RQ.long()
        )
        times_T.index_put_((block.query_index_RQ,), valid_RQ, accumulate=True)
        query_RQK = block.query_index_RQ[..., None].expand(mask_RQK.shape)
        key_RQK = block.key_index_RK[:, None].expand(mask_RQK.shape)
        seen_TT.index_put_((query_RQK, key_RQK), mask_RQK.long() * valid_RQ[..., None], accumulate=True)
    return seen_TT, times_T


def queries_in_order(layout: PackedLayout) -> Tensor:
    """Which token each place of the blocks' outputs belongs to, after the gather."""
    flat = torch.cat([block.query_index_RQ.flatten() for block in layout.blocks])
    return flat if layout.gather_T is None else flat[layout.gather_T]


@given(packings(), st.sampled_from([1.0, 1.25, 3.0]))
def test_layout_means_its_definition(runs: list[TokenRun], padding_limit: float) -> None:
    num_tokens = sum(run.length for run in runs)
    layout = layout_from_runs(runs, padding_limit=padding_limit)
    seen_TT, positions_T = definition(runs)
    found_TT, times_T = unfold(layout, num_tokens)
    assert times_T.tolist() == [1] * num_tokens
    assert torch.equal(found_TT, seen_TT)
    assert torch.equal(layout.positions_T, positions_T)
    assert queries_in_order(layout).tolist() == list(range(num_tokens))


@given(packings())
def test_padding_is_bounded(runs: list[TokenRun]) -> None:
    for block in layout_from_runs(runs, padding_limit=1.25).blocks:
        if block.query_valid_RQ is not None:
            shortest = int(block.query_valid_RQ.sum(dim=1).min())
            assert block.query_index_RQ.shape[1] <= shortest * 1.25 + 8
            assert block.key_valid_RK is not None
            fewest = int(block.key_valid_RK.sum(dim=1).min())
            assert block.key_index_RK.shape[1] <= fewest * 1.25 + 8


def test_one_long_prompt_does_not_pad_the_keys_of_others() -> None:
    """Four groups of like completions: three behind 20 tokens, one behind 8000."""
    runs, start = [], 0
    for prompt in (20, 8000, 20, 20):
        runs.append(TokenRun(start, prompt))
        prompt_start, start = start, start + prompt
        for length in (40, 41):
            runs.append(TokenRun(start, length, prompt_start, prompt))
            start += length
    sizes = sorted(tuple(block.key_index_RK.shape) for block in layout_from_runs(runs).blocks)
    assert sizes == [(1, 8000), (2, 8041), (3, 20), (6, 61)]


@given(packings())
def test_runs_of_like_prefix_share_a_block(runs: list[TokenRun]) -> None:
    """Where all prompts are equally long, keys never cut a block that queries do not."""
    prompt = 4
    alike, start = [TokenRun(0, prompt)], prompt
    for run in runs:
        alike.append(TokenRun(start, run.length, 0, prompt))
        start += run.length
    lengths, firsts = sorted(run.length for run in runs), 0
    while lengths:
        firsts += 1
        lengths = [length for length in lengths if length > lengths[0] * 1.25 + 8]
    assert len(layout_from_runs(alike).blocks) == 1 + firsts


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_causal_layout_is_runs_without_prefixes(lengths: list[int]) -> None:
    layout = causal_layout(lengths)
    seen_TT, times_T = unfold(layout, sum(lengths))
    expected = torch.block_diag(*[torch.ones(length, length).tril() for length in lengths]).long()
    assert torch.equal(seen_TT, expected)
    assert times_T.eq(1).all()
    assert layout.positions_T.tolist() == [position for length in lengths for position in range(length)]


def test_one_sequence_needs_no_mask_and_no_gather() -> None:
    layout = causal_layout([9])
    assert layout.gather_T is None
    assert layout.blocks[0].mask_RQK() is None


@pytest.mark.parametrize("lengths", ([], [3, 0, 2]))
def test_empty_runs_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        causal_layout(lengths)


def grouped_tokens(rng: random.Random) -> tuple[list[tuple[Tensor, list[Tensor]]], torch.Generator]:
    generator = torch.Generator().manual_seed(rng.randrange(1000))

    def tokens(most: int) -> Tensor:
        return torch.randint(61, (rng.randint(1, most),), generator=generator)

    return [(tokens(30), [tokens(20) for _ in range(rng.randint(1, 4))]) for _ in range(rng.randint(1, 3))], generator


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ("gqa", "mla", "softmax"))
def test_shared_prompt_equals_repeated_prompt(tiny_decoder: Callable[..., Decoder], kind: str, seed: int) -> None:
    """Values and every parameter's gradient, in float64; the loss reads the prompt's last token once a completion."""
    decoder = tiny_decoder(kind, seed)
    groups, generator = grouped_tokens(random.Random(seed))
    plain = [torch.cat([prompt, completion]) for prompt, completions in groups for completion in completions]
    plain_TD = decoder(torch.cat(plain), causal_layout([len(ids) for ids in plain])).hidden.split(
        [len(x) for x in plain]
    )
    prompt_lengths = [len(prompt) for prompt, completions in groups for _ in completions]
    wanted_TD = torch.cat([h[length - 1 :] for h, length in zip(plain_TD, prompt_lengths, strict=True)])

    runs, parts, reads, start = [], [], [], 0
    for prompt, completions in groups:
        prompt_start, prompt_end = start, start + len(prompt)
        runs.append(TokenRun(prompt_start, len(prompt)))
        parts.append(prompt)
        start = prompt_end
        for completion in completions:
            runs.append(TokenRun(start, len(completion), prompt_start, len(prompt)))
            parts.append(completion)
            reads += [prompt_end - 1, *range(start, start + len(completion))]
            start += len(completion)
    found_TD = decoder(torch.cat(parts), layout_from_runs(runs)).hidden[reads]

    weight_TD = torch.randn(found_TD.shape, generator=generator, dtype=torch.float64)
    parameters = dict(decoder.named_parameters())
    expected = torch.autograd.grad((wanted_TD * weight_TD).sum(), list(parameters.values()), allow_unused=True)
    found = torch.autograd.grad((found_TD * weight_TD).sum(), list(parameters.values()), allow_unused=True)
    torch.testing.assert_close(found_TD, wanted_TD, rtol=1e-10, atol=1e-10)
    for name, mine, theirs in zip(parameters, found, expected, strict=True):
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            torch.testing.assert_close(
                mine, theirs, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
            )
