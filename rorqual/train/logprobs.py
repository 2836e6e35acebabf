"""Log-probs of chosen tokens without the [N, V] matrix of logits.

The vocabulary is walked in tiles that stay in cache, with a running maximum and sum as in online softmax (Milakov and
Gimelshein, arXiv 1805.02867). Backward computes each tile again, so memory grows with N + V, never with N times V.
With kept-token sets the softmax runs over each token's own set: a chunk of tokens meets only the union of its sets.
Logits are held in base 2 (hidden scaled by log2(e) / temperature), because exp2 is several times faster than exp.

Shapes: N targets, D hidden size, V vocabulary, C targets of a chunk, U vocabulary entries of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Logits of one tile: a few MB stay in a processor's cache, a GPU needs larger products to be busy."""

WHOLE_TILES = 4
"""A problem of at most so many tiles is done as one, whose probabilities are kept for backward."""

CHUNK_TOKENS = 1024
"""Targets handled at once. More would narrow the tiles; fewer would read the unembedding more often."""


@dataclass(frozen=True)
class KeptBatch:
    """The sampling mask of N tokens: token n was drawn from `ids[offsets_N1[n] : offsets_N1[n + 1]]` (both int64)."""

    offsets_N1: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.offsets_N1) - 1


@dataclass(frozen=True)
class _Tile:
    """Some targets against some of the vocabulary. hit_rows, hit_columns: where in the tile a row meets its target."""

    rows: slice
    columns: slice | Tensor
    hit_rows: Tensor
    hit_columns: Tensor
    dropped_CU: Tensor | None = None


