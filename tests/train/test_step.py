"""The step against plain, unpacked loops in float64, and its gradients against every way of cutting up the batch."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rorqual.models.decoder import Decoder
from rorqual.models.layout import causal_layout
from rorqual.records import TrainSample
from rorqual.rl.diagnostics import Diagnostics
from rorqual.rl.losses import LossScale, PolicyTokens, policy_loss
from rorqual.rl.objective import ObjectiveConfig
from rorqual.train.data import PackedBatch, pack_documents, pack_samples
from rorqual.train.objectives import language_model_objective, loss_scale, policy_objective
from rorqual.train.optim import OptimizerConfig, build_optimizer
from rorqual.train.step import (
    TrainingDiverged,
    batch_logprobs,
    compute_logprobs,
    train_step,
    with_proximal,
    with_reference,
)
from tests.train.fakes import build_decoder, random_samples, with_routes

OBJECTIVE = ObjectiveConfig(
    kl_strength=0.02, kl_strength_by_domain={"writing": 0.1}, sequence_mask_delta=0.5, clip_low=2.0, clip_high=3.0
)
NO_CLIP = OptimizerConfig(learning_rate=0.1, max_grad_norm=1e9)


def full_logprobs(model: Decoder, sample: TrainSample, temperature: float = 1.0) -> Tensor:
    """Log-probs of the sampled tokens of one sample alone: full logits, full softmax, kept sets by masking."""
    routes = None
    if sample.routes is not None:
        shape = (-1, sample.routes.num_layers, sample.routes.experts_per_token)
        routes = torch.tensor(sample.routes.experts.tolist()).view(shape)
    ids = torch.tensor(sample.token_ids.tolist())
    hidden_TD = model(ids[:-1], causal_layout([len(ids) - 1]), routes).hidden
    logits_TV = hidden_TD @ model.unembedding_VD.T / temperature
    rows = []
    for index, at in enumerate(at for at, mark in enumerate(sample.sampled) if mark):
        logits_V = logits_TV[at - 1]
        if sample.kept is not None:
            kept = sample.kept.ids[sample.kept.offsets[index] : sample.kept.offsets[index + 1]]
            outside_V = torch.ones_like(logits_V, dtype=torch.bool)
            outside_V[kept.tolist()] = False
            logits_V = logits_V.masked_fill(outside_V, -torch.inf)
        rows.append(torch.log_softmax(logits_V, dim=0)[ids[at]])
    return torch.stack(rows)


def reference_gradients(
    model: Decoder, anchor: Decoder, samples: Sequence[TrainSample], temperature: float
) -> dict[str, Tensor]:
    """The policy gradient, one sample at a time and without packing."""
    scale = LossScale(len(samples), sum(sum(sample.sampled) for sample in samples))
    model.zero_grad()
    for sample in samples:
        current_N = full_logprobs(model, sample, temperature)
        behaviour = [lp for lp, mark in zip(sample.behaviour_logprobs, sample.sampled, strict=True) if mark]
        tokens = PolicyTokens(
            current_N=current_N,
            behaviour_N=torch.tensor(behaviour, dtype=torch.float64),
            sequence_index_N=torch.zeros(len(current_N), dtype=torch.int64),
            advantage_S=torch.tensor([sample.advantage], dtype=torch.float32).double(),
            kl_strength_S=torch.tensor([OBJECTIVE.kl_strength_for(sample.domain)], dtype=torch.float64),
            reference_N=full_logprobs(anchor, sample, temperature).detach(),
        )
        policy_loss(tokens, OBJECTIVE, scale)[0].backward()
    return take_gradients(model)


def take_gradients(model: Decoder) -> dict[str, Tensor]:
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


def packed_gradients(
    model: Decoder, anchor: Decoder, batches: Sequence[PackedBatch], temperature: float
) -> dict[str, Tensor]:
    batches = with_reference(batches, compute_logprobs(anchor, batches, temperature))
    objective = policy_objective(OBJECTIVE, loss_scale(batches))
    for batch in batches:
        objective(batch_logprobs(model, batch, temperature), batch)[0].backward()
    return take_gradients(model)


def two_models(kind: str) -> tuple[Decoder, Decoder]:
    """A policy, and an anchor that is near it."""
    model, anchor = build_decoder(kind), build_decoder(kind)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in anchor.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model, anchor


@pytest.mark.parametrize("with_kept", [False, True])
@pytest.mark.parametrize("kind", ["gqa", "mla_moe"])
def test_gradients_do_not_depend_on_packing(kind: str, with_kept: bool) -> None:
    model, anchor = two_models(kind)
    samples = random_samples(4, num_groups=4, with_kept=with_kept)
    if kind == "mla_moe":
        samples = with_routes(model, samples, shift=1)
    expected = reference_gradients(model, anchor, samples, temperature=0.8)
    assert set(expected) == {name for name, _ in model.named_parameters()}
    shuffled = random.Random(1).sample(samples, len(samples))
    for order, token_budget in ((samples, 10_000), (shuffled, 25), (samples, 60), (shuffled, 1)):
        for share_prefix in (True, False):
            batches = pack_samples(order, token_budget, share_prefix=share_prefix)
            actual = packed_gradients(model, anchor, batches, temperature=0.8)
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_forced_routes_decide_the_log_probs() -> None:
    model = build_decoder("mla_moe")
    plain = random_samples(4)
    chosen, other = with_routes(model, plain), with_routes(model, plain, shift=1)
    free_N, same_N, moved_N = (
        torch.cat(compute_logprobs(model, pack_samples(samples, 60))) for samples in (plain, chosen, other)
    )
    torch.testing.assert_close(free_N, same_N, rtol=0, atol=1e-12)
    assert float((free_N - moved_N).abs().max()) > 1e-3


def test_compute_logprobs_leaves_no_trace() -> None:
    model = build_decoder("mla_moe")
    batches = pack_samples(random_samples(4), 60)
    loads = [buffer.clone() for name, buffer in model.named_buffers() if "load" in name]
    logprobs = compute_logprobs(model, batches)
    assert [len(each) for each in logprobs] == [batch.num_targets for batch in batches]
    assert not any(each.requires_grad for each in logprobs)
    assert model.training
    assert all(
        torch.equal(a, b)
        for a, b in zip(loads, [b for name, b in model.named_buffers() if "load" in name], strict=True)
    )


def test_two_sgd_steps_on_documents_equal_a_plain_loop() -> None:
    generator = random.Random(2)
    steps = [[array("i", [generator.randrange(40) for _ in range(length)]) for length in (3, 17, 9)] for _ in range(2)]
    weights = [
        [array("f", [generator.choice([0.0, 0.5, 1.0]) for _ in doc[:-1]] + [1.0]) for doc in docs] for docs in steps
    ]
    model, plain = build_decoder("gqa"), build_decoder("gqa")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for step, (documents, each) in enumerate(zip(steps, weights, strict=True)):
        batches = pack_documents(documents, 18, weights=each)
        assert len(batches) == 2
        stats = train_step(model, optimizer, batches, language_model_objective(batches), NO_CLIP, step)
        loss = _plain_step(plain, documents, each)
        assert stats.loss == pytest.approx(loss, rel=1e-12)
        assert stats.diagnostics.metrics()["cross_entropy"] == pytest.approx(loss, rel=1e-12)
        assert (stats.num_tokens, stats.num_sequences) == (26, 3)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-10, atol=1e-12)


def _plain_step(model: Decoder, documents: list[array[int]], weights: list[array[float]]) -> float:
    model.zero_grad()
    total = model.embed_tokens.weight.new_zeros(())
    for document, weight in zip(documents, weights, strict=True):
        ids = torch.tensor(document.tolist())
        logits_TV = model(ids[:-1], causal_layout([len(ids) - 1])).hidden @ model.unembedding_VD.T
        losses_T = torch.nn.functional.cross_entropy(logits_TV, ids[1:], reduction="none")
        total = total + (losses_T * torch.tensor(weight.tolist(), dtype=torch.float64)[1:]).sum()
    loss = total / sum(sum(weight[1:]) for weight in weights)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= NO_CLIP.learning_rate * parameter.grad
    return float(loss.detach())


def test_gradients_are_clipped_by_their_global_norm() -> None:
    model, batches = build_decoder("gqa"), pack_documents([array("i", range(12))], 100)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = OptimizerConfig(learning_rate=1.0, max_grad_norm=0.01)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    stats = train_step(model, optimizer, batches, language_model_objective(batches), config, 0)
    moved = torch.cat([(tensor - before[name]).flatten() for name, tensor in model.state_dict().items()])
    assert stats.gradient_norm > 0.1
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)


def test_policy_training_raises_the_probability_of_what_was_rewarded() -> None:
    model = build_decoder("mla_moe", torch.float32)
    samples = with_routes(model, random_samples(4, num_groups=4))
    batches = pack_samples(samples, 60)
    config = OptimizerConfig(learning_rate=1e-3, weight_decay=0.0)
    optimizer = build_optimizer(model, config)
    before = compute_logprobs(model, batches)
    anchored = with_proximal(with_reference(batches, before), before)
    on_policy = [_on_policy(batch, logprobs) for batch, logprobs in zip(anchored, before, strict=True)]
    objective = policy_objective(ObjectiveConfig(kl_strength=0.001), loss_scale(batches))
    for step in range(3):
        stats = train_step(model, optimizer, on_policy, objective, config, step)
        if step == 0:
            metrics = stats.diagnostics.metrics()
            assert metrics["ratio/min"] == metrics["ratio/max"] == pytest.approx(1.0, abs=1e-5)
    after = compute_logprobs(model, batches)
    gain = sum(
        float((batch.advantage_S[batch.sequence_index_N] * (late - early)).sum())
        for batch, early, late in zip(batches, before, after, strict=True)
        if batch.advantage_S is not None
    )
    assert gain > 0.5


def _on_policy(batch: PackedBatch, logprobs_N: Tensor) -> PackedBatch:
    return replace(batch, behaviour_N=logprobs_N)


def test_expert_balancing_follows_the_config() -> None:
    for balance, moved in ((True, True), (False, False)):
        model = build_decoder("mla_moe")
        batches = pack_documents([array("i", range(30))], 100)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        config = OptimizerConfig(balance_experts=balance)
        train_step(model, optimizer, batches, language_model_objective(batches), config, 0)
        biases = [buffer for name, buffer in model.named_buffers() if "correction_bias" in name]
        assert any(bool(bias.any()) for bias in biases) == moved


def poisoned(where: int, batches: Sequence[PackedBatch], in_loss: bool) -> object:
    """An objective whose loss, or whose gradient alone, is not finite on one micro-batch."""

    def objective(current_N: Tensor, batch: PackedBatch) -> tuple[Tensor, Diagnostics]:
        nothing = Diagnostics({}, {}, {}, current_N.new_zeros(0))
        if batch is not batches[where]:
            return -current_N.mean(), nothing
        if in_loss:
            return current_N.sum() * float("nan"), nothing
        return (current_N - current_N.detach()).sum().sqrt(), nothing

    return objective


@pytest.mark.parametrize("in_loss", [True, False])
def test_divergence_names_the_batch_and_changes_nothing(in_loss: bool) -> None:
    model = build_decoder("gqa", torch.float32)
    config = OptimizerConfig()
    optimizer = build_optimizer(model, config)
    batches = pack_samples(random_samples(9, num_groups=4), 25)
    good = poisoned(-1, [*batches, None], in_loss)
    train_step(model, optimizer, batches, good, config, 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    with pytest.raises(TrainingDiverged, match="step 1, micro-batch 1; no weight was changed") as caught:
        train_step(model, optimizer, batches, poisoned(1, batches, in_loss), config, 1)
    assert any(name in str(caught.value) for name in batches[1].sample_ids)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(moments, optimizer.state.values(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    train_step(model, optimizer, batches, good, config, 1)


def test_refuses_an_empty_step_and_batches_without_what_the_objective_needs() -> None:
    model = build_decoder("gqa")
    config = OptimizerConfig()
    with pytest.raises(ValueError, match="step 4 has no micro-batch"):
        train_step(model, build_optimizer(model, config), [], poisoned(0, [], True), config, 4)
    batches = pack_documents([array("i", range(5))], 10)
    with pytest.raises(ValueError, match="use pack_samples"):
        policy_objective(OBJECTIVE, LossScale(1, 4))(compute_logprobs(model, batches)[0], batches[0])
    with pytest.raises(ValueError, match="add up to"):
        language_model_objective([])
