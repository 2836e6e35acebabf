"""DeepSeek Sparse Attention as its report states it: index scores, selection, attention over it, the indexer's loss.

These are the twins: one line an equation, in any float dtype, differentiable by autograd, and wasteful of memory.
`dsa_tiled.py` computes the same in bounded memory, and is compared with this file, output by output and gradient by
gradient. DeepSeek-V3.2, arXiv 2512.02556, section 2.1.

Visible keys: each query sees the keys up to its last one, `last_RQ`, but for those that `key_valid_RK` switches off.

Shapes: R rows, Q queries a row, K keys a row, S selected keys, H heads, G key-value heads, J = H/G heads that share
keys, E head dimension, V value dimension, I index heads, C index dimension.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

FP8_MAX = 448.0
"""The largest number of float8 e4m3fn."""

FP8_LEAST_AMAX = 1e-4
"""Of a vector of zeros, so that its scale is a number."""


class IndexerOutput(NamedTuple):
    """What the indexer gives attention: queries [R, Q, I, C], keys [R, K, C], and the weights of its heads [R, Q, I],
    which bring every constant of the scores along."""

    q: Tensor
    k: Tensor
    weight: Tensor


def index_scores(q_RQIC: Tensor, k_RKC: Tensor, weight_RQI: Tensor) -> Tensor:
    """`I[t,s] = sum_j w[t,j] ReLU(q[t,j] . k[s])` (equation 1): [R, Q, K], in float32 or wider.

    The weights bring every constant along: num_heads^-0.5 and head_dim^-0.5.
    """
    dtype = torch.promote_types(q_RQIC.dtype, torch.float32)
    products_RQIK = torch.einsum("rqic,rkc->rqik", q_RQIC.to(dtype), k_RKC.to(dtype))
    return torch.einsum("rqik,rqi->rqk", products_RQIK.relu(), weight_RQI.to(dtype))


def visible_keys(last_RQ: Tensor, num_keys: int, key_valid_RK: Tensor | None = None) -> Tensor:
    """True where a query may look: [R, Q, K]."""
    causal_RQK = torch.arange(num_keys, device=last_RQ.device) <= last_RQ[..., None]
    return causal_RQK if key_valid_RK is None else causal_RQK & key_valid_RK[:, None]


def select(scores_RQK: Tensor, visible_RQK: Tensor, top_k: int) -> Tensor:
    """The `top_k` visible keys of highest score, in ascending order: int64 [R, Q, min(top_k, K)], -1 where there are
    fewer.

    Of equal scores the lower position is taken: sums of ReLUs are often exactly 0, and a selection that depends on the
    machine breaks replay. A NaN ranks below every number.
    Raises: ValueError for a `top_k` under 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k = {top_k}; at least one key must be selected.")
    num_keys = scores_RQK.shape[-1]
    chosen_RQK = visible_RQK.expand_as(scores_RQK)
    if num_keys > top_k:
        chosen_RQK = chosen_RQK & _highest(scores_RQK.detach(), chosen_RQK, top_k)
    width = min(top_k, num_keys)
    rank_RQK = (chosen_RQK.cumsum(dim=-1) - 1).masked_fill(~chosen_RQK, width)  # The others fall off the end.
    selected_RQS = torch.full((*scores_RQK.shape[:-1], width + 1), -1, device=scores_RQK.device)
    index_RQK = torch.arange(num_keys, device=scores_RQK.device).expand_as(scores_RQK)
    return selected_RQS.scatter_(-1, rank_RQK, index_RQK)[..., :width]


def _highest(scores_RQK: Tensor, visible_RQK: Tensor, top_k: int) -> Tensor:
    """True at exactly `top_k` keys a query: those above the k-th score, then the first of those that equal it."""
    lowest = torch.finfo(scores_RQK.dtype).min
    ranked_RQK = scores_RQK.nan_to_num(nan=lowest, neginf=lowest).masked_fill(~visible_RQK, -math.inf)
    kth_RQ1 = ranked_RQK.topk(top_k, dim=-1).values[..., -1:]
    above_RQK, equal_RQK = ranked_RQK > kth_RQ1, ranked_RQK == kth_RQ1
    room_RQ1 = top_k - above_RQK.sum(dim=-1, keepdim=True)
    return above_RQK | (equal_RQK & (equal_RQK.cumsum(dim=-1) <= room_RQ1))


def gather_keys(x_RKGE: Tensor, selected_RQS: Tensor) -> Tensor:
    """The selected keys of each query: [R, Q, S, G, E]; key 0 where there is none."""
    rows_R11 = torch.arange(len(x_RKGE), device=x_RKGE.device)[:, None, None]
    return x_RKGE[rows_R11, selected_RQS.clamp(min=0)]


