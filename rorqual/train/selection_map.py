"""Where a model's dense attention looks in one document, and beside it what its indexers select: two maps a layer.

Dense attention computes the layers' inputs, as it does where recall is measured, so that both sides of a map are about
the same queries. Tokens are counted in bins of near equal width, and scores are made for a tile of queries at a time:
memory grows with the length of the document, never with its square.

Shapes: T tokens, X queries of a tile, K keys up to the last of them, S selected keys, B bins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from rorqual.models.convert import with_attention
from rorqual.models.decoder import Block, BlockInput, Decoder
from rorqual.models.layout import causal_layout
from rorqual.models.sparse import Heads, SelectionRule, SparseAttention
from rorqual.ops import dsa
from rorqual.ops.dispatch import dsa_kernels
from rorqual.ops.dsa_tiled import tiles

NUM_BINS = 96

DECIMALS = 4
"""Of what is stored."""

TOKENS_SHOWN = 12
"""So many tokens of the beginning of each bin are stored, for a reader to know the place."""


@dataclass(frozen=True)
class LayerMap:
    """One layer with an indexer; rows are bins of queries, columns bins of keys.

    attention_BB: share of the dense attention, averaged over heads and over the bin's queries; a row sums to 1.
    selected_BB: of the keys that the bin's queries see in the bin of keys, the share that they select; 0 where they see
    none. recall: share of the dense attention on the selected keys, over the queries that see more than are selected.
    """

    layer: int
    attention_BB: np.ndarray
    selected_BB: np.ndarray
    recall: float


@dataclass(frozen=True)
class SelectionMaps:
    """edges: the first token of each bin, and the number of tokens behind the last."""

    token_ids_T: np.ndarray
    top_k: int
    edges: tuple[int, ...]
    layers: tuple[LayerMap, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON values. A row ends at its own bin, since no query sees further.

        `{"num_tokens": 1024, "top_k": 64, "edges": [0, 11, ...], "beginnings": [[17, 4, ...], ...], "layers":
        [{"layer": 0, "recall": 0.8, "attention": [[1.0], [0.7, 0.3], ...], "selected": [[1.0], [1.0, 1.0], ...]}]}`
        """
        return {
            "num_tokens": len(self.token_ids_T),
            "top_k": self.top_k,
            "edges": list(self.edges),
            "beginnings": [
                self.token_ids_T[first : min(first + TOKENS_SHOWN, last)].tolist()
                for first, last in zip(self.edges, self.edges[1:], strict=False)
            ],
            "layers": [
                {
                    "layer": each.layer,
                    "recall": round(each.recall, DECIMALS),
                    "attention": _triangle(each.attention_BB),
                    "selected": _triangle(each.selected_BB),
                }
                for each in self.layers
            ],
        }


@torch.no_grad()
def selection_maps(model: Decoder, token_ids: np.ndarray, num_bins: int = NUM_BINS) -> SelectionMaps:
    """The maps of one document, in evaluation mode. Raises: ValueError for a model without indexers."""
    if model.config.dsa is None:
        raise ValueError("The model has no indexers, so it selects nothing; see `models.convert.with_indexers`.")
    dense = with_attention(model, "dense").eval()
    ids_T = torch.from_numpy(token_ids.astype(np.int64)).to(dense.embed_tokens.weight.device)
    layout = causal_layout([len(ids_T)], ids_T.device)
    edges = _edges(len(ids_T), num_bins)
    top_k = model.config.dsa.top_k
    x_TD = dense.embed_tokens(ids_T)
    rotations = dense.rotations(layout.positions_T, x_TD.dtype)
    maps = []
    for layer, module in enumerate(dense.layers):
        block = cast(Block, module)
        attention = cast(SparseAttention, block.self_attn)
        heads, index = attention.parts(block.input_layernorm(x_TD), rotations)
        if index is not None:
            maps.append(_layer_map(layer, heads, index, SelectionRule(top_k, model.kernels), edges))
        x_TD = block(x_TD, rotations, layout, BlockInput()).x_TD
    return SelectionMaps(token_ids, top_k, edges, tuple(maps))


