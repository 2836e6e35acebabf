"""Keep routing and keep sampling mask: what the engine drew has importance ratio 1 in the trainer, before any update.

Both sides run the same float32 mixture-of-experts weights. Between sampling and training the routers' selection bias
moves as it does while experts are balanced: that changes which experts are chosen and nothing
else, so it stands for every cause of other routes.
"""

from __future__ import annotations

from array import array

import msgspec
import pytest
import torch

from rorqual.engines.local import EngineConfig, LocalEngine
from rorqual.models.config import DSAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig
from rorqual.models.decoder import Decoder
from rorqual.models.moe import Router
from rorqual.records import GenerateRequest, SamplingParams, TrainSample
from rorqual.train.data import PackedBatch, pack_samples
from rorqual.train.indexer import INDEXER
from rorqual.train.step import compute_logprobs

VOCABULARY = 60


def moe_model(sparse: bool = False) -> Decoder:
    """With `sparse`, its attention selects 6 keys."""
    config = ModelConfig(
        family="deepseek_v32" if sparse else "deepseek_v3",
        attention="dsa" if sparse else "dense",
        dsa=DSAConfig(top_k=6, num_heads=2, head_dim=8, rope_dim=8) if sparse else None,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_layers=3,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        context_window=64,
        initializer_range=0.3,
        rope=RopeConfig(interleaved=True),
        mla=MLAConfig(kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
        moe=MoEConfig(
            num_experts=8, experts_per_token=2, expert_intermediate_size=32, num_shared_experts=1, dense_layers=(0,)
        ),
    )
    model = Decoder(config)
    model.initialize(torch.Generator().manual_seed(0))
    return model


def sampled(model: Decoder, temperature: float) -> list[TrainSample]:
    """Four groups of four, drawn at top-p 0.9."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(4, VOCABULARY, (length,), generator=generator).tolist() for length in (3, 9, 9, 17)]
    requests = [
        GenerateRequest(
            request_id=f"{group}.{member}",
            prompt_ids=array("i", prompt),
            params=SamplingParams(temperature=temperature, top_p=0.9, max_new_tokens=20, seed=10 * group + member),
        )
        for group, prompt in enumerate(prompts)
        for member in range(4)
    ]
    completions = LocalEngine(model, EngineConfig(num_slots=6, record_selections=True)).generate(requests)
    return [
        TrainSample(
            sample_id=request.request_id,
            group_id=request.request_id.partition(".")[0],
            domain="mathematics",
            token_ids=request.prompt_ids + completion.token_ids,
            sampled=array("b", [0] * len(request.prompt_ids) + [1] * len(completion.token_ids)),
            behaviour_logprobs=array("f", [0.0] * len(request.prompt_ids)) + completion.logprobs,
            prompt_length=len(request.prompt_ids),
            advantage=1.0,
            weight_version=0,
            kept=completion.kept,
            routes=completion.routes,
            selections=completion.selections,
        )
        for request, completion in zip(requests, completions, strict=True)
    ]


def largest_log_ratio(model: Decoder, batches: list[PackedBatch], temperature: float) -> float:
    differences = [
        (logprobs_N - batch.behaviour_N).abs().max()
        for logprobs_N, batch in zip(compute_logprobs(model, batches, temperature), batches, strict=True)
        if batch.behaviour_N is not None
    ]
    return float(torch.stack(differences).max())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("share_prefix", [True, False])
def test_the_ratio_is_one_with_replay_and_only_with_it(temperature: float, share_prefix: bool) -> None:
    model = moe_model()
    samples = sampled(model, temperature)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Router) and module.e_score_correction_bias is not None:
                module.e_score_correction_bias += 0.2 * torch.tensor([1.0, -1.0] * 4)

    def log_ratio(keep_routing: bool, keep_sampling_mask: bool) -> float:
        batches = pack_samples(
            samples, 100, share_prefix=share_prefix, keep_routing=keep_routing, keep_sampling_mask=keep_sampling_mask
        )
        return largest_log_ratio(model, batches, temperature)

    assert log_ratio(keep_routing=True, keep_sampling_mask=True) < 2e-5
    assert log_ratio(keep_routing=True, keep_sampling_mask=False) > 0.02
    assert log_ratio(keep_routing=False, keep_sampling_mask=True) > 0.02


@pytest.mark.parametrize("share_prefix", [True, False])
def test_selections_are_replayed_too(share_prefix: bool) -> None:
    """The indexers change between sampling and training, and nothing else does. A sample of which nothing was recorded
    selects anew beside those that replay."""
    model = moe_model(sparse=True)
    samples = sampled(model, 1.0)
    assert all(
        sample.selections is not None and len(sample.selections) == len(sample.token_ids) - 1 for sample in samples
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if INDEXER in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def log_ratio(chosen: list[TrainSample]) -> float:
        return largest_log_ratio(model, pack_samples(chosen, 100, share_prefix=share_prefix), 1.0)

    assert log_ratio(samples) < 2e-5
    forgotten = [msgspec.structs.replace(sample, selections=None) for sample in samples]
    assert log_ratio(forgotten) > 0.02
    mixed = [*samples[:8], *forgotten[8:]]
    (batch,) = pack_samples(mixed, 10_000, share_prefix=share_prefix)
    assert batch.selections_TLS is not None and (batch.selections_TLS[:, 0, 0] == -1).any()
    (logprobs_N,) = compute_logprobs(model, [batch])
    assert batch.behaviour_N is not None
    by_sample = [
        float((logprobs_N - batch.behaviour_N)[batch.sequence_index_N == index].abs().max()) for index in range(16)
    ]
    recorded = [batch.sample_ids[index] in {sample.sample_id for sample in samples[:8]} for index in range(16)]
    assert max(value for value, kept in zip(by_sample, recorded, strict=True) if kept) < 2e-5
    assert max(value for value, kept in zip(by_sample, recorded, strict=True) if not kept) > 0.02
