"""DeepSeek Sparse Attention in bounded memory: tiles of queries, in plain torch, on any device.

The same mathematics as `dsa.py`, without a [Q, K] tensor: a tile of scores is made, used and dropped. Backward computes
the tiles of attention anew. The indexer's loss is linear in the weights of its queries, which are given, so that its
gradient is taken in the same sweep as its value, and no tile is computed twice.

Shapes: as in `dsa.py`; X queries of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rorqual.ops import dsa

TILE_ELEMENTS = 1 << 20
"""Most scores of one head in a tile: 4 MB in float32, near the size of a core's cache."""


def tiles(num_queries: int, elements_per_query: int) -> Iterator[slice]:
    """Runs of queries of which each brings so many numbers."""
    width = max(1, TILE_ELEMENTS // max(1, elements_per_query))
    for start in range(0, num_queries, width):
        yield slice(start, min(start + width, num_queries))


def select_keys(index: dsa.IndexerOutput, last_RQ: Tensor, key_valid_RK: Tensor | None, top_k: int) -> Tensor:
    """`dsa.select` of `dsa.index_scores`: int64 [R, Q, min(top_k, K)]. Nothing here is differentiated."""
    num_rows, num_keys = index.k.shape[:2]
    if num_keys <= top_k:
        return select_all(last_RQ, num_keys, key_valid_RK)
    selected_RQS = torch.full((*last_RQ.shape, top_k), -1, device=last_RQ.device)
    with torch.no_grad():
        for tile in tiles(last_RQ.shape[1], num_rows * num_keys):
            seen = int(last_RQ[:, tile].max()) + 1  # No query of the tile looks further.
            scores_RXK = _tile_scores(index.q[:, tile], index.k[:, :seen], index.weight[:, tile])
            found_RXS = dsa.select(scores_RXK, _visible(last_RQ, tile, seen, key_valid_RK), top_k)
            selected_RQS[:, tile, : found_RXS.shape[-1]] = found_RXS
    return selected_RQS


def select_all(last_RQ: Tensor, num_keys: int, key_valid_RK: Tensor | None) -> Tensor:
    """Every visible key, without a score: int64 [R, Q, K]."""
    visible_RQK = dsa.visible_keys(last_RQ, num_keys, key_valid_RK)
    return dsa.select(visible_RQK.float(), visible_RQK, num_keys)


def _tile_scores(q_RXIC: Tensor, k_RKC: Tensor, weight_RXI: Tensor) -> Tensor:
    """Index scores head by head, so that no product of all heads is held."""
    dtype = torch.promote_types(q_RXIC.dtype, torch.float32)
    keys_RCK, weight_RXI = k_RKC.to(dtype).transpose(1, 2), weight_RXI.to(dtype)
    scores_RXK = q_RXIC.new_zeros(*q_RXIC.shape[:2], k_RKC.shape[1], dtype=dtype)
    for head in range(q_RXIC.shape[2]):
        products_RXK = torch.bmm(q_RXIC[:, :, head].to(dtype), keys_RCK).relu_()
        scores_RXK.addcmul_(products_RXK, weight_RXI[:, :, head, None])
    return scores_RXK


def _visible(last_RQ: Tensor, tile: slice, seen: int, key_valid_RK: Tensor | None) -> Tensor:
    return dsa.visible_keys(last_RQ[:, tile], seen, None if key_valid_RK is None else key_valid_RK[:, :seen])


def sparse_attention(q_RQHE: Tensor, k_RKGE: Tensor, v_RKGV: Tensor, selected_RQS: Tensor, scale: float) -> Tensor:
    """`dsa.sparse_attention`: [R, Q, H, V]."""
    out: Tensor = _SparseAttention.apply(q_RQHE, k_RKGE, v_RKGV, selected_RQS, scale)
    return out


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_RQHE: Tensor, k_RKGE: Tensor, v_RKGV: Tensor, selected_RQS: Tensor, scale: float) -> Tensor:
        out_RQHV = q_RQHE.new_empty(*q_RQHE.shape[:3], v_RKGV.shape[-1])
        for tile in _attention_tiles(q_RQHE, k_RKGE, v_RKGV, selected_RQS):
            picked_RXS = selected_RQS[:, tile]
            out_RQHV[:, tile] = dsa.sparse_attention(q_RQHE[:, tile], k_RKGE, v_RKGV, picked_RXS, scale)
        ctx.save_for_backward(q_RQHE, k_RKGE, v_RKGV, selected_RQS)
        ctx.scale = scale
        return out_RQHV

    @staticmethod
    def backward(ctx: Any, grad_RQHV: Tensor) -> tuple[Tensor | None, ...]:
        q_RQHE, k_RKGE, v_RKGV, selected_RQS = ctx.saved_tensors
        grad_q_RQHE = torch.empty_like(q_RQHE)
        dtype = torch.promote_types(k_RKGE.dtype, torch.float32)
        grad_k, grad_v = torch.zeros_like(k_RKGE, dtype=dtype), torch.zeros_like(v_RKGV, dtype=dtype)
        for tile in _attention_tiles(q_RQHE, k_RKGE, v_RKGV, selected_RQS):
            picked_RXS = selected_RQS[:, tile]
            of_q, of_keys, of_values = _tile_gradients(
                q_RQHE[:, tile], k_RKGE, v_RKGV, picked_RXS, grad_RQHV[:, tile], ctx.scale
            )
            grad_q_RQHE[:, tile] = of_q
            _add_to_keys(grad_k, of_keys, picked_RXS)
            _add_to_keys(grad_v, of_values, picked_RXS)
        return grad_q_RQHE, grad_k.to(k_RKGE.dtype), grad_v.to(v_RKGV.dtype), None, None


