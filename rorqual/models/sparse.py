"""Attention over the keys that an indexer selects (DSA), for grouped-query and for latent attention.

Both are their dense kind with an indexer beside it. Where all visible keys would be selected, they compute what the
dense kind computes, with the same code. Otherwise grouped-query heads share one selection a query, and latent attention
runs in its absorbed form (MQA): all heads read the same latents, and the softmax keeps the scale of the head that was
not absorbed. A model whose `attention` is still "dense" carries its indexers along and never selects.

A selection is positions in a token's own sequence, ascending, -1 behind the last: what was selected while sampling can
be forced in training, however the tokens are packed there.

Shapes: T packed tokens, R rows, Q queries a row, N = R*Q, K keys a row, S selected keys, D hidden, H heads, G key-value
heads, E head dimension, P rotary dimension, V value dimension, L latent rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.models.attention import GroupedQueryAttention, MultiHeadLatentAttention, attend_packed
from rorqual.models.cache import CachedLayout
from rorqual.models.config import ModelConfig
from rorqual.models.index_keys import pack_index_keys, unpack_index_keys
from rorqual.models.indexer import Indexer
from rorqual.models.layout import AttentionBlock, PackedLayout
from rorqual.models.rope import Rotation
from rorqual.ops import dsa, dsa_tiled
from rorqual.ops.dispatch import Kernels, dsa_kernels


@dataclass(frozen=True)
class IndexerLoss:
    """One layer's. total: the KL of its queries, weighted and summed, with a gradient for the indexer alone. kl_T and
    uniform_T: KL of each query, and that of an indexer that knows nothing, in nats.

    recall_T: the share of the attention that lies on the keys that would be selected. It is measured where attention is
    dense and nothing is trained.
    """

    total: Tensor
    kl_T: Tensor
    uniform_T: Tensor
    recall_T: Tensor | None = None


@dataclass(frozen=True)
class Rotations:
    """Of the attention's heads, and of the indexer's."""

    main: Rotation
    index: Rotation


@dataclass(frozen=True)
class SparseRequest:
    """selected_TS: a selection to use instead of the layer's own. loss_weight_T: weights of the queries in the
    indexer's loss; None does not compute it. recall_at: with the loss, measure the recall of so many keys."""

    selected_TS: Tensor | None = None
    loss_weight_T: Tensor | None = None
    recall_at: int = 0


class SelectionRule(NamedTuple):
    """top_k: how many keys a query attends to; None for all. kernels: the implementation, see `ops.dispatch`."""

    top_k: int | None
    kernels: Kernels = "auto"

    def takes_all(self, num_keys: int) -> bool:
        """Whether a selection among so many keys leaves none out."""
        return self.top_k is None or num_keys <= self.top_k


@dataclass(frozen=True)
class SparseOutput:
    """out_TD: what the attention adds. selected_TS: None where all keys were attended to as a matter of config."""

    out_TD: Tensor
    selected_TS: Tensor | None
    loss: IndexerLoss | None = None


