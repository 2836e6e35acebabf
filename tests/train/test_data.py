"""Packing: what each target's prediction can see must be exactly the tokens before it, however samples are packed."""

from __future__ import annotations

from array import array

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from rorqual.models.layout import PackedLayout
from rorqual.records import KeptTokens, Routes, TrainSample
from rorqual.train.data import PackedBatch, first_fit_decreasing, pack_documents, pack_samples
from tests.train.fakes import build_decoder, random_samples, with_routes


def visible_tokens(layout: PackedLayout) -> dict[int, list[int]]:
    """Packed token -> the packed tokens that it may look at, read off the attention blocks one by one."""
    seen: dict[int, list[int]] = {}
    for block in layout.blocks:
        num_queries, num_keys = block.query_index_RQ.shape[1], block.key_index_RK.shape[1]
        for row in range(len(block.query_index_RQ)):
            for query in range(num_queries):
                if block.query_valid_RQ is not None and not block.query_valid_RQ[row, query]:
                    continue
                keys = range(num_keys - num_queries + query + 1)
                valid = [k for k in keys if block.key_valid_RK is None or bool(block.key_valid_RK[row, k])]
                token = int(block.query_index_RQ[row, query])
                assert token not in seen, "a token is a query twice"
                seen[token] = [int(block.key_index_RK[row, k]) for k in valid]
    return seen


def check_batch(batch: PackedBatch, samples: dict[str, TrainSample]) -> None:
    """Every target of every sequence is predicted from exactly the tokens before it, at the right position."""
    seen = visible_tokens(batch.layout)
    assert sorted(seen) == list(range(batch.num_tokens))
    expected = []
    for sequence, name in enumerate(batch.sample_ids):
        sample = samples[name]
        expected += [(sequence, at, sample) for at, mark in enumerate(sample.sampled) if mark]
    assert batch.num_targets == len(expected)
    assert batch.behaviour_N is not None and batch.advantage_S is not None
    for n, (sequence, at, sample) in enumerate(expected):
        token = int(batch.predict_index_N[n])
        context = [int(batch.token_ids_T[each]) for each in seen[token]]
        assert context == sample.token_ids[:at].tolist()
        assert int(batch.layout.positions_T[token]) == at - 1
        assert int(batch.target_N[n]) == sample.token_ids[at]
        assert int(batch.sequence_index_N[n]) == sequence
        assert float(batch.behaviour_N[n]) == sample.behaviour_logprobs[at]
        assert float(batch.advantage_S[sequence]) == pytest.approx(sample.advantage, rel=1e-6)
        assert batch.domains_S[sequence] == sample.domain
        if batch.routes_TLK is not None and sample.routes is not None:
            routes = torch.tensor(sample.routes.experts.tolist()).view(len(sample.routes), -1)
            assert torch.equal(batch.routes_TLK[seen[token]].flatten(1).long(), routes[:at])


@given(seed=st.integers(0, 10_000), token_budget=st.integers(1, 120), share_prefix=st.booleans())
def test_every_target_sees_exactly_the_tokens_before_it(seed: int, token_budget: int, share_prefix: bool) -> None:
    samples = random_samples(seed, num_groups=4, with_kept=seed % 2 == 0)
    batches = pack_samples(samples, token_budget, share_prefix=share_prefix)
    by_name = {sample.sample_id: sample for sample in samples}
    for batch in batches:
        check_batch(batch, by_name)
        longest = max(len(by_name[name].token_ids) - 1 for name in batch.sample_ids)
        assert batch.num_tokens <= max(token_budget, longest)
    packed = [name for batch in batches for name in batch.sample_ids]
    assert sorted(packed) == sorted(sample.sample_id for sample in samples)


def test_a_group_feeds_its_prompt_once() -> None:
    samples = random_samples(3, num_groups=6)
    fed_alone = sum(len(sample.token_ids) - 1 for sample in samples)
    prompts = {sample.group_id: sample.prompt_length for sample in samples}
    saved = sum(sample.prompt_length for sample in samples) - sum(prompts.values())
    assert saved > 0
    assert sum(batch.num_tokens for batch in pack_samples(samples, 10_000)) == fed_alone - saved
    assert sum(batch.num_tokens for batch in pack_samples(samples, 10_000, share_prefix=False)) == fed_alone


def test_prompts_with_other_routes_are_not_shared_and_free_rows_are_marked() -> None:
    model = build_decoder("mla_moe")
    plain = [sample for sample in random_samples(5, num_groups=8) if sample.group_id == "g2"]
    assert len(plain) >= 3
    same, other = with_routes(model, plain), with_routes(model, plain, shift=1)
    mixed = [same[0], same[1], other[2]]
    (batch,) = pack_samples(mixed, 10_000)
    check_batch(batch, {sample.sample_id: sample for sample in mixed})
    assert batch.num_tokens == sum(len(s.token_ids) - 1 for s in mixed) - mixed[0].prompt_length
    (free,) = pack_samples([same[0], plain[1]], 10_000)
    assert free.routes_TLK is not None and free.routes_TLK.dtype == torch.int16
    assert int((free.routes_TLK[:, 0, 0] == -1).sum()) == len(plain[1].token_ids) - 1
    (unforced,) = pack_samples(mixed, 10_000, keep_routing=False)
    assert unforced.routes_TLK is None