def _attention_tiles(q_RQHE: Tensor, k_RKGE: Tensor, v_RKGV: Tensor, selected_RQS: Tensor) -> Iterator[slice]:
    width = max(k_RKGE.shape[2] * (k_RKGE.shape[3] + v_RKGV.shape[3]), q_RQHE.shape[2])
    return tiles(q_RQHE.shape[1], len(q_RQHE) * selected_RQS.shape[-1] * width)


def _tile_gradients(
    q_RXHE: Tensor, k_RKGE: Tensor, v_RKGV: Tensor, selected_RXS: Tensor, grad_RXHV: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the queries [R, X, H, E], and of the keys and values that each one picked, [R, X, S, G, E] and [..., V]."""
    groups = k_RKGE.shape[2]
    keys_RXSGE, values_RXSGV = dsa.gather_keys(k_RKGE, selected_RXS), dsa.gather_keys(v_RKGV, selected_RXS)
    weights_RXGJS = dsa.attention_weights(q_RXHE, k_RKGE, selected_RXS, scale).unflatten(2, (groups, -1))
    q_RXGJE, grad_RXGJV = q_RXHE.unflatten(2, (groups, -1)), grad_RXHV.unflatten(2, (groups, -1))
    toward_RXGJS = torch.einsum("rxgjv,rxsgv->rxgjs", grad_RXGJV, values_RXSGV).to(weights_RXGJS.dtype)
    centred_RXGJS = toward_RXGJS - (toward_RXGJS * weights_RXGJS).sum(dim=-1, keepdim=True)
    grad_scores_RXGJS = (weights_RXGJS * centred_RXGJS * scale).to(q_RXHE.dtype)
    weights_RXGJS = weights_RXGJS.to(v_RKGV.dtype)
    of_q_RXGJE = torch.einsum("rxgjs,rxsge->rxgje", grad_scores_RXGJS, keys_RXSGE)
    of_keys_RXSGE = torch.einsum("rxgjs,rxgje->rxsge", grad_scores_RXGJS, q_RXGJE)
    return of_q_RXGJE.flatten(2, 3), of_keys_RXSGE, torch.einsum("rxgjs,rxgjv->rxsgv", weights_RXGJS, grad_RXGJV)


def _add_to_keys(total_RKGE: Tensor, parts_RXSGE: Tensor, selected_RXS: Tensor) -> None:
    """Absent keys carry a weight of 0 and point at key 0, where they add nothing."""
    num_rows, num_keys = total_RKGE.shape[:2]
    row_R11 = torch.arange(num_rows, device=total_RKGE.device)[:, None, None] * num_keys
    place = (selected_RXS.clamp(min=0) + row_R11).flatten()
    flat = total_RKGE.view(num_rows * num_keys, -1)
    flat.index_add_(0, place, parts_RXSGE.to(total_RKGE.dtype).reshape(len(place), -1))


class MainAttention(NamedTuple):
    """What the indexer learns from: queries [R, Q, H, E] and keys [R, K, G, E] of the main attention, its scale, and
    which keys a query sees."""

    q: Tensor
    k: Tensor
    scale: float
    last_RQ: Tensor
    key_valid_RK: Tensor | None = None


def indexer_kl(
    main: MainAttention, index: dsa.IndexerOutput, row_weight_RQ: Tensor, selected_RQS: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`dsa.indexer_kl` weighted by query and summed: the loss; and, of each query, KL and KL to uniform [R, Q].

    selected_RQS: the keys that count; None takes all that are visible, as the warm-up must, because an indexer that is
    only asked about its own choice learns to confirm it. Gradients reach the three tensors of `index`, nothing else.
    """
    constants = main._replace(q=main.q.detach(), k=main.k.detach())
    loss, kl_RQ, uniform_RQ = _IndexerKL.apply(*index, _Problem(constants, row_weight_RQ, selected_RQS))
    return loss, kl_RQ, uniform_RQ


@torch.no_grad()
def attention_recall(main: MainAttention, index: dsa.IndexerOutput, top_k: int) -> Tensor:
    """How much of the main attention, averaged over its heads, lies on the keys that would be selected: [R, Q].

    1 where all visible keys are. What a query would lose of its attention, had it not learned to do with the rest.
    """
    everything = _Problem(main, torch.empty(0), None)
    dtype = torch.promote_types(main.q.dtype, torch.float32)
    recall_RQ = torch.zeros(main.last_RQ.shape, dtype=dtype, device=main.q.device)
    for tile in everything.tiles(index.q.shape[2]):
        seen = int(main.last_RQ[:, tile].max()) + 1
        target_RXK, visible_RXK = everything.target(tile, seen)
        scores_RXK = everything.scores(tile, index.q[:, tile], index.k[:, :seen], index.weight[:, tile])
        selected_RXS = dsa.select(scores_RXK, visible_RXK, top_k)
        share_RXS = target_RXK.gather(-1, selected_RXS.clamp(min=0)).masked_fill(selected_RXS < 0, 0.0)
        recall_RQ[:, tile] = share_RXS.sum(dim=-1)
    return recall_RQ


class _Problem(NamedTuple):
    """The constants of the indexer's loss."""

    main: MainAttention
    row_weight_RQ: Tensor
    selected_RQS: Tensor | None

    def tiles(self, index_heads: int) -> Iterator[slice]:
        (num_rows, num_queries, num_heads, _), (_, num_keys, groups, width) = self.main.q.shape, self.main.k.shape
        if self.selected_RQS is None:
            return tiles(num_queries, num_rows * num_keys)
        return tiles(num_queries, num_rows * self.selected_RQS.shape[-1] * max(groups * width, num_heads, index_heads))

    def target(self, tile: slice, seen: int) -> tuple[Tensor, Tensor]:
        """The main attention's share of each key, [R, X, N], and whether the key takes part."""
        main, q_RXHE, k_RKGE = self.main, self.main.q[:, tile], self.main.k[:, :seen]
        if self.selected_RQS is not None:
            picked_RXS = self.selected_RQS[:, tile]
            return dsa.attention_weights(q_RXHE, k_RKGE, picked_RXS, main.scale).mean(dim=2), picked_RXS >= 0
        visible_RXK = _visible(main.last_RQ, tile, seen, main.key_valid_RK)
        num_heads, heads_per_key = q_RXHE.shape[2], q_RXHE.shape[2] // k_RKGE.shape[2]
        dtype = torch.promote_types(q_RXHE.dtype, torch.float32)
        total_RXK = q_RXHE.new_zeros(*q_RXHE.shape[:2], seen, dtype=dtype)
        for head in range(num_heads):
            keys_REK = k_RKGE[:, :, head // heads_per_key].transpose(1, 2)
            scores_RXK = torch.bmm(q_RXHE[:, :, head], keys_REK).to(dtype).mul_(main.scale)
            total_RXK += scores_RXK.masked_fill_(~visible_RXK, -math.inf).softmax(dim=-1)
        return total_RXK.masked_fill_(~visible_RXK, 0.0).div_(num_heads), visible_RXK

    def scores(self, tile: slice, q_RXIC: Tensor, k_RKC: Tensor, weight_RXI: Tensor) -> Tensor:
        """Index scores of the same keys, differentiable: [R, X, N]."""
        if self.selected_RQS is None:
            return _tile_scores(q_RXIC, k_RKC, weight_RXI)
        picked_RXS = self.selected_RQS[:, tile]
        keys_RXSC = dsa.gather_keys(k_RKC.unsqueeze(2), picked_RXS).squeeze(3)
        num_rows, num_queries, num_selected, _ = keys_RXSC.shape
        flat = (q_RXIC.flatten(0, 1)[:, None], keys_RXSC.flatten(0, 1), weight_RXI.flatten(0, 1)[:, None])
        return dsa.index_scores(*flat).view(num_rows, num_queries, num_selected)


class _IndexerKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_RQIC: Tensor, k_RKC: Tensor, weight_RQI: Tensor, problem: _Problem
    ) -> tuple[Tensor, Tensor, Tensor]:
        learns = any(ctx.needs_input_grad[:3])
        grad_q, grad_k, grad_weight = (torch.zeros_like(x) for x in (q_RQIC, k_RKC, weight_RQI))
        dtype = torch.promote_types(q_RQIC.dtype, torch.float32)
        kl_RQ, uniform_RQ = (torch.zeros_like(problem.row_weight_RQ, dtype=dtype) for _ in range(2))
        for tile in problem.tiles(q_RQIC.shape[2]):
            seen = int(problem.main.last_RQ[:, tile].max()) + 1
            target_RXN, present_RXN = problem.target(tile, seen)
            with torch.set_grad_enabled(learns):
                leaves = [
                    x.detach().requires_grad_(learns) for x in (q_RQIC[:, tile], k_RKC[:, :seen], weight_RQI[:, tile])
                ]
                scores_RXN = problem.scores(tile, *leaves).masked_fill(~present_RXN, -math.inf)
                log_predicted_RXN = scores_RXN.log_softmax(dim=-1).masked_fill(~present_RXN, 0.0)
                cross_RX = -(target_RXN * log_predicted_RXN).sum(dim=-1)
                loss = (cross_RX * problem.row_weight_RQ[:, tile]).sum()
            if learns:
                of_q, of_k, of_weight = torch.autograd.grad(loss, leaves)
                grad_q[:, tile], grad_weight[:, tile] = of_q, of_weight
                grad_k[:, :seen] += of_k
            entropy_RX = -torch.special.xlogy(target_RXN, target_RXN).sum(dim=-1)
            kl_RQ[:, tile] = cross_RX.detach() - entropy_RX
            uniform_RQ[:, tile] = present_RXN.sum(dim=-1).clamp(min=1).to(dtype).log() - entropy_RX
        ctx.save_for_backward(grad_q, grad_k, grad_weight)
        ctx.mark_non_differentiable(kl_RQ, uniform_RQ)
        return (kl_RQ * problem.row_weight_RQ).sum(), kl_RQ, uniform_RQ

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        return *(gradient * grad_loss for gradient in ctx.saved_tensors), None
