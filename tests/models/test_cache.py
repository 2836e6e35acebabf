"""The key-value cache: copies, exchanges, growth, and what a call may see."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from rorqual.models.cache import Column, KVCache, cached_layout
from rorqual.models.decoder import Decoder


def filled_cache(num_slots: int = 3, capacity: int = 5) -> KVCache:
    cache = KVCache([(Column(4), Column(2))] * 2, num_slots=num_slots, capacity=capacity, like=torch.zeros(1))
    for columns in cache.columns:
        for column in columns:
            column.copy_(torch.arange(column.numel()).view_as(column))
    return cache


def test_copy_tokens_changes_only_the_first_tokens_of_the_target() -> None:
    cache, before = filled_cache(), filled_cache()
    cache.copy_tokens(source=2, target=0, length=3)
    for columns, old_columns in zip(cache.columns, before.columns, strict=True):
        for column, old in zip(columns, old_columns, strict=True):
            assert torch.equal(column[0, :3], old[2, :3])
            assert torch.equal(column[0, 3:], old[0, 3:])
            assert torch.equal(column[1:], old[1:])


def test_swap_exchanges_the_first_tokens() -> None:
    cache, before = filled_cache(), filled_cache()
    cache.swap(0, 2, length=4)
    for columns, old_columns in zip(cache.columns, before.columns, strict=True):
        for column, old in zip(columns, old_columns, strict=True):
            assert torch.equal(column[0, :4], old[2, :4])
            assert torch.equal(column[2, :4], old[0, :4])
            assert torch.equal(column[:, 4:], old[:, 4:])
            assert torch.equal(column[1], old[1])


def test_grow_keeps_what_is_stored() -> None:
    cache, before = filled_cache(), filled_cache()
    cache.grow(9)
    assert cache.capacity == 9
    for columns, old_columns in zip(cache.columns, before.columns, strict=True):
        for column, old in zip(columns, old_columns, strict=True):
            assert column.shape[:2] == (3, 9)
            assert torch.equal(column[:, :5], old)


class HeldColumns(TorchFunctionMode):
    """Counts, after every call of torch, the tensors that are alive: the columns of before, and results as large."""

    def __init__(self, cache: KVCache) -> None:
        super().__init__()
        self.alive = [weakref.ref(column) for columns in cache.columns for column in columns]
        self.least, self.most = min(ref().numel() for ref in self.alive), len(self.alive)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= self.least:
            self.alive.append(weakref.ref(result))
            self.most = max(self.most, len({id(ref()) for ref in self.alive if ref() is not None}))
        return result


def test_grow_holds_one_column_twice_at_a_time() -> None:
    cache = filled_cache()
    with HeldColumns(cache) as held:
        cache.grow(9)
    assert len(held.alive) == 8
    assert held.most == 5


@pytest.mark.parametrize("slots", (range(1, 3), [2, 0]))
def test_layout_writes_after_the_tokens_and_sees_up_to_each(slots: range | list[int]) -> None:
    cache = filled_cache()
    layout = cached_layout(slots, [1, 3], 2, cache)
    assert layout.positions_RQ.tolist() == [[1, 2], [3, 4]]
    assert layout.num_keys == 5
    assert layout.bias_RQK is not None
    assert layout.bias_RQK.eq(0.0).sum(dim=-1).tolist() == [[2, 3], [4, 5]]
    assert layout.bias_RQK.isneginf().sum(dim=-1).tolist() == [[3, 2], [1, 0]]
    new = torch.full((4, 4), -1.0), torch.full((4, 2), -2.0)
    before = filled_cache().columns[1]
    layout.write(cache.columns[1], new)
    read = layout.read(cache.columns[1][0])
    for row, (slot, start) in enumerate(zip(slots, (1, 3), strict=True)):
        assert read[row, start : start + 2].eq(-1.0).all()
        assert torch.equal(read[row, :start], before[0][slot, :start])
    assert sum(int(column.lt(0).sum()) for column in cache.columns[1]) == 4 * 4 + 4 * 2
    assert torch.equal(cache.columns[0][0], filled_cache().columns[0][0])


def test_single_queries_of_equal_length_need_no_bias() -> None:
    assert cached_layout(range(2), [3, 3], 1, filled_cache()).bias_RQK is None
    assert cached_layout(range(2), [3, 2], 1, filled_cache()).bias_RQK is not None
    assert cached_layout(range(2), [3, 3], 2, filled_cache()).bias_RQK is not None


def test_a_row_past_the_capacity_is_refused() -> None:
    with pytest.raises(ValueError, match=r"holds 5 tokens.*needs 6"):
        cached_layout(range(2), [0, 4], 2, filled_cache())


@pytest.mark.parametrize("kind", ("gqa", "mla"))
def test_continuing_a_copied_prefix(tiny_decoder: Callable[..., Decoder], kind: str) -> None:
    """A slot that was given another's prompt goes on as if it had read the prompt itself."""
    decoder = tiny_decoder(kind)
    prompt, tail = torch.randint(61, (12,), generator=torch.Generator().manual_seed(0)).split(8)
    cache = decoder.new_cache(num_slots=4, capacity=16)
    with torch.no_grad():
        for slots, ids, start in ((range(1, 2), prompt, 0), (range(1, 2), tail, 8)):
            layout = cached_layout(slots, [start], len(ids), cache)
            expected = decoder.forward_cached(ids[None], cache, layout).hidden
        cache.copy_tokens(source=1, target=3, length=8)
        layout = cached_layout([3], [8], len(tail), cache)
        assert torch.equal(decoder.forward_cached(tail[None], cache, layout).hidden, expected)


def test_mla_caches_the_latent_alone(tiny_decoder: Callable[..., Decoder]) -> None:
    """kv_lora_rank + qk_rope_head_dim numbers a token and layer (DeepSeek-V2, table 1), not 2 * heads * dimension."""
    widths = {
        kind: [column.shape[-1] for column in tiny_decoder(kind).new_cache(1, 2).columns[0]] for kind in ("mla", "gqa")
    }
    assert widths == {"mla": [8 + 4], "gqa": [20, 20]}


def test_what_each_row_reads() -> None:
    """The new token is the last; a prompt that rows share is read where the first of them keeps it."""
    alone = cached_layout([2, 0], [3, 1], 1, filled_cache()).reads
    assert alone is not None
    assert [each.tolist() for each in alone] == [[2, 0], [4, 2], [2, 0], [0, 0]]
    shared = cached_layout([2, 0, 1], [3, 3, 4], 1, filled_cache(), ([0, 0, 2], np.array([2, 2, 3]))).reads
    assert shared is not None
    assert [each.tolist() for each in shared] == [[2, 0, 1], [4, 4, 5], [2, 2, 1], [2, 2, 3]]
    assert cached_layout([2, 0], [1, 1], 2, filled_cache()).reads is None