class SparseGroupedQueryAttention(GroupedQueryAttention):
    """Llama and Qwen with an indexer, which makes its queries from the block's input."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config)
        self.indexer, self.rule = _indexer(config, layer, config.hidden_size), SelectionRule(top_k_of(config))

    def forward_sparse(
        self, x_TD: Tensor, rotations: Rotations, layout: PackedLayout, request: SparseRequest
    ) -> SparseOutput:
        heads, index = self.parts(x_TD, rotations)
        out_THE, selected_TS, loss = attend_packed_sparse(heads, index, layout, self.rule, request)
        return SparseOutput(self.o_proj(out_THE.flatten(1)), selected_TS, loss)

    def parts(self, x_TD: Tensor, rotations: Rotations) -> tuple[Heads, dsa.IndexerOutput | None]:
        """Heads of the main attention, and what the indexer makes of the same input."""
        q_THE, k_TGE, v_TGE = self._project(x_TD, rotations.main)
        index = None if self.indexer is None else self.indexer(x_TD, x_TD, rotations.index)
        return Heads(q_THE, k_TGE, v_TGE, self.scale), index

    def forward_cached_sparse(
        self,
        x_ND: Tensor,
        rotations: Rotations,
        columns: list[Tensor],
        layout: CachedLayout,
        selected_NS: Tensor | None,
    ) -> SparseOutput:
        q_NHE, k_NGE, v_NGE = self._project(x_ND, rotations.main)
        index = None if self.indexer is None else self.indexer(x_ND, x_ND, rotations.index)
        write(columns, layout, (k_NGE.flatten(1), v_NGE.flatten(1)), index)
        selected_NS = select_cached(index, columns[-1], layout, self.rule, selected_NS)
        if selected_NS is None or self.rule.takes_all(layout.num_keys):
            return SparseOutput(self._attend_cached(q_NHE, columns, layout), selected_NS)
        k_RKGE, v_RKGE = (layout.read(column).unflatten(-1, (self.num_kv_heads, -1)) for column in columns[:2])
        out_NHE = attend_cached_sparse(Heads(q_NHE, k_RKGE, v_RKGE, self.scale), layout, self.rule, selected_NS)
        return SparseOutput(self.o_proj(out_NHE.flatten(1)), selected_NS)


class SparseLatentAttention(MultiHeadLatentAttention):
    """DeepSeek-V3.2 and GLM: the indexer makes its queries from the latent that the main queries come from."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config)
        query_size = config.mla.q_lora_rank if config.mla and config.mla.q_lora_rank else config.hidden_size
        self.indexer, self.rule = _indexer(config, layer, query_size), SelectionRule(top_k_of(config))

    def forward_sparse(
        self, x_TD: Tensor, rotations: Rotations, layout: PackedLayout, request: SparseRequest
    ) -> SparseOutput:
        absorbed = not self.rule.takes_all(layout.num_keys)
        heads, index = self.parts(x_TD, rotations, absorbed)
        out_THX, selected_TS, loss = attend_packed_sparse(heads, index, layout, self.rule, request)
        out_THV = self._raise_value(out_THX) if absorbed else out_THX
        return SparseOutput(self.o_proj(out_THV.flatten(1)), selected_TS, loss)

    def parts(
        self, x_TD: Tensor, rotations: Rotations, absorbed: bool = False
    ) -> tuple[Heads, dsa.IndexerOutput | None]:
        """Heads of the main attention, of the latents themselves if `absorbed`, and what the indexer makes of the same
        input."""
        query_TW = self._query_input(x_TD)
        q_nope_THN, q_rope_THP, latent_TL, k_rope_TP = self._project(x_TD, rotations.main, query_TW)
        index = None if self.indexer is None else self.indexer(x_TD, query_TW, rotations.index)
        if not absorbed:
            q_THE = torch.cat((q_nope_THN, q_rope_THP), dim=-1)
            return Heads(q_THE, *self._expand(latent_TL, k_rope_TP), self.scale), index
        k_T1E = torch.cat((latent_TL, k_rope_TP), dim=-1).unsqueeze(1)
        return Heads(self._absorb_query(q_nope_THN, q_rope_THP), k_T1E, latent_TL.unsqueeze(1), self.scale), index

    def forward_cached_sparse(
        self,
        x_ND: Tensor,
        rotations: Rotations,
        columns: list[Tensor],
        layout: CachedLayout,
        selected_NS: Tensor | None,
    ) -> SparseOutput:
        query_NW = self._query_input(x_ND)
        q_nope_NHN, q_rope_NHP, latent_NL, k_rope_NP = self._project(x_ND, rotations.main, query_NW)
        index = None if self.indexer is None else self.indexer(x_ND, query_NW, rotations.index)
        write(columns, layout, (torch.cat((latent_NL, k_rope_NP), dim=-1),), index)
        selected_NS = select_cached(index, columns[-1], layout, self.rule, selected_NS)
        if selected_NS is None or self.rule.takes_all(layout.num_keys):
            return SparseOutput(self._attend_cached(q_nope_NHN, q_rope_NHP, columns, layout), selected_NS)
        k_RK1E = layout.read(columns[0]).unsqueeze(2)
        heads = Heads(self._absorb_query(q_nope_NHN, q_rope_NHP), k_RK1E, k_RK1E[..., : self.latent_dim], self.scale)
        out_NHV = self._raise_value(attend_cached_sparse(heads, layout, self.rule, selected_NS))
        return SparseOutput(self.o_proj(out_NHV.flatten(1)), selected_NS)


SparseAttention = SparseGroupedQueryAttention | SparseLatentAttention


# ------------------------------------------------------------------------------------------------------ packed tokens


