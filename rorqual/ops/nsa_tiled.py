"""Native Sparse Attention in bounded memory: tiles of queries, in plain torch, on any device.

The same mathematics as `nsa.py`, without a [Q, K] tensor. Importance is taken in a second pass over the compressed
keys, without gradient, as in the paper's kernels; selection is attention over selected tokens, group by group, by the
operation that serves DSA.

Shapes: as in `nsa.py`; X queries of a tile, W keys that a tile's windows span.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.ops import dsa_tiled, nsa
from rorqual.ops.dsa_tiled import tiles
from rorqual.ops.nsa import BlockSizes, Branches

WINDOW_TILE = 128
"""Least queries in a tile of the window branch."""


def native_sparse_attention(
    q_RQHE: Tensor,
    branches: Branches,
    gates_RQH3: Tensor,
    position_RQ: Tensor,
    sizes: BlockSizes,
    scale: float,
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor] | None = None,
) -> Tensor:
    """`nsa.native_sparse_attention`: [R, Q, H, E]. attend: computes the selected branch instead of
    `selected_attention`."""
    attend = attend or selected_attention
    compressed = compressed_attention(q_RQHE, *branches[:2], position_RQ, sizes, scale)
    num_keys = branches.selected_k.shape[1]
    blocks_RQGS = choose_blocks(q_RQHE, branches.compressed_k, position_RQ, num_keys, sizes, scale)
    tokens_RQGP = nsa.block_tokens(blocks_RQGS, position_RQ, sizes)
    selected = attend(q_RQHE, *branches[2:4], tokens_RQGP, scale)
    window = window_attention(q_RQHE, *branches[4:], position_RQ, sizes.window, scale)
    of_compressed, of_selected, of_window = gates_RQH3.unsqueeze(3).unbind(dim=-1)
    return of_compressed * compressed + of_selected * selected + of_window * window


def compressed_attention(
    q_RQHE: Tensor, k_RBGE: Tensor, v_RBGE: Tensor, position_RQ: Tensor, sizes: BlockSizes, scale: float
) -> Tensor:
    """Over the compressed blocks that are complete: [R, Q, H, E], zero for queries before the end of the first."""
    if k_RBGE.shape[1] == 0:
        return torch.zeros_like(q_RQHE)
    parts = []
    for tile in tiles(q_RQHE.shape[1], len(q_RQHE) * k_RBGE.shape[1]):
        visible_RXB = nsa.compressed_visible(position_RQ[:, tile], k_RBGE.shape[1], sizes)
        none_RX = ~visible_RXB[..., 0]
        mask_RXB = visible_RXB | (none_RX[..., None] & (torch.arange(k_RBGE.shape[1], device=none_RX.device) == 0))
        out_RXHE = _masked_attention(q_RQHE[:, tile], k_RBGE, v_RBGE, mask_RXB, scale)
        parts.append(out_RXHE.masked_fill(none_RX[..., None, None], 0.0))
    return torch.cat(parts, dim=1)


@torch.no_grad()
def choose_blocks(
    q_RQHE: Tensor, k_RBGE: Tensor, position_RQ: Tensor, num_keys: int, sizes: BlockSizes, scale: float
) -> Tensor:
    """The blocks that each query's groups read: int64 [R, Q, G, S]."""
    num_rows, num_queries, num_heads, _ = q_RQHE.shape
    num_blocks, groups = -(-num_keys // sizes.selected_length), k_RBGE.shape[2]
    chosen = []
    for tile in tiles(num_queries, num_rows * num_heads * max(1, k_RBGE.shape[1])):
        q_RXHE, position_RX = q_RQHE[:, tile], position_RQ[:, tile]
        seen_RX1B = nsa.compressed_visible(position_RX, k_RBGE.shape[1], sizes).unsqueeze(2)
        weights_RXHB = nsa.attention_weights(q_RXHE, k_RBGE, seen_RX1B, scale)
        shared_RXGB = weights_RXHB.unflatten(2, (groups, -1)).sum(dim=3)
        chosen.append(nsa.select_blocks(nsa.importance(shared_RXGB, num_blocks, sizes), position_RX, sizes))
    return torch.cat(chosen, dim=1)


def selected_attention(q_RQHE: Tensor, k_RKGE: Tensor, v_RKGE: Tensor, tokens_RQGP: Tensor, scale: float) -> Tensor:
    """Over the tokens of the selected blocks, each group its own: [R, Q, H, E]."""
    groups = k_RKGE.shape[2]
    q_RQGJE, outputs = q_RQHE.unflatten(2, (groups, -1)), []
    for group in range(groups):
        k_RK1E, v_RK1E = k_RKGE[:, :, group : group + 1], v_RKGE[:, :, group : group + 1]
        tokens_RQP = tokens_RQGP[:, :, group]
        outputs.append(dsa_tiled.sparse_attention(q_RQGJE[:, :, group], k_RK1E, v_RK1E, tokens_RQP, scale))
    return torch.cat(outputs, dim=2)


def window_attention(
    q_RQHE: Tensor, k_RKGE: Tensor, v_RKGE: Tensor, position_RQ: Tensor, window: int, scale: float
) -> Tensor:
    """Over the `window` latest tokens, the query's own included: [R, Q, H, E]."""
    num_keys, device = k_RKGE.shape[1], q_RQHE.device
    rows_R1 = torch.arange(len(q_RQHE), device=device)[:, None]
    parts = []
    for start in range(0, q_RQHE.shape[1], max(window, WINDOW_TILE)):
        position_RX = position_RQ[:, start : start + max(window, WINDOW_TILE)]
        span = min(num_keys, position_RX.shape[1] + window - 1)
        first_R1 = (position_RX[:, :1] - window + 1).clamp(min=0, max=num_keys - span)
        place_RW = first_R1 + torch.arange(span, device=device)
        distance_RXW = position_RX[..., None] - place_RW[:, None]
        near_RXW = (distance_RXW >= 0) & (distance_RXW < window)
        k_RWGE, v_RWGE = k_RKGE[rows_R1, place_RW], v_RKGE[rows_R1, place_RW]
        parts.append(
            _masked_attention(q_RQHE[:, start : start + position_RX.shape[1]], k_RWGE, v_RWGE, near_RXW, scale)
        )
    return torch.cat(parts, dim=1)


def _masked_attention(q_RXHE: Tensor, k_RNGE: Tensor, v_RNGE: Tensor, mask_RXN: Tensor, scale: float) -> Tensor:
    """Dense attention under a mask that leaves every query something: [R, X, H, E]."""
    q_RHXE, k_RGNE, v_RGNE = (x.transpose(1, 2) for x in (q_RXHE, k_RNGE, v_RNGE))
    if q_RXHE.device.type != "cpu":  # There, shared keys under a mask would write all scores to memory.
        sharing = q_RHXE.shape[1] // k_RGNE.shape[1]
        k_RGNE, v_RGNE = (x.repeat_interleave(sharing, dim=1) for x in (k_RGNE, v_RGNE))
    gqa = q_RHXE.shape[1] != k_RGNE.shape[1]
    out_RHXE = F.scaled_dot_product_attention(
        q_RHXE, k_RGNE, v_RGNE, attn_mask=mask_RXN[:, None], scale=scale, enable_gqa=gqa
    )
    return out_RHXE.transpose(1, 2)
