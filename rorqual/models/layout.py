"""Which packed tokens attend to which.

A batch is one flat row of T tokens: projections, MLPs and experts never see padding. Attention alone needs to know
where sequences begin, and it reads that from a PackedLayout: a few blocks of rows, each row a run of queries with its
keys. A prompt that a group shares is packed once; each completion is a row whose keys are the prompt's tokens, then
its own.

Shapes: T packed tokens, R rows of a block, Q queries a row, K keys a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionBlock:
    """Rows of similar length. Query i of a row sees its keys up to index `K - Q + i` (causal, aligned at the end).

    query_index_RQ and key_index_RK point into the packed tokens. Padding points at token 0 and is switched off by
    `query_valid_RQ` and `key_valid_RK`; both are None where nothing is padded. Queries are padded at the end and keys
    in front of the queries' own (between a short prefix and the run), or at the end with the queries.
    """

    query_index_RQ: Tensor
    key_index_RK: Tensor
    query_valid_RQ: Tensor | None = None
    key_valid_RK: Tensor | None = None

    def last_key_RQ(self) -> Tensor:
        """The last key that each query sees."""
        num_rows, num_queries = self.query_index_RQ.shape
        num_keys = self.key_index_RK.shape[1]
        return torch.arange(num_keys - num_queries, num_keys, device=self.key_index_RK.device).expand(num_rows, -1)

    def mask_RQK(self) -> Tensor | None:
        """True where a query may look. None when plain causal masking of a square block says it all."""
        num_queries, num_keys = self.query_index_RQ.shape[1], self.key_index_RK.shape[1]
        if self.key_valid_RK is None and num_queries == num_keys:
            return None
        device = self.key_index_RK.device
        last_key_Q = torch.arange(num_queries, device=device) + (num_keys - num_queries)
        causal_QK = torch.arange(num_keys, device=device)[None, :] <= last_key_Q[:, None]
        return causal_QK[None] if self.key_valid_RK is None else causal_QK[None] & self.key_valid_RK[:, None, :]


@dataclass(frozen=True)
class PackedLayout:
    """positions_T: rotary position of each packed token. blocks: together they cover every token once as a query.

    gather_T: where each packed token's output stands in the blocks' outputs, laid flat one after another; None where
    they already are in packed order.
    """

    positions_T: Tensor
    blocks: tuple[AttentionBlock, ...]
    gather_T: Tensor | None = None

    @property
    def num_keys(self) -> int:
        """Of the longest row."""
        return max(block.key_index_RK.shape[1] for block in self.blocks)

    def in_packed_order(self, outputs_RQ: Sequence[Tensor]) -> Tensor:
        """What the blocks gave for their queries, [R, Q, ...] each, as [T, ...]."""
        flat = torch.cat([output.flatten(0, 1) for output in outputs_RQ])
        return flat if self.gather_T is None else flat.index_select(0, self.gather_T)


@dataclass(frozen=True)
class TokenRun:
    """`length` consecutive packed tokens from `start`, seen after the `prefix_length` tokens from `prefix_start`."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0


def layout_from_runs(
    runs: Sequence[TokenRun], device: torch.device | None = None, padding_limit: float = 1.25
) -> PackedLayout:
    """Group runs of like shape into blocks. A row's queries and its keys are each padded to at most `padding_limit`
    times their number plus 8.

    Raises: ValueError for an empty run or none at all.
    """
    if not runs or any(run.length < 1 for run in runs):
        raise ValueError("A packed batch needs at least one run, and every run at least one token.")
    by_start = sorted(runs, key=lambda run: run.start)
    positions_T = torch.cat([torch.arange(run.prefix_length, run.prefix_length + run.length) for run in by_start])
    blocks = tuple(_block(group, device) for group in _similar(runs, padding_limit))
    return PackedLayout(positions_T.to(device), blocks, _gather(blocks, len(positions_T)))


def causal_layout(lengths: Sequence[int], device: torch.device | None = None) -> PackedLayout:
    """Sequences of the given lengths, packed one after another, each seeing only itself."""
    runs, start = [], 0
    for length in lengths:
        runs.append(TokenRun(start, length))
        start += length
    return layout_from_runs(runs, device)


def _similar(runs: Sequence[TokenRun], padding_limit: float) -> list[list[TokenRun]]:
    """Runs with and without a prefix apart, each sorted by length and cut where padding would exceed the limit, then
    each part sorted and cut by prefix."""
    groups: list[list[TokenRun]] = []
    for run in sorted(runs, key=lambda run: (run.prefix_length > 0, run.length, run.prefix_length, run.start)):
        first = groups[-1][0] if groups else None
        fits = (
            first is not None
            and (first.prefix_length > 0) == (run.prefix_length > 0)
            and run.length <= first.length * padding_limit + 8
        )
        groups[-1].append(run) if fits else groups.append([run])
    return [part for group in groups for part in _cut_by_prefix(group, padding_limit)]


def _cut_by_prefix(group: list[TokenRun], padding_limit: float) -> list[list[TokenRun]]:
    """Parts of a group, sorted by length, whose longest row of keys is within the limit of what their shortest may
    be."""
    shortest, longest = group[0].length, group[-1].length
    parts: list[list[TokenRun]] = []
    for run in sorted(group, key=lambda run: run.prefix_length):
        most = (parts[-1][0].prefix_length + shortest) * padding_limit + 8 if parts else 0.0
        parts[-1].append(run) if run.prefix_length + longest <= most else parts.append([run])
    return parts


def _block(runs: Sequence[TokenRun], device: torch.device | None) -> AttentionBlock:
    num_queries = max(run.length for run in runs)
    num_prefix = max(run.prefix_length for run in runs)
    query_index, query_valid = _padded([(run.start, run.length) for run in runs], num_queries)
    prefix_index, prefix_valid = _padded([(run.prefix_start, run.prefix_length) for run in runs], num_prefix)
    key_index = torch.cat([prefix_index, query_index], dim=1).to(device)
    key_valid = torch.cat([prefix_valid, query_valid], dim=1)
    if bool(key_valid.all()):
        return AttentionBlock(query_index.to(device), key_index)
    return AttentionBlock(query_index.to(device), key_index, query_valid.to(device), key_valid.to(device))


def _gather(blocks: Sequence[AttentionBlock], num_tokens: int) -> Tensor | None:
    packed_index = torch.cat([block.query_index_RQ.flatten() for block in blocks])
    valid = torch.cat(
        [
            torch.ones_like(block.query_index_RQ, dtype=torch.bool).flatten()
            if block.query_valid_RQ is None
            else block.query_valid_RQ.flatten()
            for block in blocks
        ]
    )
    flat_index = torch.arange(len(packed_index), device=packed_index.device)
    gather_T = torch.empty(num_tokens, dtype=torch.int64, device=packed_index.device)
    gather_T[packed_index[valid]] = flat_index[valid]
    in_order = len(flat_index) == num_tokens and bool((gather_T == flat_index).all())
    return None if in_order else gather_T


def _padded(spans: Sequence[tuple[int, int]], width: int) -> tuple[Tensor, Tensor]:
    """(start, length) spans as a [R, width] index, 0 where padded, and its validity."""
    start_R, length_R = torch.tensor(spans).T
    offset_W = torch.arange(width)
    valid_RW = offset_W[None] < length_R[:, None]
    return torch.where(valid_RW, start_R[:, None] + offset_W[None], 0), valid_RW