class Heads(NamedTuple):
    """Queries [T, H, E], keys [T, G, E] and values [T, G, V] of the main attention, and its softmax scale."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float


def attend_packed_sparse(
    heads: Heads, index: dsa.IndexerOutput | None, layout: PackedLayout, rule: SelectionRule, request: SparseRequest
) -> tuple[Tensor, Tensor | None, IndexerLoss | None]:
    """Attention [T, H, V], the selection, and the indexer's loss where it is asked for.

    Where all keys are attended to by rule, the loss is taken over all of them (warm-up), else over the selected ones.
    Raises: ValueError for a layer without indexer that is given no selection.
    """
    selected_TS = None if rule.top_k is None else _given_or_own(request.selected_TS, index, layout, rule)
    loss = None
    if request.loss_weight_T is not None and index is not None:
        loss = _packed_loss(heads, index, layout, selected_TS, rule, request)
    if selected_TS is None or rule.takes_all(layout.num_keys):
        return attend_packed(*heads[:3], layout, heads.scale).unflatten(1, (heads.q.shape[1], -1)), selected_TS, loss
    kernels = dsa_kernels(heads.q, rule.kernels)
    outputs = [
        kernels.sparse_attention(
            _rows(heads.q, block.query_index_RQ),
            _rows(heads.k, block.key_index_RK),
            _rows(heads.v, block.key_index_RK),
            _key_indices(_rows(selected_TS, block.query_index_RQ), block),
            heads.scale,
        )
        for block in layout.blocks
    ]
    return layout.in_packed_order(outputs), selected_TS, loss


def _given_or_own(
    given_TS: Tensor | None, index: dsa.IndexerOutput | None, layout: PackedLayout, rule: SelectionRule
) -> Tensor:
    """The given selection; the layer's own for tokens of which nothing is given (their row is all -1)."""
    if given_TS is None:
        return select_packed(_present(index), layout, rule)
    given_TS, free_T = given_TS.long(), given_TS[:, 0] < 0
    if not bool(free_T.any()):
        return given_TS
    own_TS = select_packed(_present(index), layout, rule)
    width = max(own_TS.shape[1], given_TS.shape[1])
    own_TS, given_TS = (F.pad(each, (0, width - each.shape[1]), value=-1) for each in (own_TS, given_TS))
    return torch.where(free_T[:, None], own_TS, given_TS)


@torch.no_grad()
def select_packed(index: dsa.IndexerOutput, layout: PackedLayout, rule: SelectionRule) -> Tensor:
    """Positions [T, min(top_k, longest row)] that each token selects in its own sequence."""
    assert rule.top_k is not None
    width, kernels = min(rule.top_k, layout.num_keys), dsa_kernels(index.q, rule.kernels)
    found = []
    for block in layout.blocks:
        q_RQIC, weight_RQI = (_rows(x, block.query_index_RQ) for x in (index.q, index.weight))
        rows = dsa.IndexerOutput(q_RQIC, _rows(index.k, block.key_index_RK), weight_RQI)
        selected_RQS = kernels.select_keys(rows, block.last_key_RQ(), block.key_valid_RK, rule.top_k)
        positions_RQS = _positions(selected_RQS, block)
        found.append(F.pad(positions_RQS, (0, width - positions_RQS.shape[-1]), value=-1))
    return layout.in_packed_order(found)


def _packed_loss(
    heads: Heads,
    index: dsa.IndexerOutput,
    layout: PackedLayout,
    selected_TS: Tensor | None,
    rule: SelectionRule,
    request: SparseRequest,
) -> IndexerLoss:
    assert request.loss_weight_T is not None
    kernels = dsa_kernels(heads.q, rule.kernels)
    totals, measured, recalls = [], [], []
    for block in layout.blocks:
        queries, keys = block.query_index_RQ, block.key_index_RK
        main = dsa_tiled.MainAttention(
            _rows(heads.q, queries), _rows(heads.k, keys), heads.scale, block.last_key_RQ(), block.key_valid_RK
        )
        rows = dsa.IndexerOutput(_rows(index.q, queries), _rows(index.k, keys), _rows(index.weight, queries))
        weight_RQ = _rows(request.loss_weight_T, queries)
        if block.query_valid_RQ is not None:
            weight_RQ = weight_RQ.masked_fill(~block.query_valid_RQ, 0.0)
        selected_RQS = None if selected_TS is None else _key_indices(_rows(selected_TS, queries), block)
        total, kl_RQ, uniform_RQ = kernels.indexer_kl(main, rows, weight_RQ, selected_RQS)
        totals.append(total)
        measured.append(torch.stack((kl_RQ, uniform_RQ), dim=-1))
        if request.recall_at:
            recalls.append(kernels.attention_recall(main, rows, request.recall_at))
    kl_T, uniform_T = layout.in_packed_order(measured).unbind(dim=-1)
    return IndexerLoss(torch.stack(totals).sum(), kl_T, uniform_T, layout.in_packed_order(recalls) if recalls else None)