def _edges(num_tokens: int, num_bins: int) -> tuple[int, ...]:
    num_bins = min(num_bins, num_tokens)
    return tuple(round(num_tokens * place / num_bins) for place in range(num_bins + 1))


def _layer_map(
    layer: int, heads: Heads, index: dsa.IndexerOutput, rule: SelectionRule, edges: Sequence[int]
) -> LayerMap:
    assert rule.top_k is not None
    num_tokens, top_k, device = len(heads.q), rule.top_k, heads.q.device
    width_B = torch.tensor(edges, device=device).diff()
    bin_T = torch.repeat_interleave(torch.arange(len(width_B), device=device), width_B)
    attention_BB, selected_BB, seen_BB = torch.zeros(3, len(width_B), len(width_B), dtype=torch.float64, device=device)
    found = 0.0
    for tile in tiles(num_tokens, num_tokens):
        query_X = torch.arange(tile.start, tile.stop, device=device)
        visible_XK = dsa.visible_keys(query_X[None], tile.stop)[0]
        share_XK = _attention(heads, tile, visible_XK)
        chosen_XK = _chosen(index, tile, query_X, rule)
        found += float((share_XK * chosen_XK)[query_X >= top_k].sum(dtype=torch.float64))
        for total_BB, each_XK in ((attention_BB, share_XK), (selected_BB, chosen_XK), (seen_BB, visible_XK)):
            total_BB.index_add_(0, bin_T[tile], _by_key_bin(each_XK, bin_T[: tile.stop], len(width_B)))
    return LayerMap(
        layer,
        (attention_BB / width_B[:, None]).cpu().numpy(),
        (selected_BB / seen_BB.clamp(min=1)).cpu().numpy(),
        found / max(num_tokens - top_k, 1) if num_tokens > top_k else 1.0,
    )


def _attention(heads: Heads, tile: slice, visible_XK: Tensor) -> Tensor:
    """The main attention of a tile's queries, averaged over its heads: [X, K], in float32 or wider."""
    dtype, num_heads = torch.promote_types(heads.q.dtype, torch.float32), heads.q.shape[1]
    num_sharing = num_heads // heads.k.shape[1]
    total_XK = torch.zeros(visible_XK.shape, dtype=dtype, device=heads.q.device)
    for head in range(num_heads):
        scores_XK = (heads.q[tile, head] @ heads.k[: tile.stop, head // num_sharing].T).to(dtype) * heads.scale
        total_XK += scores_XK.masked_fill_(~visible_XK, -math.inf).softmax(dim=-1)
    return total_XK / num_heads


def _chosen(index: dsa.IndexerOutput, tile: slice, query_X: Tensor, rule: SelectionRule) -> Tensor:
    """True at the keys that a tile's queries select: [X, K]."""
    rows = dsa.IndexerOutput(index.q[None, tile], index.k[None, : tile.stop], index.weight[None, tile])
    assert rule.top_k is not None
    selected_XS = dsa_kernels(index.q, rule.kernels).select_keys(rows, query_X[None], None, rule.top_k)[0]
    chosen_XK = torch.zeros(len(query_X), tile.stop + 1, dtype=torch.bool, device=query_X.device)
    return chosen_XK.scatter_(1, selected_XS.masked_fill(selected_XS < 0, tile.stop), True)[:, :-1]


def _by_key_bin(values_XK: Tensor, bin_K: Tensor, num_bins: int) -> Tensor:
    """[X, B]."""
    total_XB = torch.zeros(len(values_XK), num_bins, dtype=torch.float64, device=values_XK.device)
    return total_XB.index_add_(1, bin_K, values_XK.double())


def _triangle(map_BB: np.ndarray) -> list[list[float]]:
    return [[round(float(value), DECIMALS) for value in row[: place + 1]] for place, row in enumerate(map_BB)]
