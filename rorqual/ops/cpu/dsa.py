"""DeepSeek Sparse Attention on a CPU: compiled loops on all cores, in float32, and torch's matrix products where they
are faster.

The same functions as `dsa_tiled.py`. Index scores are a matrix product of torch, made in blocks that stay in a core's
cache, ranked and selected from by `select.py`; attention reads keys where they lie (`gathered.py`), and so
does the indexer's loss (`kl.py`). bfloat16 is computed in float32.

Shapes: as in `dsa.py`; X queries of a tile, P parts that add up keys' gradients apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rorqual.ops import dsa
from rorqual.ops.cpu.compiled import array
from rorqual.ops.cpu.gathered import attend, attend_backward, dots
from rorqual.ops.cpu.kl import Gradients, Keys, Queries, indexer_kl_rows, recall_rows
from rorqual.ops.cpu.select import rank_scores, select_rows
from rorqual.ops.cpu.workers import spread
from rorqual.ops.dsa_tiled import MainAttention, select_all

PRODUCT_ROWS = 256
"""Rows of the matrix product of a tile: queries times index heads. Fewer leave the cores waiting for Python's lock."""

PRODUCT_KEYS = 1024
"""Its columns: 1 MB of products in float32, about a core's second-level cache."""

DECODED_KEYS = 16_384
"""Keys of a task where a tile is one query, whose products are made by a loop."""

QUERIES_PER_TASK = 64

IN_ORDER = np.arange(DECODED_KEYS)


