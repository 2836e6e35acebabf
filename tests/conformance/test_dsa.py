"""The golden vectors are what the twins make of them, and this library and `transformers` pass them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rorqual.models.config import DSAConfig, RopeConfig
from rorqual.models.indexer import Indexer
from rorqual.models.rope import Rope
from rorqual.ops import dsa, dsa_tiled
from tests.conformance.generate import CASES, FOLDER, text_of, visible


def load(name: str) -> dict[str, Any]:
    case: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return case


def tensor(values: Any) -> Tensor:
    """Null, which stands for what is not visible, as NaN."""

    def numbers(value: Any) -> Any:
        return [numbers(each) for each in value] if isinstance(value, list) else math.nan if value is None else value

    return torch.tensor(numbers(values), dtype=torch.float32)


def leaves(value: Any, place: str = "") -> dict[str, Any]:
    """Every number, text and null of nested tables and lists, by its place."""
    if not isinstance(value, dict | list):
        return {place: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {name: leaf for key, each in items for name, leaf in leaves(each, f"{place}.{key}").items()}


def names(kind: str) -> list[str]:
    return [name for name in CASES if name.startswith(kind)]


def sets(selected_TS: Tensor) -> list[list[int]]:
    return [sorted(key for key in row if key >= 0) for row in selected_TS.tolist()]


@pytest.mark.parametrize("name", CASES)
def test_the_files_are_what_the_twins_make(name: str) -> None:
    """Numbers to nine digits: the last ones are the machine's."""
    committed, made = leaves(load(name)), leaves(json.loads(text_of(CASES[name]())))
    assert committed.keys() == made.keys()
    for place, value in committed.items():
        expected = pytest.approx(made[place], rel=1e-9, abs=1e-11) if isinstance(value, float) else made[place]
        assert value == expected, place


