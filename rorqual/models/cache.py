"""The key-value cache: one row of tokens a slot, for every layer.

Each attention kind keeps something of a token (`kinds.cache_columns`): keys and values for grouped-query attention, the
latent and the rotated key for MLA, and an indexer's key beside them. The cache stores those columns flat, so that one
`index_copy_` writes any set of tokens.

Shapes: S slots, C capacity in tokens, R rows in a call, Q queries a row, K keys visible, W width of a column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rorqual.ops.cpu.attention import RowReads


class Column(NamedTuple):
    """What a token leaves in one column of the cache: so many numbers of `dtype`, None being the model's."""

    width: int
    dtype: torch.dtype | None = None


class KVCache:
    """`columns[layer][i]` is [S, C, W_i]. Which tokens of a slot are valid is the caller's to know."""

    def __init__(self, layers: Sequence[Sequence[Column]], num_slots: int, capacity: int, like: Tensor) -> None:
        """layers: the columns of each. The model's dtype and device are those of `like`."""
        self.num_slots, self.capacity, self.dtype, self.device = num_slots, capacity, like.dtype, like.device
        self.columns = [
            [
                torch.zeros(num_slots, capacity, width, dtype=dtype or like.dtype, device=like.device)
                for width, dtype in columns
            ]
            for columns in layers
        ]

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` tokens a slot. Column by column: one of them at a time is held twice."""
        extra = capacity - self.capacity
        for columns in self.columns:
            for index in range(len(columns)):
                columns[index] = torch.nn.functional.pad(columns[index], (0, 0, 0, extra))
        self.capacity = capacity

    def copy_tokens(self, source: int, target: int, length: int) -> None:
        """Make the first `length` tokens of slot `target` equal to those of slot `source`."""
        for columns in self.columns:
            for column in columns:
                column[target, :length] = column[source, :length]

    def swap(self, first: int, second: int, length: int) -> None:
        """Exchange the first `length` tokens of two slots."""
        for columns in self.columns:
            for column in columns:
                kept = column[first, :length].clone()
                column[first, :length] = column[second, :length]
                column[second, :length] = kept


@dataclass(frozen=True)
class CachedLayout:
    """Where the new tokens of a call go, and what they see. Build it with `cached_layout`.

    slots: the rows' slots, a slice where they are consecutive (then the cache is read in place). positions_RQ: the new
    tokens' positions, and write_index_N their place in [S*C), row by row. K = `num_keys` covers the longest row.
    masked: whether some query may not look at all K. reads: what each row reads, where it brings one query.
    """

    slots: slice | Tensor
    positions_RQ: Tensor
    write_index_N: Tensor
    num_keys: int
    masked: bool
    dtype: torch.dtype
    reads: RowReads | None = None

    @property
    def num_rows(self) -> int:
        return len(self.positions_RQ)

    @property
    def one_query(self) -> bool:
        """Whether each row brings one new token."""
        return self.positions_RQ.shape[1] == 1

    @cached_property
    def bias_RQK(self) -> Tensor | None:
        """0 where a query may look, -inf elsewhere; None where all may look at all."""
        if not self.masked:
            return None
        hidden_RQK = torch.arange(self.num_keys, device=self.positions_RQ.device) > self.positions_RQ[..., None]
        bias_RQK = torch.zeros(hidden_RQK.shape, dtype=self.dtype, device=hidden_RQK.device)
        return bias_RQK.masked_fill_(hidden_RQK, -math.inf)

    def write(self, columns: list[Tensor], new: tuple[Tensor, ...]) -> None:
        """Store the new tokens' columns, each [R*Q, W]."""
        for column, values in zip(columns, new, strict=True):
            column.view(-1, column.shape[-1]).index_copy_(0, self.write_index_N, values)

    def read(self, column: Tensor) -> Tensor:
        """The rows' tokens, new ones included: [R, K, W]."""
        return column[self.slots, : self.num_keys]


def cached_layout(
    slots: range | list[int],
    starts: np.ndarray | Sequence[int],
    num_queries: int,
    cache: KVCache,
    shared: tuple[list[int], np.ndarray] | None = None,
) -> CachedLayout:
    """`num_queries` new tokens for each slot, after the `starts` tokens it holds.

    A row may hold fewer real tokens than `num_queries`; what is written past them is seen by nothing and overwritten
    by the tokens that follow. shared: for each row, a row of this call that begins alike (or itself), and with how many
    tokens. Raises: ValueError when a row would pass the capacity.
    """
    slots_R, starts_R = np.array(slots, dtype=np.int64), np.asarray(starts, dtype=np.int64)
    num_keys = int(starts_R.max()) + num_queries
    if num_keys > cache.capacity:
        raise ValueError(f"The cache holds {cache.capacity} tokens a slot, and this call needs {num_keys}.")
    device = cache.device
    positions_RQ = starts_R[:, None] + np.arange(num_queries)
    write_index_N = (slots_R[:, None] * cache.capacity + positions_RQ).reshape(-1)
    return CachedLayout(
        slots=slice(slots.start, slots.stop) if isinstance(slots, range) else torch.from_numpy(slots_R).to(device),
        positions_RQ=torch.from_numpy(positions_RQ).to(device),
        write_index_N=torch.from_numpy(write_index_N).to(device),
        num_keys=num_keys,
        masked=num_queries > 1 or int(starts_R.min()) < num_keys - 1,
        dtype=cache.dtype,
        reads=_row_reads(slots_R, starts_R, shared) if num_queries == 1 else None,
    )


def _row_reads(slots_R: np.ndarray, starts_R: np.ndarray, shared: tuple[list[int], np.ndarray] | None) -> RowReads:
    if shared is None:
        return RowReads(slots_R, starts_R + 1, slots_R, np.zeros_like(starts_R))
    rows, lengths_R = shared
    return RowReads(slots_R, starts_R + 1, slots_R[rows], lengths_R)