def attention_weights(q_RQHE: Tensor, k_RKGE: Tensor, selected_RQS: Tensor, scale: float) -> Tensor:
    """Softmax over the selected keys: [R, Q, H, S], in float32 or wider; all zero for a query that has none."""
    q_RQGJE, dtype = q_RQHE.unflatten(2, (k_RKGE.shape[2], -1)), torch.promote_types(q_RQHE.dtype, torch.float32)
    scores_RQGJS = torch.einsum("rqgje,rqsge->rqgjs", q_RQGJE, gather_keys(k_RKGE, selected_RQS)).to(dtype) * scale
    absent_RQ11S = (selected_RQS < 0)[:, :, None, None]
    weights_RQGJS = scores_RQGJS.masked_fill(absent_RQ11S, -math.inf).softmax(dim=-1)
    return weights_RQGJS.masked_fill(absent_RQ11S, 0.0).flatten(2, 3)


def sparse_attention(q_RQHE: Tensor, k_RKGE: Tensor, v_RKGV: Tensor, selected_RQS: Tensor, scale: float) -> Tensor:
    """Attention of each query over its own selected keys, which all heads share (equation 2): [R, Q, H, V]."""
    weights_RQHS = attention_weights(q_RQHE, k_RKGE, selected_RQS, scale).to(v_RKGV.dtype)
    weights_RQGJS = weights_RQHS.unflatten(2, (k_RKGE.shape[2], -1))
    return torch.einsum("rqgjs,rqsgv->rqgjv", weights_RQGJS, gather_keys(v_RKGV, selected_RQS)).flatten(2, 3)


def indexer_kl(
    q_RQHE: Tensor, k_RKGE: Tensor, scale: float, scores_RQK: Tensor, selected_RQS: Tensor
) -> tuple[Tensor, Tensor]:
    """KL(p || softmax(I)) of every query over its selected keys, in nats, and what it is to be read against: that of an
    indexer that knows nothing, KL(p || uniform). Two [R, Q].

    p is the main attention summed over the heads and made to sum to 1, and is a constant (equations 3 and 4). The
    warm-up selects all visible keys. No gradient reaches the main attention.
    """
    target_RQS = attention_weights(q_RQHE.detach(), k_RKGE.detach(), selected_RQS, scale).mean(dim=2)
    absent_RQS = selected_RQS < 0
    picked_RQS = scores_RQK.gather(-1, selected_RQS.clamp(min=0)).masked_fill(absent_RQS, -math.inf)
    log_predicted_RQS = picked_RQS.log_softmax(dim=-1).masked_fill(absent_RQS, 0.0)
    entropy_RQ = -torch.special.xlogy(target_RQS, target_RQS).sum(dim=-1)
    count_RQ = (~absent_RQS).sum(dim=-1).clamp(min=1)
    cross_RQ = -(target_RQS * log_predicted_RQS).sum(dim=-1)
    return cross_RQ - entropy_RQ, count_RQ.to(entropy_RQ.dtype).log() - entropy_RQ


def hadamard(x: Tensor) -> Tensor:
    """The last dimension times the Walsh-Hadamard matrix over sqrt(its size). It is orthogonal: products of two
    vectors turned so are unchanged, and outliers are spread out before FP8.

    Raises: ValueError for a size that is no power of two.
    """
    size = x.shape[-1]
    if size & (size - 1) or size == 0:
        raise ValueError(f"A Hadamard transform needs a power of two; the index dimension is {size}.")
    turned, width = x, 1
    while width < size:
        pairs = turned.unflatten(-1, (-1, 2, width))
        turned = torch.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), -2).flatten(-3)
        width *= 2
    return turned * size**-0.5


def fp8_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """float8 e4m3 numbers and one ue8m0 scale (a power of two) for each vector: [..., C] and [...].

    scale = 2^ceil(log2(max(amax, 1e-4) / 448)); a number is rounded to nearest, ties to even. What DeepSeek's release
    keeps of an index key: 128 bytes and 4 of scale.
    """
    amax = x.detach().double().abs().amax(dim=-1).clamp(min=FP8_LEAST_AMAX)
    mantissa, exponent = torch.frexp(amax / FP8_MAX)
    scale = torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).int()).float()
    return (x.detach().float() / scale[..., None]).to(torch.float8_e4m3fn), scale


def fp8_round(x: Tensor) -> Tensor:
    """What is left of `x` after FP8 and back, in the dtype of `x`; the gradient passes straight through."""
    values, scale = fp8_quantize(x)
    rounded = (values.float() * scale[..., None]).to(x.dtype)
    return x + (rounded - x).detach()
