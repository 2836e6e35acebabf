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

TILE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
CHUNK_TOKENS = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class KeptBatch:
    """The sampling mask of N tokens: token n was drawn from `ids[offsets_N1[n] : offsets_N1[n + 1]]` (both int64)."""

    offsets_N1: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.offsets_N1) - 1


@dataclass(frozen=True)
class _Tile:
    """Some targets against some of the vocabulary. target_C: column of each row's target, -1 where it is elsewhere."""

    rows: slice
    columns: slice | Tensor
    target_C: Tensor
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
    kept set, as its sampler did. `chunk_tokens` bounds the targets handled at once; the default fits the device's cache.
    Raises: ValueError for temperature <= 0 (a greedy choice has no log-prob to train), for shapes that do not fit, and for
    a target outside its kept set or outside the vocabulary.
    """
    _check(hidden_ND, unembedding_VD, target_N, temperature, kept)
    if not len(target_N):
        return (hidden_ND.sum() * 0 + unembedding_VD[:1].sum() * 0) * hidden_ND.new_zeros(
            0, dtype=_precision(hidden_ND)
        )
    result: Tensor = _SelectedLogprobs.apply(
        hidden_ND, unembedding_VD, target_N.long(), math.log2(math.e) / temperature, kept, chunk_tokens
    )
    return result


class _SelectedLogprobs(torch.autograd.Function):
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
        precision = _precision(hidden_ND)
        scaled_ND, weight_VD = hidden_ND.to(precision) * scale, unembedding_VD.to(precision)
        maximum_N = scaled_ND.new_full(target_N.shape, -math.inf)
        total_N, chosen_N = torch.zeros_like(maximum_N), torch.zeros_like(maximum_N)
        buffer, logits_CU = _buffer(scaled_ND), scaled_ND
        tiles = list(_tiles(target_N, len(weight_VD), kept, chunk_tokens))
        for tile in tiles:
            logits_CU = _logits(tile, scaled_ND, weight_VD, buffer)
            at_target_C = logits_CU.gather(1, tile.target_C.clamp(min=0)[:, None])[:, 0]
            chosen_N[tile.rows] = torch.where(tile.target_C >= 0, at_target_C, chosen_N[tile.rows])
            highest_C = torch.maximum(maximum_N[tile.rows], logits_CU.amax(1))
            total_N[tile.rows] *= torch.exp2(maximum_N[tile.rows] - highest_C)
            total_N[tile.rows] += logits_CU.sub_(highest_C[:, None]).exp2_().sum(1)
            maximum_N[tile.rows] = highest_C
        log_total_N = total_N.log2_().add_(maximum_N)
        ctx.save_for_backward(hidden_ND, unembedding_VD, target_N, log_total_N)
        ctx.settings = (scale, kept, chunk_tokens)
        return chosen_N.sub_(log_total_N).mul_(math.log(2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, unembedding_VD, target_N, log_total_N = ctx.saved_tensors
        scale, kept, chunk_tokens = ctx.settings
        precision = _precision(hidden_ND)
        scaled_ND, weight_VD = hidden_ND.to(precision) * scale, unembedding_VD.to(precision)
        # d logprob / d logit = onehot - p, and a logit is hidden @ weight times scale * ln 2 = 1 / temperature.
        row_scale_N1 = (gradient_N * (-scale * math.log(2)))[:, None]
        weighted_ND = hidden_ND.to(precision) * row_scale_N1
        hidden_gradient_ND, weight_gradient_VD = torch.zeros_like(scaled_ND), torch.zeros_like(weight_VD)
        buffer = _buffer(scaled_ND)
        for tile in _tiles(target_N, len(weight_VD), kept, chunk_tokens):
            tile_weight_UD = weight_VD[tile.columns]
            p_CU = _logits(tile, scaled_ND, weight_VD, buffer).sub_(log_total_N[tile.rows, None]).exp2_()
            here_C = (tile.target_C >= 0).nonzero()[:, 0]
            p_CU[here_C, tile.target_C[here_C]] -= 1
            hidden_gradient_ND[tile.rows].addmm_(p_CU, tile_weight_UD)
            if isinstance(tile.columns, slice):
                weight_gradient_VD[tile.columns].addmm_(p_CU.T, weighted_ND[tile.rows])
            else:
                weight_gradient_VD.index_add_(0, tile.columns, p_CU.T @ weighted_ND[tile.rows])
        hidden_gradient_ND.mul_(row_scale_N1)
        return (
            hidden_gradient_ND.to(hidden_ND.dtype),
            weight_gradient_VD.to(unembedding_VD.dtype),
            None,
            None,
            None,
            None,
        )


def _logits(tile: _Tile, scaled_ND: Tensor, weight_VD: Tensor, buffer: Tensor) -> Tensor:
    """Base-2 logits [C, U] of one tile, written over `buffer` where it is large enough."""
    rows_CD, columns_UD = scaled_ND[tile.rows], weight_VD[tile.columns]
    size = len(rows_CD) * len(columns_UD)
    out_CU = buffer[:size].view(len(rows_CD), len(columns_UD)) if size <= len(buffer) else None
    logits_CU = torch.mm(rows_CD, columns_UD.T, out=out_CU)
    return logits_CU if tile.dropped_CU is None else logits_CU.masked_fill_(tile.dropped_CU, -math.inf)


def _buffer(like: Tensor) -> Tensor:
    return like.new_empty(TILE_ELEMENTS.get(like.device.type, TILE_ELEMENTS["cuda"]))


def _tiles(target_N: Tensor, num_vocabulary: int, kept: KeptBatch | None, chunk_tokens: int | None) -> Iterator[_Tile]:
    device = target_N.device.type
    elements = TILE_ELEMENTS.get(device, TILE_ELEMENTS["cuda"])
    if kept is not None:
        mean_kept = max(1, len(kept.ids) // len(kept))
        default = max(elements // num_vocabulary, math.isqrt(elements // mean_kept), 16)
        yield from _kept_tiles(target_N, num_vocabulary, kept, chunk_tokens or default)
        return
    chunk = min(len(target_N), chunk_tokens or CHUNK_TOKENS.get(device, CHUNK_TOKENS["cuda"]))
    width = max(elements // chunk, 1)
    for start in range(0, len(target_N), chunk):
        target_C = target_N[start : start + chunk]
        for first in range(0, num_vocabulary, width):
            local_C = target_C - first
            local_C = torch.where((local_C >= 0) & (local_C < width), local_C, -1)
            yield _Tile(slice(start, start + chunk), slice(first, first + width), local_C)


def _kept_tiles(target_N: Tensor, num_vocabulary: int, kept: KeptBatch, chunk: int) -> Iterator[_Tile]:
    """One tile a chunk of targets: its columns are the union of the chunk's kept sets, ascending."""
    offsets = kept.offsets_N1[::chunk].tolist() + ([] if (len(kept) % chunk) == 0 else [int(kept.offsets_N1[-1])])
    for index, start in enumerate(range(0, len(target_N), chunk)):
        rows = slice(start, min(start + chunk, len(target_N)))
        ids = kept.ids[offsets[index] : offsets[index + 1]]
        present_V = torch.zeros(num_vocabulary, dtype=torch.bool, device=ids.device)
        present_V[ids] = True
        column_V = present_V.cumsum(0) - 1
        counts_C = kept.offsets_N1[rows.start + 1 : rows.stop + 1] - kept.offsets_N1[rows]
        row_of_id = torch.repeat_interleave(torch.arange(len(counts_C), device=ids.device), counts_C)
        columns_U = present_V.nonzero()[:, 0]
        dropped_CU = torch.ones(len(counts_C), len(columns_U), dtype=torch.bool, device=ids.device)
        dropped_CU[row_of_id, column_V[ids]] = False
        target_C = column_V[target_N[rows]]
        yield _Tile(rows, columns_U, target_C, dropped_CU)


def _precision(hidden_ND: Tensor) -> torch.dtype:
    return torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32


def _check(
    hidden_ND: Tensor, unembedding_VD: Tensor, target_N: Tensor, temperature: float, kept: KeptBatch | None
) -> None:
    if not temperature > 0.0:
        raise ValueError(
            f"temperature = {temperature}: log-probs need a temperature above 0. Tokens that were chosen greedily have no "
            "probability to train on; sample them at a temperature above 0."
        )
    num_targets, num_vocabulary = len(target_N), len(unembedding_VD)
    if hidden_ND.shape != (num_targets, unembedding_VD.shape[1]):
        raise ValueError(
            f"hidden is {tuple(hidden_ND.shape)}; expected ({num_targets}, {unembedding_VD.shape[1]}) for {num_targets} "
            f"targets and an unembedding of {tuple(unembedding_VD.shape)}."
        )
    ids = target_N if kept is None else torch.cat((target_N, kept.ids))
    if len(ids) and not (0 <= int(ids.min()) and int(ids.max()) < num_vocabulary):
        raise ValueError(
            f"token ids span {int(ids.min())} to {int(ids.max())}, but the vocabulary has {num_vocabulary} entries."
        )
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
