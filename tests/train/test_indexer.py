"""The two stages of sparse training as settings of the one step."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from rorqual.models.config import DSAConfig, MLAConfig
from rorqual.models.convert import with_attention, with_indexers
from rorqual.models.decoder import Decoder
from rorqual.models.layout import causal_layout
from rorqual.train.data import PackedBatch, pack_documents
from rorqual.train.indexer import INDEXER, IndexerLossConfig, train_indexers_only, with_indexer_loss
from rorqual.train.objectives import language_model_objective
from rorqual.train.optim import OptimizerConfig, build_optimizer
from rorqual.train.step import TrainingDiverged, train_step
from rorqual.train.text_loss import measure_held_out
from tests.train.fakes import VOCABULARY, build_decoder

KINDS = ("gqa", "mla_moe")
DSA = DSAConfig(top_k=4, num_heads=2, head_dim=8, rope_dim=4)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, max_grad_norm=1e9, weight_decay=0.0)


def indexed(kind: str) -> Decoder:
    return with_indexers(build_decoder(kind), DSA, torch.Generator().manual_seed(1))


def documents(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in (12, 30, 7, 21, 18)]


def batches(token_budget: int = 1000, config: IndexerLossConfig | None = None) -> list[PackedBatch]:
    return with_indexer_loss(pack_documents(documents(), token_budget), config or IndexerLossConfig())


def snapshot(model: Decoder) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def moved(model: Decoder, before: dict[str, Tensor]) -> set[str]:
    return {name for name, each in model.named_parameters() if not torch.equal(each, before[name])}


# ---------------------------------------------------------------------------------------------------------- conversion


@pytest.mark.parametrize("kind", KINDS)
def test_added_indexers_change_nothing_yet(kind: str) -> None:
    dense = build_decoder(kind).eval()
    model = with_indexers(dense, DSA, torch.Generator().manual_seed(1))
    assert model.config.family == {"gqa": "qwen3", "mla_moe": "deepseek_v32"}[kind]
    ids, layout = torch.tensor(documents()[1]), causal_layout([30])
    assert torch.equal(model(ids, layout).hidden, dense(ids, layout).hidden)
    assert model.layers[0].self_attn.o_proj.weight.data_ptr() == dense.layers[0].self_attn.o_proj.weight.data_ptr()
    sparse = with_attention(model, "dsa")
    assert not torch.equal(sparse(ids, layout).hidden, dense(ids, layout).hidden)
    assert torch.equal(with_attention(sparse, "dense")(ids, layout).hidden, dense(ids, layout).hidden)
    assert {id(each) for each in sparse.parameters()} == {id(each) for each in model.parameters()}
    assert torch.equal(sparse.rope.inverse_frequency, dense.rope.inverse_frequency)


def test_conversions_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="has indexers already"):
        with_indexers(indexed("gqa"), DSA, torch.Generator())
    with pytest.raises(ValueError, match=r"rope_dim = 2, and the latent attention turns 4 dimensions"):
        other = msgspec.structs.replace(DSA, rope_dim=2)
        with_indexers(build_decoder("mla_moe"), other, torch.Generator())
    with pytest.raises(ValueError, match='"dsa" needs ModelConfig.dsa'):
        with_attention(build_decoder("gqa"), "dsa")
    with pytest.raises(ValueError, match="Invalid enum value 'sideways'"):
        with_attention(indexed("gqa"), "sideways")
    assert isinstance(build_decoder("mla_moe").config.mla, MLAConfig)


# ------------------------------------------------------------------------------------------------------------- warm-up


@pytest.mark.parametrize("kind", KINDS)
def test_the_warm_up_moves_the_indexers_alone_and_they_learn(kind: str) -> None:
    model = indexed(kind)
    train_indexers_only(model)
    optimizer, before = build_optimizer(model, OPTIMIZER), snapshot(model)
    stats = [train_step(model, optimizer, batches(), None, OPTIMIZER, step) for step in range(60)]
    indexers = {name for name in before if INDEXER in name}
    assert moved(model, before) == indexers
    first, last = stats[0].diagnostics.metrics(), stats[-1].diagnostics.metrics()
    assert last["indexer/kl"] < 0.5 * first["indexer/kl"]
    assert first["indexer/uniform"] == pytest.approx(last["indexer/uniform"], rel=1e-9), "the target stands still"
    layers = [first[f"indexer/kl/{layer}"] for layer in range(3)]
    assert stats[0].loss == pytest.approx(sum(layers), rel=1e-6)
    assert first["indexer/kl"] == pytest.approx(sum(layers) / 3, rel=1e-6)


def test_the_warm_up_wants_dense_attention() -> None:
    for model in (build_decoder("gqa"), with_attention(indexed("gqa"), "dsa")):
        with pytest.raises(ValueError, match="model with indexers and dense attention"):
            train_indexers_only(model)


@pytest.mark.parametrize("reduction", ("mean", "sum"))
def test_gradients_do_not_depend_on_micro_batches(reduction: str) -> None:
    gradients = []
    for budget in (1000, 25):
        model = indexed("mla_moe")
        config = msgspec.convert({"weight": 0.3, "reduction": reduction}, IndexerLossConfig)
        parts = batches(budget, config)
        assert (len(parts) > 1) == (budget == 25)
        model.train()
        for batch in parts:
            output = model(batch.token_ids_T, batch.layout, indexer_weight_T=batch.indexer_weight_T)
            sum(loss.total for loss in output.indexer_losses).backward()
        gradients.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-6, atol=1e-9)


# -------------------------------------------------------------------------------------------------------- sparse stage


@pytest.mark.parametrize("kind", KINDS)
def test_the_sparse_stage_trains_each_part_by_its_own_loss(kind: str) -> None:
    """The same move of the model as without the indexers' loss, and of the indexers as without the other; also where
    one gradient is clipped."""
    ends = []
    for with_lm, with_kl in ((True, True), (True, False), (False, True)):
        model = with_attention(indexed(kind), "dsa")
        config = msgspec.structs.replace(OPTIMIZER, max_grad_norm=0.05)
        packed = batches() if with_kl else pack_documents(documents(), 1000)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        objective = language_model_objective(packed) if with_lm else None
        stats = train_step(model, optimizer, packed, objective, config, 0)
        assert math.isfinite(stats.loss)
        ends.append(snapshot(model))
    both, lm_only, kl_only = ends
    start = snapshot(with_attention(indexed(kind), "dsa"))
    for name in both:
        expected = kl_only if INDEXER in name else lm_only
        other = lm_only if INDEXER in name else kl_only
        assert torch.equal(both[name], expected[name]), name
        assert torch.equal(other[name], start[name]), name


def test_a_step_without_any_loss_is_refused() -> None:
    model = indexed("gqa")
    with pytest.raises(ValueError, match="nothing would be trained"):
        train_step(model, build_optimizer(model, OPTIMIZER), pack_documents(documents(), 1000), None, OPTIMIZER, 0)
    with pytest.raises(ValueError, match=r"weight = 0.0; expected more than 0"):
        IndexerLossConfig(weight=0.0)


def test_a_diverged_indexer_is_named() -> None:
    model = indexed("gqa")
    with torch.no_grad():
        model.layers[1].self_attn.indexer.wk.weight.fill_(math.nan)
    with pytest.raises(TrainingDiverged, match=r"The loss is nan in step 3, micro-batch 0, in the indexers' loss"):
        train_step(model, build_optimizer(model, OPTIMIZER), batches(), None, OPTIMIZER, 3)


def test_held_out_figures_count_the_tokens_that_see_more_than_is_selected() -> None:
    """A sequence no longer than the selection adds its cross-entropy, and nothing to the indexers' figures."""
    model = indexed("gqa")
    short, long = [5, 6, 7, 8], documents()[1]
    alone, both = (measure_held_out(model, [np.array(each) for each in part], 100) for part in ([long], [long, short]))
    assert both.num_targets == alone.num_targets + 3 and both.cross_entropy != alone.cross_entropy
    for name in ("kl", "uniform", "recall"):
        assert getattr(both, name) == pytest.approx(getattr(alone, name), rel=1e-5)
    ids = torch.tensor(long[:-1])
    losses = model(ids, causal_layout([len(ids)]), indexer_weight_T=torch.zeros(len(ids))).indexer_losses
    assert alone.kl[0] == pytest.approx(float(losses[0].kl_T[DSA.top_k :].mean()), rel=1e-5)