def test_every_file_has_a_case() -> None:
    assert {path.stem for path in Path(FOLDER).glob("*")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_would_be_seen(name: str) -> None:
    case = load(name)
    assert bool(case["selected_by_mistake"]) == (case["kind"] == "indexer" or name == "scores_plateau")
    for mistake, selected in case["selected_by_mistake"].items():
        assert selected != case["expected"]["selected"], mistake
        assert [len(row) for row in selected] == [len(row) for row in case["expected"]["selected"]] or (
            mistake == "documents not kept apart"
        )


@pytest.mark.parametrize("name", names("indexer"))
def test_the_indexer_passes(name: str) -> None:
    case = load(name)
    settings, inputs, expected = case["settings"], case["inputs"], case["expected"]
    config = DSAConfig(
        **{key: settings[key] for key in ("top_k", "num_heads", "head_dim", "rope_dim", "interleaved", "hadamard")}
    )
    indexer = Indexer(config, hidden_size=12, query_size=8)
    weights = {"wq_b.weight": "wq_b", "wk.weight": "wk", "weights_proj.weight": "weights_proj"}
    weights |= {each: each for each in ("k_norm.weight", "k_norm.bias")}
    indexer.load_state_dict({ours: tensor(inputs[theirs]) for ours, theirs in weights.items()})
    lengths = settings["document_lengths"]
    positions = torch.cat([torch.arange(length) for length in lengths])
    rope = Rope(RopeConfig(theta=settings["rope_theta"], interleaved=config.interleaved), config.rope_dim)
    with torch.no_grad():
        q, k, weight = indexer(tensor(inputs["x"]), tensor(inputs["query_input"]), rope(positions, torch.float32))
    torch.testing.assert_close(weight, tensor(expected["weights"]), rtol=1e-5, atol=1e-6)
    scores_TT = dsa.index_scores(q[None], k[None], weight[None])[0]
    seen_TT = visible(lengths)
    torch.testing.assert_close(scores_TT[seen_TT], tensor(expected["scores"])[seen_TT], rtol=1e-4, atol=1e-5)
    assert sets(dsa.select(scores_TT[None], seen_TT[None], config.top_k)[0]) == expected["selected"]


@pytest.mark.parametrize("name", names("scores"))
def test_scores_and_selections_pass(name: str) -> None:
    case = load(name)
    expected, top_k = case["expected"], case["settings"]["top_k"]
    q_TIC, k_TC, weight_TI = (tensor(case["inputs"][each]) for each in ("q", "k", "weights"))
    if case["settings"]["fp8"]:
        for side, values in (("q", q_TIC), ("k", k_TC)):
            assert torch.equal(dsa.fp8_round(values), tensor(expected[f"{side}_rounded"])), "bit for bit"
            assert torch.equal(dsa.fp8_quantize(values)[1], tensor(expected[f"{side}_scale"]))
        q_TIC, k_TC = dsa.fp8_round(q_TIC), dsa.fp8_round(k_TC)
    index = dsa.IndexerOutput(q_TIC[None], k_TC[None], weight_TI[None])
    last_1T = torch.arange(len(k_TC))[None]
    assert sets(dsa_tiled.select_keys(index, last_1T, None, top_k)[0]) == expected["selected"]
    seen_TT = visible([len(k_TC)])
    found_TT = dsa.index_scores(*index)[0]
    torch.testing.assert_close(found_TT[seen_TT], tensor(expected["scores"])[seen_TT], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", names("attention"))
def test_attention_and_the_indexers_loss_pass(name: str) -> None:
    case = load(name)
    expected, scale = case["expected"], case["settings"]["scale"]
    q, k, v, scores = (tensor(case["inputs"][each])[None] for each in ("q", "k", "v", "scores"))
    num_tokens = q.shape[1]
    last_1T = torch.arange(num_tokens)[None]
    sparse = dsa.select(scores, dsa.visible_keys(last_1T, num_tokens), case["settings"]["top_k"])
    everything = dsa_tiled.select_all(last_1T, num_tokens, None)
    assert sets(sparse[0]) == expected["selected"]
    for selected, output, stage in ((sparse, "output", "sparse"), (everything, "dense_output", "warmup")):
        found = dsa_tiled.sparse_attention(q, k, v, selected, scale)[0]
        torch.testing.assert_close(found, tensor(expected[output]), rtol=1e-5, atol=1e-5)
        kl, uniform = dsa.indexer_kl(q, k, scale, scores, selected)
        torch.testing.assert_close(kl[0], tensor(expected[f"{stage}_kl"]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(uniform[0], tensor(expected[f"{stage}_kl_of_uniform"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "model"), [("indexer_v32", "deepseek_v32"), ("indexer_glm", "glm_moe_dsa")])
def test_transformers_passes(name: str, model: str) -> None:
    """How another project uses the files."""
    transformers = pytest.importorskip("transformers")
    case = load(name)
    settings, inputs, length = case["settings"], case["inputs"], case["settings"]["document_lengths"][0]
    config = transformers.AutoConfig.for_model(
        model,
        hidden_size=12,
        q_lora_rank=8,
        qk_rope_head_dim=settings["rope_dim"],
        index_n_heads=settings["num_heads"],
        index_head_dim=settings["head_dim"],
        index_topk=settings["top_k"],
        rope_parameters={"rope_type": "default", "rope_theta": settings["rope_theta"]},
    )
    parent = transformers.AutoModel._model_mapping[type(config)]
    module = __import__(parent.__module__, fromlist=["x"])
    prefix = parent.__name__.removesuffix("Model")
    indexer = getattr(module, f"{prefix}Indexer")(config, 0)
    state = {"wq_b.weight": "wq_b", "wk.weight": "wk", "weights_proj.weight": "weights_proj"}
    state |= {each: each for each in ("k_norm.weight", "k_norm.bias")}
    indexer.load_state_dict({theirs: tensor(inputs[ours]) for theirs, ours in state.items()})
    x, query = tensor(inputs["x"])[None], tensor(inputs["query_input"])[None]
    positions = torch.arange(length)[None]
    cos_sin = getattr(module, f"{prefix}RotaryEmbedding")(config)(x, positions)
    mask = visible([length])[None]
    chosen = indexer(x, query, cos_sin, mask, positions)[0]
    found = [sorted(key for key in row if key <= query) for query, row in enumerate(chosen.tolist())]
    assert found == case["expected"]["selected"]
