"""The indexer's loss in Triton, and how much of the main attention a selection finds.

The loss is linear in the weights of its queries, which are given, so that its gradient is taken in the same sweep as
its value, and no tile is computed twice for it. The warm-up, over all visible keys: `dsa_kl_visible.py`; the
sparse stage, over selected ones: `dsa_kl_selected.py`.

Shapes: as in `dsa.py`; X queries of a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rorqual.ops.dsa import IndexerOutput
from rorqual.ops.dsa_tiled import MainAttention
from rorqual.ops.gpu.dsa_kl_selected import selected_kl, selected_target
from rorqual.ops.gpu.dsa_kl_visible import visible_kl, visible_lse
from rorqual.ops.gpu.dsa_score import chunks, empty_gradients, of_one_dtype, readable
from rorqual.ops.gpu.dsa_select import select_keys


def indexer_kl(
    main: MainAttention, index: IndexerOutput, row_weight_RQ: Tensor, selected_RQS: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`dsa.indexer_kl` weighted by query and summed: the loss; and, of each query, KL and KL to uniform [R, Q].

    selected_RQS: the keys that count; None takes all that are visible, as the warm-up must. Gradients reach the three
    tensors of `index`, nothing else.
    Raises: ValueError for float64.
    """
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in index)
    problem = _Problem(_readable(main), row_weight_RQ.detach(), selected_RQS, learns)
    loss, kl_RQ, uniform_RQ = _IndexerKL.apply(*index, problem)
    return loss, kl_RQ, uniform_RQ


@torch.no_grad()
def attention_recall(main: MainAttention, index: IndexerOutput, top_k: int) -> Tensor:
    """How much of the main attention, averaged over its heads, lies on the keys that would be selected: [R, Q].

    Raises: ValueError for a `top_k` under 1, and for float64.
    """
    selected_RQS = select_keys(index, main.last_RQ, main.key_valid_RK, top_k).contiguous()
    main = _readable(main)
    lse_RQH = visible_lse(main)
    recall_RQ = torch.empty(main.last_RQ.shape, device=main.q.device)
    for chunk in chunks(len(main.q), main.q.shape[1], selected_RQS.shape[-1]):
        part = main._replace(q=main.q[chunk.rows], k=main.k[chunk.rows])
        target_RXS = selected_target(part, selected_RQS[chunk.rows], lse_RQH[chunk.rows], chunk)
        recall_RQ[chunk.rows, chunk.queries] = target_RXS.sum(dim=-1)
    return recall_RQ


class _Problem(NamedTuple):
    """The constants of the indexer's loss, and whether a gradient is wanted."""

    main: MainAttention
    row_weight_RQ: Tensor
    selected_RQS: Tensor | None
    learns: bool


class _IndexerKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_RQIC: Tensor, k_RKC: Tensor, weight_RQI: Tensor, problem: _Problem
    ) -> tuple[Tensor, Tensor, Tensor]:
        main, weight_RQ = problem.main, problem.row_weight_RQ.float().contiguous()
        index = readable(IndexerOutput(q_RQIC, k_RKC, weight_RQI), main.last_RQ, main.key_valid_RK)
        gradients = None
        if problem.learns:
            gradients = empty_gradients(index)
        if problem.selected_RQS is None:
            kl_RQ, uniform_RQ = visible_kl(main, index, weight_RQ, gradients)
        else:
            kl_RQ, uniform_RQ = selected_kl(main, index, weight_RQ, problem.selected_RQS.long().contiguous(), gradients)
        if gradients is not None:
            ctx.save_for_backward(*gradients)
            ctx.dtypes = q_RQIC.dtype, k_RKC.dtype, weight_RQI.dtype
        ctx.mark_non_differentiable(kl_RQ, uniform_RQ)
        return (kl_RQ * problem.row_weight_RQ).sum(), kl_RQ, uniform_RQ

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *((gradient * grad_loss).to(dtype) for gradient, dtype in saved), None


def _readable(main: MainAttention) -> MainAttention:
    q_RQHE, k_RKGE = of_one_dtype(main.q.detach(), main.k.detach())
    valid_RK = None if main.key_valid_RK is None else main.key_valid_RK.to(torch.uint8).contiguous()
    return MainAttention(q_RQHE, k_RKGE, float(main.scale), main.last_RQ.int().contiguous(), valid_RK)