def _rows(x_T: Tensor, index_RQ: Tensor) -> Tensor:
    """Rows of packed tokens: [R, Q, ...]."""
    return x_T.index_select(0, index_RQ.flatten()).view(*index_RQ.shape, *x_T.shape[1:])


def _positions(selected_RQS: Tensor, block: AttentionBlock) -> Tensor:
    """From places among a row's keys, padding included, to positions in its sequence."""
    if block.key_valid_RK is None:
        return selected_RQS
    position_RK = block.key_valid_RK.cumsum(dim=1) - 1
    return _looked_up(position_RK, selected_RQS)


def _key_indices(positions_RQS: Tensor, block: AttentionBlock) -> Tensor:
    """From positions in a sequence to places among the row's keys."""
    if block.key_valid_RK is None:
        return positions_RQS
    valid_first_RK = (~block.key_valid_RK).int().argsort(dim=1, stable=True)
    return _looked_up(valid_first_RK, positions_RQS)


def _looked_up(table_RK: Tensor, places_RQS: Tensor) -> Tensor:
    found_RQS = table_RK.gather(1, places_RQS.clamp(min=0).flatten(1)).view_as(places_RQS)
    return found_RQS.masked_fill(places_RQS < 0, -1)


# -------------------------------------------------------------------------------------------------------------- cached


def write(
    columns: list[Tensor], layout: CachedLayout, new: tuple[Tensor, ...], index: dsa.IndexerOutput | None
) -> None:
    """Store what attention keeps of the new tokens, and the index key behind it."""
    layout.write(columns, new if index is None else (*new, pack_index_keys(index.k, columns[-1].dtype)))


def select_cached(
    index: dsa.IndexerOutput | None,
    index_keys_SCE: Tensor,
    layout: CachedLayout,
    rule: SelectionRule,
    given_NS: Tensor | None,
) -> Tensor | None:
    """Positions [N, S] that each new token selects in its slot; None where all keys are attended to by config."""
    if rule.top_k is None or given_NS is not None:
        return given_NS if rule.top_k is not None else None
    q, _, weight = _present(index)
    q_RQIC, weight_RQI = (each.unflatten(0, (layout.num_rows, -1)) for each in (q, weight))
    rows = dsa.IndexerOutput(q_RQIC, unpack_index_keys(layout.read(index_keys_SCE)), weight_RQI)
    kernels = dsa_kernels(q, rule.kernels)
    return kernels.select_keys(rows, layout.positions_RQ, None, rule.top_k).flatten(0, 1)


def attend_cached_sparse(heads: Heads, layout: CachedLayout, rule: SelectionRule, selected_NS: Tensor) -> Tensor:
    """[N, H, V], where keys and values are those of the rows' slots: [R, K, G, E]."""
    q_RQHE, selected_RQS = (x.unflatten(0, (layout.num_rows, -1)) for x in (heads.q, selected_NS))
    kernels = dsa_kernels(heads.q, rule.kernels)
    return kernels.sparse_attention(q_RQHE, heads.k, heads.v, selected_RQS, heads.scale).flatten(0, 1)


# -------------------------------------------------------------------------------------------------------------- config


def top_k_of(config: ModelConfig) -> int | None:
    """How many keys a query attends to; None for all."""
    return config.dsa.top_k if config.dsa is not None and config.attention == "dsa" else None


def _indexer(config: ModelConfig, layer: int, query_size: int) -> Indexer | None:
    if config.dsa is None:
        raise ValueError("Sparse attention needs ModelConfig.dsa, the sizes of the indexer.")
    return Indexer(config.dsa, config.hidden_size, query_size) if layer in config.indexer_layers else None


def _present(index: dsa.IndexerOutput | None) -> dsa.IndexerOutput:
    if index is None:
        raise ValueError("A layer without indexer needs the selection of a layer below it.")
    return index
