"""The key-value cache: one row of tokens a slot, for every layer.

Each attention kind says what it keeps for a token (`widths`): keys and values for grouped-query attention, the latent
and the rotated key for MLA. The cache stores those columns flat, so that one `index_copy_` writes any set of tokens.

Shapes: S slots, C capacity in tokens, R rows in a call, Q queries a row, K keys visible, W width of a column.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MIN_SHARED_TOKENS = 128
"""Shorter prefixes are read row by row: to sort the rows by prompt would cost more than it saves."""


class KVCache:
    """`columns[layer][i]` is [S, C, W_i]. Which tokens of a slot are valid is the caller's to know."""

    def __init__(self, num_layers: int, widths: tuple[int, ...], num_slots: int, capacity: int, like: Tensor) -> None:
        self.num_slots, self.capacity, self.dtype = num_slots, capacity, like.dtype
        self.columns = [
            [torch.zeros(num_slots, capacity, width, dtype=like.dtype, device=like.device) for width in widths]
            for _ in range(num_layers)
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
class SharedPrefix:
    """Rows whose first `length` tokens are the same, so that one row's keys serve them all. families: rows alike (of
    those in the call) and the one to read; together they name every row once."""

    length: int
    families: tuple[tuple[slice | Tensor, int], ...]


@dataclass(frozen=True)
class CachedLayout:
    """Where the new tokens of a call go, and what they see. Build it with `cached_layout`.

    slots: the rows' slots, a slice where they are consecutive (then the cache is read in place). write_index_N: flat
    token index in [S*C) of each new token, and positions_N its position, row by row. K covers the longest row.
    bias_RQK: 0 where a query may look, -inf elsewhere; None where all may look at all. shared: what rows have alike.
    """

    slots: slice | Tensor
    positions_N: Tensor
    write_index_N: Tensor
    num_rows: int
    num_keys: int
    bias_RQK: Tensor | None
    shared: SharedPrefix | None = None

    def write(self, columns: list[Tensor], new: tuple[Tensor, ...]) -> None:
        """Store the new tokens' columns, each [R*Q, W]."""
        for column, values in zip(columns, new, strict=True):
            column.view(-1, column.shape[-1]).index_copy_(0, self.write_index_N, values)

    def read(self, column: Tensor) -> Tensor:
        """The rows' tokens, new ones included: [R, K, W]."""
        return column[self.slots, : self.num_keys]


def shared_prefix(family_R: np.ndarray, lengths_R: np.ndarray) -> SharedPrefix | None:
    """Rows of equal `family_R` hold the same first tokens, `lengths_R` of them. None where reading them together would
    save little: fewer than two rows a family, or less than MIN_SHARED_TOKENS in common."""
    length, families = int(lengths_R.min()), np.unique(family_R)
    if length < MIN_SHARED_TOKENS or len(family_R) < 2 * len(families):
        return None
    return SharedPrefix(length, tuple(_rows(np.flatnonzero(family_R == family)) for family in families))


def _rows(rows: np.ndarray) -> tuple[slice | Tensor, int]:
    first, last = int(rows[0]), int(rows[-1])
    return (slice(first, last + 1) if last + 1 - first == len(rows) else torch.from_numpy(rows)), first


def cached_layout(
    slots: range | list[int], starts_R: Tensor, num_queries: int, cache: KVCache, shared: SharedPrefix | None = None
) -> CachedLayout:
    """`num_queries` new tokens for each slot, after the `starts_R` tokens (int64, on the cache's device) it holds.

    A row may hold fewer real tokens than `num_queries`; what is written past them is seen by nothing and overwritten
    by the tokens that follow. Raises: ValueError when a row would pass the capacity.
    """
    first, last = (int(edge) for edge in starts_R.aminmax())
    num_keys = last + num_queries
    if num_keys > cache.capacity:
        raise ValueError(f"The cache holds {cache.capacity} tokens a slot, and this call needs {num_keys}.")
    device = starts_R.device
    positions_RQ = starts_R[:, None] + torch.arange(num_queries, device=device)
    slots_R = torch.tensor(list(slots), device=device)
    where = slice(slots.start, slots.stop) if isinstance(slots, range) else slots_R
    write_index_N = (slots_R[:, None] * cache.capacity + positions_RQ).flatten()
    bias_RQK = None
    if first < last or num_queries > 1:
        hidden_RQK = torch.arange(num_keys, device=device) > positions_RQ[..., None]
        bias_RQK = torch.zeros(hidden_RQK.shape, dtype=cache.dtype, device=device).masked_fill_(hidden_RQK, -math.inf)
    return CachedLayout(where, positions_RQ.flatten(), write_index_N, len(starts_R), num_keys, bias_RQK, shared)
