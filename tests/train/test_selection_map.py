"""The maps equal what brute force finds: every weight of every head, every selection, then counted by bins."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rorqual.models.config import DSAConfig
from rorqual.models.convert import with_attention, with_indexers
from rorqual.models.decoder import Decoder
from rorqual.models.layout import causal_layout
from rorqual.ops import dsa, dsa_tiled
from rorqual.train.selection_map import SelectionMaps, selection_maps
from rorqual.train.text_loss import measure_held_out
from tests.train.fakes import VOCABULARY, build_decoder

DSA = DSAConfig(top_k=5, num_heads=2, head_dim=8, rope_dim=4, shared_layers=(1,))
NUM_TOKENS, NUM_BINS = 45, 7


@pytest.fixture(scope="module", params=("gqa", "mla_moe"))
def model(request: pytest.FixtureRequest) -> Decoder:
    return with_indexers(build_decoder(request.param), DSA, torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def document() -> np.ndarray:
    return np.random.default_rng(0).integers(VOCABULARY, size=NUM_TOKENS).astype(np.int32)


def inputs(model: Decoder, document: np.ndarray) -> dict[int, tuple[Tensor, Tensor, float, dsa.IndexerOutput]]:
    """Queries, keys for each head, scale and index of each layer, seen while the model runs."""
    seen = {}
    originals = {}
    for layer, block in enumerate(model.layers):
        originals[layer] = block.self_attn.parts

        def spy(*given, layer=layer, **named):
            heads, index = originals[layer](*given, **named)
            seen[layer] = (heads.q, heads.k, heads.scale, index)
            return heads, index

        block.self_attn.parts = spy
    with torch.no_grad():
        model(torch.from_numpy(document).long(), causal_layout([len(document)]))
    return seen


def brute_force(q: Tensor, k: Tensor, scale: float, index: dsa.IndexerOutput) -> tuple[Tensor, Tensor]:
    """Attention averaged over heads, and whether a key is selected: [T, T] each."""
    visible = torch.ones(len(q), len(q), dtype=torch.bool).tril()
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("the,she->hts", q, keys) * scale
    attention = scores.masked_fill(~visible, -math.inf).softmax(dim=-1).mean(dim=0)
    products = torch.einsum("tic,sc->tis", index.q, index.k).relu()
    index_scores = torch.einsum("tis,ti->ts", products, index.weight)
    selected = torch.zeros_like(visible)
    for query in range(len(q)):
        best = sorted(range(query + 1), key=lambda key: (-float(index_scores[query, key]), key))
        selected[query, best[: DSA.top_k]] = True
    return attention, selected


def test_the_maps_are_what_brute_force_finds(model: Decoder, document: np.ndarray) -> None:
    maps = selection_maps(model, document, NUM_BINS)
    seen = inputs(with_attention(model, "dense").eval(), document)
    assert [each.layer for each in maps.layers] == [0, 2], "a layer that shares a selection has none of its own"
    assert maps.edges == (0, 6, 13, 19, 26, 32, 39, 45)
    for each in maps.layers:
        attention, selected = brute_force(*seen[each.layer])
        late = slice(DSA.top_k, None)
        recall = (attention * selected)[late].sum(dim=1).mean()
        assert each.recall == pytest.approx(float(recall), rel=1e-9)
        for i, (top, bottom) in enumerate(zip(maps.edges, maps.edges[1:], strict=False)):
            for j, (left, right) in enumerate(zip(maps.edges, maps.edges[1:], strict=False)):
                block = (slice(top, bottom), slice(left, right))
                pairs = sum(key <= query for query in range(top, bottom) for key in range(left, right))
                assert each.attention_BB[i, j] == pytest.approx(float(attention[block].sum()) / (bottom - top))
                assert each.selected_BB[i, j] == pytest.approx(float(selected[block].sum()) / max(pairs, 1))


def test_rows_of_attention_are_whole_and_early_queries_select_all(model: Decoder, document: np.ndarray) -> None:
    for each in selection_maps(model, document, 9).layers:
        np.testing.assert_allclose(each.attention_BB.sum(axis=1), 1.0, rtol=1e-12)
        assert each.selected_BB[0, 0] == 1.0, "five tokens, and as many are selected"
        assert (np.triu(each.attention_BB, 1) == 0).all() and (np.triu(each.selected_BB, 1) == 0).all()


def test_tiles_change_nothing(model: Decoder, document: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = selection_maps(model, document, NUM_BINS)
    monkeypatch.setattr(dsa_tiled, "TILE_ELEMENTS", 4 * NUM_TOKENS)
    tiled = selection_maps(model, document, NUM_BINS)
    for one, other in zip(whole.layers, tiled.layers, strict=True):
        np.testing.assert_allclose(one.attention_BB, other.attention_BB, rtol=1e-12)
        assert np.array_equal(one.selected_BB, other.selected_BB)


def test_recall_is_that_of_the_held_out_figures_also_of_a_sparse_model(model: Decoder, document: np.ndarray) -> None:
    sparse = with_attention(model, "dsa")
    maps = selection_maps(sparse, document)
    figures = measure_held_out(sparse, [np.append(document, 1)], 100)
    assert [each.recall for each in maps.layers] == pytest.approx(list(figures.recall), rel=1e-6)
    assert sparse.training and len(maps.edges) == NUM_TOKENS + 1, "no bin is empty"


def test_what_is_stored_is_a_triangle_of_rounded_numbers(model: Decoder, document: np.ndarray) -> None:
    maps = selection_maps(model, document, NUM_BINS)
    stored = maps.to_json()
    assert (stored["num_tokens"], stored["top_k"], stored["edges"]) == (NUM_TOKENS, 5, list(maps.edges))
    assert [token for part in stored["beginnings"] for token in part] == document.tolist()
    for each, layer in zip(maps.layers, stored["layers"], strict=True):
        assert layer["layer"] == each.layer
        for name, values in (("attention", each.attention_BB), ("selected", each.selected_BB)):
            assert [len(row) for row in layer[name]] == list(range(1, NUM_BINS + 1))
            for place, row in enumerate(layer[name]):
                np.testing.assert_allclose(row, values[place, : place + 1], atol=5.1e-5)


def test_memory_does_not_grow_with_the_square_of_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor is made that is larger than a tile: what is allocated at once is a small part of [T, T]."""
    dense = with_indexers(build_decoder("gqa", torch.float32), DSA, torch.Generator().manual_seed(1))
    monkeypatch.setattr(dsa_tiled, "TILE_ELEMENTS", 1 << 14)
    long = np.zeros(900, dtype=np.int32)
    with torch.profiler.profile(profile_memory=True) as profile:
        maps: SelectionMaps = selection_maps(dense, long)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < 900**2, "a byte for each pair"
    assert maps.layers[0].recall > 0.0


def test_a_model_without_indexers_is_refused(document: np.ndarray) -> None:
    with pytest.raises(ValueError, match="has no indexers"):
        selection_maps(build_decoder("gqa"), document)
