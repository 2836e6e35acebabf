"""Native Sparse Attention as its paper states it: compression, importance, selection of blocks, window, gates.

These are the twins: one line an equation, in any float dtype, differentiable by autograd, and wasteful of memory.
`nsa_tiled.py` computes the same in bounded memory, and is compared with this file, output by output and gradient by
gradient. arXiv 2502.11089, section 3.

A row's keys stand at positions 0, 1, 2, ...; a query at position t sees those up to t. Positions, blocks and tokens are
counted from 0 here, and from 1 in the paper.

Shapes: R rows, Q queries a row, K keys a row, H heads, G key-value heads, J = H/G heads that share keys, E head
dimension, B compressed blocks, N blocks to select from, S selected blocks, P tokens in them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rorqual.ops import dsa


class BlockSizes(NamedTuple):
    """In tokens: compressed blocks of `length` (l) begin every `stride` (d); selected ones are `selected_length` (l')
    long. num_selected (n) counts the `num_initial` first and `num_local` latest blocks, which are always taken.
    window (w) counts the query itself."""

    length: int
    stride: int
    selected_length: int
    num_selected: int
    num_initial: int
    num_local: int
    window: int


class Branches(NamedTuple):
    """Keys and values of the three branches, each with its own: compressed [R, B, G, E], the others [R, K, G, E]."""

    compressed_k: Tensor
    compressed_v: Tensor
    selected_k: Tensor
    selected_v: Tensor
    window_k: Tensor
    window_v: Tensor


def num_compressed(num_keys: int, sizes: BlockSizes) -> int:
    """Whole blocks among so many keys: the last token of block i is at position `i * stride + length - 1`."""
    return max(0, (num_keys - sizes.length) // sizes.stride + 1)


def windows(x_RKGE: Tensor, sizes: BlockSizes) -> Tensor:
    """The tokens of each compressed block, [R, B, length, G, E]; blocks overlap where length > stride (equation 7)."""
    if num_compressed(x_RKGE.shape[1], sizes) == 0:
        return x_RKGE.new_empty(len(x_RKGE), 0, sizes.length, *x_RKGE.shape[2:])
    return x_RKGE.unfold(1, sizes.length, sizes.stride).movedim(-1, 2)


def compressed_visible(position_RQ: Tensor, num_blocks: int, sizes: BlockSizes) -> Tensor:
    """True for blocks whose last token the query sees: [R, Q, B]."""
    last_B = torch.arange(num_blocks, device=position_RQ.device) * sizes.stride + sizes.length - 1
    return last_B <= position_RQ[..., None]


def attention_weights(q_RQHE: Tensor, k_RKGE: Tensor, visible_RQGK: Tensor, scale: float) -> Tensor:
    """Softmax over the visible keys of each head's group: [R, Q, H, K], in float32 or wider; all zero for a query that
    sees nothing."""
    q_RQGJE, dtype = q_RQHE.unflatten(2, (k_RKGE.shape[2], -1)), torch.promote_types(q_RQHE.dtype, torch.float32)
    scores_RQGJK = torch.einsum("rqgje,rkge->rqgjk", q_RQGJE, k_RKGE).to(dtype) * scale
    hidden_RQG1K = ~visible_RQGK.unsqueeze(3)
    weights_RQGJK = scores_RQGJK.masked_fill(hidden_RQG1K, -math.inf).softmax(dim=-1)
    return weights_RQGJK.masked_fill(hidden_RQG1K, 0.0).flatten(2, 3)


def mix(weights_RQHK: Tensor, v_RKGE: Tensor) -> Tensor:
    """Values under each head's weights: [R, Q, H, E]."""
    weights_RQGJK = weights_RQHK.to(v_RKGE.dtype).unflatten(2, (v_RKGE.shape[2], -1))
    return torch.einsum("rqgjk,rkge->rqgje", weights_RQGJK, v_RKGE).flatten(2, 3)


def importance(weights_RQGB: Tensor, num_blocks: int, sizes: BlockSizes) -> Tensor:
    """Of each block that may be selected, from the weights of the compressed ones (equation 9): [R, Q, G, N].

    `p_slc[j] = sum over m < l'/d, n < l/d of p_cmp[(l'/d)(j + 1) - 1 - m - n]`: each compressed block counts once for
    every stretch of `stride` tokens that it shares with block j. Blocks that do not exist count nothing.
    """
    per_selected, per_compressed = sizes.selected_length // sizes.stride, sizes.length // sizes.stride
    reach = per_selected + per_compressed - 2
    end = num_blocks * per_selected
    padded_RQGB = torch.nn.functional.pad(weights_RQGB, (reach, max(0, end - weights_RQGB.shape[-1])))
    total_RQGN = weights_RQGB.new_zeros(*weights_RQGB.shape[:-1], num_blocks)
    for m in range(per_selected):
        for n in range(per_compressed):
            start = reach + per_selected - 1 - m - n
            total_RQGN = total_RQGN + padded_RQGB[..., start : start + end : per_selected]
    return total_RQGN


def select_blocks(importance_RQGN: Tensor, position_RQ: Tensor, sizes: BlockSizes) -> Tensor:
    """The `num_selected` blocks that all heads of a group read, in ascending order: int64 [R, Q, G, S], -1 where there
    are fewer (section 3.3.2).

    The first `num_initial` blocks and the `num_local` latest, the query's own included, are always among them; the rest
    are those of highest importance, of equal ones the earlier. Nothing here is differentiated.
    """
    block_N = torch.arange(importance_RQGN.shape[-1], device=position_RQ.device)
    own_RQ1 = (position_RQ // sizes.selected_length)[..., None]
    visible_RQN = block_N <= own_RQ1
    forced_RQN = visible_RQN & ((block_N < sizes.num_initial) | (block_N > own_RQ1 - sizes.num_local))
    scores_RQGN = importance_RQGN.detach().masked_fill(forced_RQN.unsqueeze(2), math.inf)
    return dsa.select(scores_RQGN, visible_RQN.unsqueeze(2), sizes.num_selected)


def block_tokens(selected_RQGS: Tensor, position_RQ: Tensor, sizes: BlockSizes) -> Tensor:
    """Positions of the tokens in the selected blocks, -1 for those behind the query: int64 [R, Q, G, P]."""
    offset = torch.arange(sizes.selected_length, device=selected_RQGS.device)
    tokens_RQGSL = selected_RQGS[..., None] * sizes.selected_length + offset
    absent = (selected_RQGS[..., None] < 0) | (tokens_RQGSL > position_RQ[..., None, None, None])
    return tokens_RQGSL.masked_fill(absent, -1).flatten(-2)


def token_mask(tokens_RQGP: Tensor, num_keys: int) -> Tensor:
    """True at the given positions: [R, Q, G, K]."""
    mask_RQGK = torch.zeros(*tokens_RQGP.shape[:-1], num_keys + 1, dtype=torch.bool, device=tokens_RQGP.device)
    return mask_RQGK.scatter_(-1, tokens_RQGP.masked_fill(tokens_RQGP < 0, num_keys), True)[..., :num_keys]


def native_sparse_attention(
    q_RQHE: Tensor, branches: Branches, gates_RQH3: Tensor, position_RQ: Tensor, sizes: BlockSizes, scale: float
) -> Tensor:
    """`sum over c of g_c Attn(q, K_c, V_c)`, c = compression, selection, window (equation 5): [R, Q, H, E].

    position_RQ: of the queries among the row's keys, consecutive in a row.
    """
    num_keys, groups = branches.selected_k.shape[1:3]
    seen_RQ1B = compressed_visible(position_RQ, branches.compressed_k.shape[1], sizes).unsqueeze(2)
    weights_RQHB = attention_weights(q_RQHE, branches.compressed_k, seen_RQ1B, scale)
    shared_RQGB = weights_RQHB.unflatten(2, (groups, -1)).sum(dim=3)  # Equation 10.
    num_blocks = -(-num_keys // sizes.selected_length)
    blocks_RQGS = select_blocks(importance(shared_RQGB, num_blocks, sizes), position_RQ, sizes)
    chosen_RQGK = token_mask(block_tokens(blocks_RQGS, position_RQ, sizes), num_keys)
    distance_RQK = position_RQ[..., None] - torch.arange(num_keys, device=position_RQ.device)
    near_RQ1K = ((distance_RQK >= 0) & (distance_RQK < sizes.window)).unsqueeze(2)
    outputs = (
        mix(weights_RQHB, branches.compressed_v),
        mix(attention_weights(q_RQHE, branches.selected_k, chosen_RQGK, scale), branches.selected_v),
        mix(attention_weights(q_RQHE, branches.window_k, near_RQ1K, scale), branches.window_v),
    )
    return (torch.stack(outputs, dim=-1) * gates_RQH3.unsqueeze(3)).sum(dim=-1)