def test_kept_sets_follow_their_targets_and_are_never_mixed_with_full_ones() -> None:
    samples = random_samples(1, with_kept=True) + random_samples(2)
    batches = pack_samples(samples, 10_000)
    assert [batch.kept is not None for batch in batches] == [False, True]
    kept = batches[1].kept
    assert kept is not None and len(kept) == batches[1].num_targets
    for n, target in enumerate(batches[1].target_N.tolist()):
        assert target in kept.ids[kept.offsets_N1[n] : kept.offsets_N1[n + 1]].tolist()
    assert all(batch.kept is None for batch in pack_samples(samples, 10_000, keep_sampling_mask=False))


def test_packing_is_deterministic() -> None:
    samples = random_samples(11, num_groups=5)
    first, second = pack_samples(samples, 30), pack_samples(samples, 30)
    assert [batch.sample_ids for batch in first] == [batch.sample_ids for batch in second]
    assert all(torch.equal(a.token_ids_T, b.token_ids_T) for a, b in zip(first, second, strict=True))


@given(sizes=st.lists(st.integers(1, 50), max_size=60), capacity=st.integers(1, 60))
def test_bins_hold_every_item_once_and_are_tight(sizes: list[int], capacity: int) -> None:
    bins = first_fit_decreasing(sizes, capacity)
    assert sorted(index for each in bins for index in each) == list(range(len(sizes)))
    loads = [sum(sizes[index] for index in each) for each in bins]
    assert all(load <= capacity or len(each) == 1 for load, each in zip(loads, bins, strict=True))
    assert sum(load <= capacity / 2 for load in loads) <= 1
    if sizes and max(sizes) <= capacity:
        assert len(bins) <= 11 / 9 * -(-sum(sizes) // capacity) * 2


def test_documents_predict_every_token_but_the_first_and_weights_select() -> None:
    documents = [array("i", [1, 2, 3]), array("i", [4, 5]), array("i", range(6, 16))]
    (batch,) = pack_documents(documents, 100)
    assert batch.num_tokens == 2 + 1 + 9
    assert batch.target_N.tolist() == [2, 3, 5, *range(7, 16)]
    assert batch.token_ids_T[batch.predict_index_N].tolist() == [1, 2, 4, *range(6, 15)]
    assert batch.weight_N is not None and batch.weight_N.tolist() == [1.0] * 12
    weights = [array("f", [9, 0, 0.5]), array("f", [0, 1]), array("f", [0] * 9 + [2])]
    (batch,) = pack_documents(documents, 100, weights=weights)
    assert batch.num_tokens == 12
    assert batch.target_N.tolist() == [3, 5, 15]
    assert batch.weight_N is not None and batch.weight_N.tolist() == [0.5, 1.0, 2.0]
    assert [each.num_tokens for each in pack_documents(documents, 3)] == [9, 3]


def test_refuses_documents_without_targets() -> None:
    with pytest.raises(ValueError, match="document 1 of 1 tokens has no target"):
        pack_documents([array("i", [1, 2]), array("i", [3])], 10)
    with pytest.raises(ValueError, match="document 0 of 2 tokens has no target"):
        pack_documents([array("i", [1, 2])], 10, weights=[array("f", [1, 0])])
    with pytest.raises(ValueError, match="document 0 has 2 tokens but 1 weights"):
        pack_documents([array("i", [1, 2])], 10, weights=[array("f", [1])])
    with pytest.raises(ValueError, match="token_budget = 0"):
        pack_documents([array("i", [1, 2])], 0)


GOOD = TrainSample(
    sample_id="t7#2/0",
    group_id="t7",
    domain="logic",
    token_ids=array("i", [1, 2, 3]),
    sampled=array("b", [0, 1, 1]),
    behaviour_logprobs=array("f", [0, -1, -1]),
    prompt_length=1,
    advantage=1.0,
    weight_version=0,
)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"prompt_length": 0}, "prompt is empty"),
        ({"prompt_length": 2}, "prompt_length is 2, but token 1 was sampled"),
        ({"sampled": array("b", [0, 0, 0])}, "no sampled token"),
        ({"behaviour_logprobs": array("f", [0, -1])}, "2 log-probs"),
        ({"kept": KeptTokens(offsets=array("q", [0, 1]), ids=array("i", [2]))}, "1 kept-token sets for 2"),
        ({"routes": Routes(experts=array("h", [0]), num_layers=1, experts_per_token=1)}, "1 rows of routes for 2"),
    ],
)
def test_refuses_bad_samples_by_name(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=f"sample t7#2/0 .*{problem}"):
        pack_samples([replace(GOOD, **changes)], 10)


def test_refuses_routes_of_several_shapes() -> None:
    one = replace(GOOD, routes=Routes(experts=array("h", [0] * 2), num_layers=1, experts_per_token=1))
    two = replace(GOOD, group_id="other", routes=Routes(experts=array("h", [0] * 4), num_layers=2, experts_per_token=1))
    with pytest.raises(ValueError, match="expected one shape"):
        pack_samples([one, two], 10)
