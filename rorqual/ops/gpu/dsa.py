"""DeepSeek Sparse Attention in Triton kernels, for CUDA: A100 and newer.

The same mathematics as `dsa.py`, with the signatures of `dsa_tiled.py`. Inputs are multiplied in their own precision,
float32 without TF32, and summed in float32. Every run gives the same bits: there are no atomic additions, and the cut
into blocks depends on sizes and the device alone.

Shapes: as in `dsa.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rorqual.ops.gpu.dsa_backward import Saved, backward
from rorqual.ops.gpu.dsa_forward import forward
from rorqual.ops.gpu.dsa_kl import attention_recall, indexer_kl
from rorqual.ops.gpu.dsa_select import select_keys
from rorqual.ops.gpu.numbers import INTERPRETED

__all__ = ["attention_recall", "indexer_kl", "select_keys", "sparse_attention"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sparse_attention(q_RQHE: Tensor, k_RKGE: Tensor, v_RKGV: Tensor, selected_RQS: Tensor, scale: float) -> Tensor:
    """`dsa.sparse_attention`: [R, Q, H, V], in the dtype of its inputs.

    Values that are the first numbers of the keys, as a view of them, are read once where their number is the largest
    power of two in E: 512 of 576, as in latent attention.
    Raises: ValueError for dtypes that differ or that Triton does not multiply, for tensors on a CPU outside Triton's
    interpreter, for shapes that do not fit each other, and where heads are too wide for the device.
    """
    _check(q_RQHE, k_RKGE, v_RKGV, selected_RQS)
    out: Tensor = _SparseAttention.apply(q_RQHE, k_RKGE, v_RKGV, selected_RQS, scale)
    return out


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_RQHE: Tensor, k_RKGE: Tensor, v_RKGV: Tensor, selected_RQS: Tensor, scale: float) -> Tensor:
        q_RQHE, k_RKGE, v_RKGV = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_RQHE, k_RKGE, v_RKGV))
        selected_RQS = selected_RQS.contiguous()
        with torch.cuda.device_of(q_RQHE):
            out_RQHV, log_sum_RQH = forward(q_RQHE, k_RKGE, v_RKGV, selected_RQS, scale)
        ctx.save_for_backward(q_RQHE, k_RKGE, v_RKGV, selected_RQS, out_RQHV, log_sum_RQH)
        ctx.scale = scale
        return out_RQHV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RQHV: Tensor) -> tuple[Tensor | None, ...]:
        saved = Saved(*ctx.saved_tensors)
        with torch.cuda.device_of(grad_RQHV):
            gradients = backward(saved, grad_RQHV.contiguous(), ctx.scale)
        return *gradients, None, None


def _check(q_RQHE: Tensor, k_RKGE: Tensor, v_RKGV: Tensor, selected_RQS: Tensor) -> None:
    dtypes = {x.dtype for x in (q_RQHE, k_RKGE, v_RKGV)}
    if len(dtypes) > 1 or q_RQHE.dtype not in DTYPES:
        raise ValueError(
            f"Queries, keys and values are {q_RQHE.dtype}, {k_RKGE.dtype}, {v_RKGV.dtype}; the Triton kernels take one "
            "dtype for all, float32, bfloat16 or float16. Convert them, or use kernels = 'tiled'."
        )
    if not q_RQHE.is_cuda and not INTERPRETED.value:
        raise ValueError(
            f"The Triton kernels run on CUDA and the tensors are on {q_RQHE.device.type!r}; move them, use kernels = "
            "'tiled', or set TRITON_INTERPRET=1 before the start to try the kernels out on a CPU."
        )
    fits = (
        q_RQHE.shape[-1] == k_RKGE.shape[-1]
        and k_RKGE.shape[:3] == v_RKGV.shape[:3]
        and len(q_RQHE) == len(k_RKGE)
        and q_RQHE.shape[2] % k_RKGE.shape[2] == 0
        and q_RQHE.shape[:2] == selected_RQS.shape[:2]
    )
    if not fits:
        shapes = ", ".join(str(list(x.shape)) for x in (q_RQHE, k_RKGE, v_RKGV, selected_RQS))
        raise ValueError(
            f"Queries, keys, values and selection are {shapes}; expected [R, Q, H, E], [R, K, G, E], [R, K, G, V], "
            "[R, Q, S] with H a multiple of G."
        )