def select_keys(index: dsa.IndexerOutput, last_RQ: Tensor, key_valid_RK: Tensor | None, top_k: int) -> Tensor:
    """`dsa.select` of `dsa.index_scores`: int64 [R, Q, min(top_k, K)]. Nothing here is differentiated.

    Raises: ValueError for a `top_k` under 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k = {top_k}; at least one key must be selected.")
    num_keys = index.k.shape[1]
    if num_keys <= top_k:
        return select_all(last_RQ, num_keys, key_valid_RK)
    with torch.no_grad():
        selected_RQS = torch.empty(*last_RQ.shape, top_k, dtype=torch.int64)

        def select(row: int, tile: slice, rank_XK: np.ndarray) -> None:
            select_rows(rank_XK, array(last_RQ[row, tile]), top_k, selected_RQS[row, tile].numpy())

        for_each_tile_of_ranks(index, last_RQ, key_valid_RK, select)
    return selected_RQS


def for_each_tile_of_ranks(
    index: dsa.IndexerOutput,
    last_RQ: Tensor,
    key_valid_RK: Tensor | None,
    use: Callable[[int, slice, np.ndarray], object],
) -> None:
    """Call `use` with a row, a tile of its queries, and their ranks of the row's keys, uint32 [X, K]; on all cores."""
    q_RQIC, weight_RQI = index.q.float(), index.weight.float().contiguous()
    width = max(1, PRODUCT_ROWS // q_RQIC.shape[2])

    def work(task: tuple[int, slice]) -> None:
        row, tile = task
        valid_K, last_X = _valid(key_valid_RK, row), array(last_RQ[row, tile])
        use(row, tile, rank_keys(q_RQIC[row, tile], index.k[row], array(weight_RQI[row, tile]), valid_K, last_X))

    num_rows, num_queries = last_RQ.shape
    spread(work, list(_tasks(num_rows, num_queries, width)))


def rank_keys(
    q_XIC: Tensor, k_KC: Tensor, weight_XI: np.ndarray, valid_K: np.ndarray, last_X: np.ndarray
) -> np.ndarray:
    """Ranks of the keys that some query of a tile sees: uint32 [X, keys up to the last one]."""
    (num_queries, num_heads, _), seen = q_XIC.shape, int(last_X.max()) + 1
    rank_XK = np.empty((num_queries, seen), dtype=np.uint32)
    if num_queries == 1:
        # A product so flat is slow in torch; in loops it is cut up, for a step of decoding may have no other task.
        def rank(first: int) -> None:
            keys_NC = k_KC[first : min(first + DECODED_KEYS, seen)].float()
            products_1IN = np.empty((1, num_heads, len(keys_NC)), dtype=np.float32)
            dots(array(q_XIC[0]), array(keys_NC.unsqueeze(1)), 0, IN_ORDER[: len(keys_NC)], products_1IN[0])
            rank_scores(products_1IN, weight_XI, valid_K, last_X, first, np.empty_like(products_1IN[0, 0]), rank_XK)

        spread(rank, range(0, seen, DECODED_KEYS))
        return rank_XK
    total_N = np.empty(PRODUCT_KEYS, dtype=np.float32)
    products = torch.empty(num_queries * num_heads * PRODUCT_KEYS)
    for first in range(0, seen, PRODUCT_KEYS):
        keys_NC = k_KC[first : min(first + PRODUCT_KEYS, seen)].float()
        products_WN = products[: num_queries * num_heads * len(keys_NC)].view(-1, len(keys_NC))
        torch.mm(q_XIC.flatten(0, 1), keys_NC.T, out=products_WN)
        products_XIN = products_WN.view(num_queries, num_heads, -1).numpy()
        rank_scores(products_XIN, weight_XI, valid_K, last_X, first, total_N, rank_XK)
    return rank_XK


def sparse_attention(q_RQHE: Tensor, k_RKGE: Tensor, v_RKGV: Tensor, selected_RQS: Tensor, scale: float) -> Tensor:
    """`dsa.sparse_attention`: [R, Q, H, V]."""
    return grouped_sparse_attention(q_RQHE, k_RKGE, v_RKGV, selected_RQS.unsqueeze(2), scale)


def grouped_sparse_attention(
    q_RQHE: Tensor, k_RKGE: Tensor, v_RKGV: Tensor, selected_RQCS: Tensor, scale: float
) -> Tensor:
    """The same, where each key-value head may have a selection of its own (C = G) or all share one (C = 1)."""
    q, k, v = (each.float() for each in (q_RQHE, k_RKGE, v_RKGV))
    out: Tensor = _SparseAttention.apply(q, k, v, selected_RQCS.long(), scale)
    return out.to(q_RQHE.dtype)


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_RQHE: Tensor, k_RKGE: Tensor, v_RKGV: Tensor, selected_RQCS: Tensor, scale: float
    ) -> Tensor:
        q, k, v, selected = q_RQHE.contiguous(), k_RKGE, v_RKGV, selected_RQCS.contiguous()
        out, lse = q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3])
        keys, values = [_rows(each) for each in k], [_rows(each) for each in v]

        def work(task: tuple[int, slice]) -> None:
            row, tile = task
            inputs = (array(q[row, tile]), keys[row], values[row], array(selected[row, tile]))
            attend(*inputs, scale, array(out[row, tile]), array(lse[row, tile]))

        spread(work, list(_tasks(*q.shape[:2])))
        ctx.save_for_backward(q, k, v, selected, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_RQHV: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, selected, out, lse = ctx.saved_tensors
        grad, grad_q = grad_RQHV.contiguous(), torch.empty_like(q)
        (num_rows, num_queries), groups = q.shape[:2], k.shape[2]
        # No two tasks may add to one key: as many copies of the sums as it takes to keep all cores busy.
        num_parts = -(-torch.get_num_threads() // (num_rows * groups))
        grad_k_P, grad_v_P = (torch.zeros(num_parts, *x.shape) for x in (k, v))
        keys, values = [_rows(each) for each in k], [_rows(each) for each in v]
        width = -(-num_queries // num_parts)

        def work(task: tuple[int, int, int]) -> None:
            row, group, part = task
            tile = slice(part * width, min((part + 1) * width, num_queries))
            inputs = (array(q[row, tile]), keys[row], values[row], array(selected[row, tile]))
            saved = (array(out[row, tile]), array(lse[row, tile]), array(grad[row, tile]))
            results = (array(grad_q[row, tile]), array(grad_k_P[part, row]), array(grad_v_P[part, row]))
            attend_backward(*inputs, ctx.scale, *saved, group, *results)

        spread(work, [(r, g, p) for r in range(num_rows) for g in range(groups) for p in range(num_parts)])
        if num_parts == 1:
            return grad_q, grad_k_P[0], grad_v_P[0], None, None
        return grad_q, grad_k_P.sum(dim=0), grad_v_P.sum(dim=0), None, None


def _tasks(num_rows: int, num_queries: int, width: int = QUERIES_PER_TASK) -> Iterator[tuple[int, slice]]:
    for row in range(num_rows):
        for start in range(0, num_queries, width):
            yield row, slice(start, start + width)


def _rows(x_KGE: Tensor) -> np.ndarray:
    """The array of a row's keys or values. The first numbers of wider ones, as a cache keeps them (a latent and a
    rotated key as one), are given with the rest: the kernels read no further than they must."""
    pitch = x_KGE.stride(0)
    behind = x_KGE.untyped_storage().nbytes() // x_KGE.element_size() - x_KGE.storage_offset()
    if x_KGE.is_contiguous() or x_KGE.shape[1] > 1 or x_KGE.stride(2) != 1 or pitch < 1 or behind < pitch * len(x_KGE):
        return array(x_KGE)
    return array(x_KGE.as_strided((len(x_KGE), 1, pitch), (pitch, pitch, 1)))


def _valid(key_valid_RK: Tensor | None, row: int) -> np.ndarray:
    """Which keys of a row are valid; empty where all are."""
    return np.empty(0, dtype=np.bool_) if key_valid_RK is None else array(key_valid_RK[row])


def indexer_kl(
    main: MainAttention, index: dsa.IndexerOutput, row_weight_RQ: Tensor, selected_RQS: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`dsa_tiled.indexer_kl`: the loss, and KL and KL to uniform of each query [R, Q]."""
    constants = main._replace(q=main.q.detach().float(), k=main.k.detach().float())
    leaves = (index.q.float(), index.k.float(), index.weight.float())
    loss, kl_RQ, uniform_RQ = _IndexerKL.apply(*leaves, constants, row_weight_RQ.float(), selected_RQS)
    return loss, kl_RQ, uniform_RQ


class _IndexerKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_RQIC: Tensor,
        k_RKC: Tensor,
        weight_RQI: Tensor,
        main: MainAttention,
        row_weight_RQ: Tensor,
        selected_RQS: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, weight = q_RQIC.contiguous(), k_RKC.contiguous(), weight_RQI.contiguous()
        grad_q, grad_weight = torch.empty_like(q), torch.empty_like(weight)
        kl_RQ, uniform_RQ = torch.empty_like(row_weight_RQ), torch.empty_like(row_weight_RQ)
        num_rows, num_queries = row_weight_RQ.shape
        num_parts = -(-torch.get_num_threads() // num_rows)  # As in attention: no two tasks add to one key.
        grad_k_P = k.new_zeros(num_parts, *k.shape)

        def work(task: tuple[int, int]) -> None:
            row, part = task
            # Every so many queries are a part's, since later ones see more keys.
            mine = slice(part, num_queries, num_parts)
            queries = _queries(main, dsa.IndexerOutput(q, k, weight), row, mine)
            keys = _keys(main, k, row)
            selected = np.empty((0, 0), np.int64) if selected_RQS is None else array(selected_RQS[row, mine].long())
            tile = [torch.empty_like(each[row, mine]).contiguous() for each in (grad_q, grad_weight, kl_RQ, uniform_RQ)]
            gradients = Gradients(array(tile[0]), array(tile[1]), array(grad_k_P[part, row].unsqueeze(1)))
            results = (gradients, array(tile[2]), array(tile[3]))
            indexer_kl_rows(queries, keys, selected, main.scale, array(row_weight_RQ[row, mine]), *results)
            for whole, part_of_it in zip((grad_q, grad_weight, kl_RQ, uniform_RQ), tile, strict=True):
                whole[row, mine] = part_of_it

        spread(work, [(row, part) for row in range(num_rows) for part in range(num_parts)])
        ctx.save_for_backward(grad_q, grad_k_P.sum(dim=0), grad_weight)
        ctx.mark_non_differentiable(kl_RQ, uniform_RQ)
        return (kl_RQ * row_weight_RQ).sum(), kl_RQ, uniform_RQ

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        return *(gradient * grad_loss for gradient in ctx.saved_tensors), None, None, None


@torch.no_grad()
def attention_recall(main: MainAttention, index: dsa.IndexerOutput, top_k: int) -> Tensor:
    """`dsa_tiled.attention_recall`: [R, Q]."""
    constants = main._replace(q=main.q.float(), k=main.k.float())
    rows = dsa.IndexerOutput(*(each.float().contiguous() for each in index))
    recall_RQ = torch.empty(main.last_RQ.shape)

    def work(task: tuple[int, slice]) -> None:
        row, tile = task
        inputs = (_queries(constants, rows, row, tile), _keys(constants, rows.k, row))
        recall_rows(*inputs, main.scale, top_k, array(recall_RQ[row, tile]))

    spread(work, list(_tasks(*main.last_RQ.shape)))
    return recall_RQ


def _queries(main: MainAttention, index: dsa.IndexerOutput, row: int, tile: slice) -> Queries:
    own = (main.q[row, tile], index.q[row, tile], index.weight[row, tile], main.last_RQ[row, tile])
    return Queries(*(array(each) for each in own))


def _keys(main: MainAttention, index_k_RKC: Tensor, row: int) -> Keys:
    return Keys(array(main.k[row]), array(index_k_RKC[row].unsqueeze(1)), _valid(main.key_valid_RK, row))