def selected_logprobs(
    hidden_ND: Tensor,
    unembedding_VD: Tensor,
    target_N: Tensor,
    *,
    temperature: float = 1.0,
    kept: KeptBatch | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """log softmax(hidden @ unembedding.T / temperature) at the targets: [N] in nats, float32 (float64 stays float64).

    Both gradients are exact and need no more memory than the inputs and one tile. `kept` renormalises over each token's
    kept set, as its sampler did. `chunk_tokens` bounds the targets handled at once.
    Raises: ValueError for temperature <= 0 (a greedy choice has no log-prob to train), for shapes that do not fit, and
    for a target outside its kept set or outside the vocabulary.
    """
    _check(hidden_ND, unembedding_VD, target_N, temperature, kept)
    if not len(target_N):
        # An empty share of a batch still reaches both inputs, so that every rank of a parallel run joins its backward.
        nothing = (hidden_ND.sum() + unembedding_VD[:1].sum()) * 0
        return nothing.to(_precision(hidden_ND)) * hidden_ND.new_zeros(0, dtype=_precision(hidden_ND))
    scale = math.log2(math.e) / temperature
    result: Tensor = _SelectedLogprobs.apply(hidden_ND, unembedding_VD, target_N, scale, kept, chunk_tokens)
    return result


class _SelectedLogprobs(torch.autograd.Function):
    """d logprob / d logit = onehot - p. A lone tile keeps its p for backward; several compute theirs again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        unembedding_VD: Tensor,
        target_N: Tensor,
        scale: float,
        kept: KeptBatch | None,
        chunk_tokens: int | None,
    ) -> Tensor:
        scaled_ND, weight_VD = hidden_ND.to(_precision(hidden_ND)) * scale, unembedding_VD.to(_precision(hidden_ND))
        highest_N = scaled_ND.new_full(target_N.shape, -math.inf)
        total_N, chosen_N = torch.zeros_like(highest_N), torch.zeros_like(highest_N)
        buffer, logits_CU, num_tiles = _buffer(scaled_ND), scaled_ND, 0
        for tile in _tiles(target_N, len(weight_VD), kept, chunk_tokens):
            num_tiles += 1
            logits_CU = _logits(tile, scaled_ND, weight_VD, buffer)
            _accumulate(logits_CU, tile, highest_N[tile.rows], total_N[tile.rows], chosen_N[tile.rows])
        log_total_N = total_N.log2().add_(highest_N)
        ctx.only_p_CU = None
        if num_tiles == 1 and any(ctx.needs_input_grad):
            ctx.only_p_CU = logits_CU.div_(total_N[:, None])
        ctx.save_for_backward(hidden_ND, unembedding_VD, target_N, log_total_N)
        ctx.settings = (scale, kept, chunk_tokens)
        return chosen_N.sub_(log_total_N).mul_(math.log(2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, unembedding_VD, target_N, log_total_N = ctx.saved_tensors
        scale, kept, chunk_tokens = ctx.settings
        scaled_ND, weight_VD = hidden_ND.to(log_total_N.dtype) * scale, unembedding_VD.to(log_total_N.dtype)
        row_scale_N1 = (gradient_N * (-scale * math.log(2)))[:, None]
        weighted_ND = hidden_ND * row_scale_N1
        hidden_gradient_ND, weight_gradient_VD = torch.zeros_like(scaled_ND), torch.zeros_like(weight_VD)
        buffer = _buffer(scaled_ND)
        for tile in _tiles(target_N, len(weight_VD), kept, chunk_tokens):
            p_CU = ctx.only_p_CU
            if p_CU is None:
                p_CU = _logits(tile, scaled_ND, weight_VD, buffer).sub_(log_total_N[tile.rows, None]).exp2_()
            hits = (tile.hit_rows, tile.hit_columns)
            p_of_targets = p_CU[hits]
            p_CU[hits] = p_of_targets - 1
            hidden_gradient_ND[tile.rows].addmm_(p_CU, weight_VD[tile.columns])
            if isinstance(tile.columns, slice):
                weight_gradient_VD[tile.columns].addmm_(p_CU.T, weighted_ND[tile.rows])
            else:
                weight_gradient_VD.index_add_(0, tile.columns, p_CU.T @ weighted_ND[tile.rows])
            p_CU[hits] = p_of_targets
        hidden_gradient_ND.mul_(row_scale_N1)
        return hidden_gradient_ND.to(hidden_ND.dtype), weight_gradient_VD.to(unembedding_VD.dtype), *[None] * 4


def _accumulate(logits_CU: Tensor, tile: _Tile, highest_C: Tensor, total_C: Tensor, chosen_C: Tensor) -> None:
    """Fold a tile into its rows' running maximum, sum and target logit; `logits_CU` becomes exp2(logit - maximum)."""
    chosen_C[tile.hit_rows] = logits_CU[tile.hit_rows, tile.hit_columns]
    before_C = highest_C.clone()
    torch.maximum(before_C, logits_CU.amax(1), out=highest_C)
    total_C.mul_(before_C.sub_(highest_C).exp2_()).add_(logits_CU.sub_(highest_C[:, None]).exp2_().sum(1))


def _logits(tile: _Tile, scaled_ND: Tensor, weight_VD: Tensor, buffer: Tensor) -> Tensor:
    """Base-2 logits [C, U] of one tile, written over `buffer` unless it is too small."""
    rows_CD, columns_UD = scaled_ND[tile.rows], weight_VD[tile.columns]
    size = len(rows_CD) * len(columns_UD)
    out_CU = buffer[:size].view(len(rows_CD), len(columns_UD)) if size <= len(buffer) else None
    logits_CU = torch.mm(rows_CD, columns_UD.T, out=out_CU)
    return logits_CU if tile.dropped_CU is None else logits_CU.masked_fill_(tile.dropped_CU, -math.inf)


def _buffer(like: Tensor) -> Tensor:
    return like.new_empty(_tile_elements(like))


def _tile_elements(like: Tensor) -> int:
    return TILE_ELEMENTS["cpu" if like.device.type == "cpu" else "cuda"]


def _tiles(target_N: Tensor, num_vocabulary: int, kept: KeptBatch | None, chunk_tokens: int | None) -> Iterator[_Tile]:
    elements = _tile_elements(target_N)
    if kept is None:
        if chunk_tokens is None and len(target_N) * num_vocabulary <= WHOLE_TILES * elements:
            all_rows_N = torch.arange(len(target_N), device=target_N.device)
            return iter([_Tile(slice(None), slice(None), all_rows_N, target_N)])
        chunk = min(len(target_N), chunk_tokens or CHUNK_TOKENS)
        return _vocabulary_tiles(target_N, num_vocabulary, chunk, width=max(elements // chunk, 1))
    mean_kept = max(1, len(kept.ids) // len(kept))
    return _kept_tiles(target_N, num_vocabulary, kept, chunk_tokens or max(math.isqrt(elements // mean_kept), 16))


def _vocabulary_tiles(target_N: Tensor, num_vocabulary: int, chunk: int, width: int) -> Iterator[_Tile]:
    for start in range(0, len(target_N), chunk):
        target_C = target_N[start : start + chunk]
        order_C = target_C.argsort(stable=True)
        firsts = range(0, num_vocabulary, width)
        bounds = torch.tensor([*firsts, num_vocabulary], device=target_C.device)
        edges = torch.searchsorted(target_C[order_C], bounds).tolist()
        for index, first in enumerate(firsts):
            hit_rows = order_C[edges[index] : edges[index + 1]]
            columns = slice(first, first + width)
            yield _Tile(slice(start, start + chunk), columns, hit_rows, target_C[hit_rows] - first)


def _kept_tiles(target_N: Tensor, num_vocabulary: int, kept: KeptBatch, chunk: int) -> Iterator[_Tile]:
    """One tile a chunk of targets: its columns are the union of the chunk's kept sets, ascending."""
    sizes_N = kept.offsets_N1.diff()
    starts = range(0, len(target_N), chunk)
    edges = kept.offsets_N1[[*starts, len(target_N)]].tolist()
    for start, first, last in zip(starts, edges, edges[1:], strict=False):
        ids, sizes_C = kept.ids[first:last], sizes_N[start : start + chunk]
        all_rows_C = torch.arange(len(sizes_C), device=ids.device)
        present_V = torch.zeros(num_vocabulary, dtype=torch.bool, device=ids.device)
        present_V[ids] = True
        column_V = present_V.cumsum(0) - 1
        columns_U = present_V.nonzero()[:, 0]
        dropped_CU = torch.ones(len(sizes_C), len(columns_U), dtype=torch.bool, device=ids.device)
        dropped_CU[torch.repeat_interleave(all_rows_C, sizes_C), column_V[ids]] = False
        rows = slice(start, start + chunk)
        yield _Tile(rows, columns_U, all_rows_C, column_V[target_N[rows]], dropped_CU)


def _precision(hidden_ND: Tensor) -> torch.dtype:
    return torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32


def _check(
    hidden_ND: Tensor, unembedding_VD: Tensor, target_N: Tensor, temperature: float, kept: KeptBatch | None
) -> None:
    if not temperature > 0.0:
        raise ValueError(
            f"temperature = {temperature}: log-probs need a temperature above 0. Tokens that were chosen greedily "
            "have no probability to train on; sample them at a temperature above 0."
        )
    num_targets, num_vocabulary = len(target_N), len(unembedding_VD)
    if hidden_ND.shape != (num_targets, unembedding_VD.shape[1]):
        raise ValueError(
            f"hidden is {tuple(hidden_ND.shape)}; expected ({num_targets}, {unembedding_VD.shape[1]}) for "
            f"{num_targets} targets and an unembedding of {tuple(unembedding_VD.shape)}."
        )
    ids = target_N if kept is None else torch.cat((target_N, kept.ids))
    lowest, highest = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
    if lowest < 0 or highest >= num_vocabulary:
        raise ValueError(f"token ids span {lowest} to {highest}, but the vocabulary has {num_vocabulary} entries.")
    if kept is not None:
        _check_kept(target_N, kept)


def _check_kept(target_N: Tensor, kept: KeptBatch) -> None:
    if len(kept) != len(target_N) or int(kept.offsets_N1[-1]) != len(kept.ids):
        raise ValueError(
            f"{len(kept)} kept sets end at id {int(kept.offsets_N1[-1])} of {len(kept.ids)}; expected {len(target_N)} "
            "sets, one a target, that use every id."
        )
    row_of_id = torch.repeat_interleave(torch.arange(len(kept), device=target_N.device), kept.offsets_N1.diff())
    found_N = torch.zeros(len(kept), dtype=torch.bool, device=target_N.device)
    found_N[row_of_id[kept.ids == target_N[row_of_id]]] = True
    if not bool(found_N.all()):
        worst = int((~found_N).nonzero()[0])
        raise ValueError(
            f"target {worst} (token {int(target_N[worst])}) is not in its own kept set, so it has no log-prob."
        )
