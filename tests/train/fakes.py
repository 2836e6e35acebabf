"""Tiny decoders and random train samples, in float64, for the tests of the training package."""

from __future__ import annotations

import random
from array import array

import torch
from msgspec.structs import replace

from rorqual.models.config import MLAConfig, ModelConfig, MoEConfig
from rorqual.models.decoder import Decoder
from rorqual.models.layout import causal_layout
from rorqual.records import KeptTokens, Routes, TrainSample

VOCABULARY = 40


def build_decoder(kind: str, dtype: torch.dtype = torch.float64) -> Decoder:
    """ "gqa": grouped queries, tied embeddings, dense. "mla_moe": latent attention, two layers of experts."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "context_window": 256,
        "initializer_range": 0.3,
    }
    if kind == "gqa":
        config = ModelConfig(family="qwen3", qk_norm=True, tie_embeddings=True, **sizes)
    else:
        mla = MLAConfig(q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4)
        moe = MoEConfig(
            num_experts=6, experts_per_token=2, expert_intermediate_size=8, num_shared_experts=1, dense_layers=(0,)
        )
        config = ModelConfig(family="deepseek_v3", mla=mla, moe=moe, **sizes)
    model = Decoder(config)
    model.initialize(torch.Generator().manual_seed(0))
    return model.to(dtype).train()


def random_samples(seed: int, num_groups: int = 3, with_kept: bool = False) -> list[TrainSample]:
    """Groups of 1 to 4 samples with one prompt a group; some samples have tool tokens between their sampled spans."""
    generator = random.Random(seed)
    samples = []
    for group in range(num_groups):
        prompt = [generator.randrange(VOCABULARY) for _ in range(generator.randint(1, 9))]
        for member in range(generator.randint(1, 4)):
            name = f"g{group}/{member}"
            samples.append(_random_sample(generator, name, f"g{group}", prompt, with_kept))
    return samples


def _random_sample(generator: random.Random, name: str, group: str, prompt: list[int], with_kept: bool) -> TrainSample:
    spans = [generator.randint(1, 8)]
    if generator.random() < 0.5:
        spans += [generator.randint(1, 4), generator.randint(1, 5)]
    sampled = [0] * len(prompt)
    for index, span in enumerate(spans):
        sampled += [1 - index % 2] * span
    ids = prompt + [generator.randrange(VOCABULARY) for _ in range(sum(spans))]
    return TrainSample(
        sample_id=name,
        group_id=group,
        domain=generator.choice(["mathematics", "writing"]),
        token_ids=array("i", ids),
        sampled=array("b", sampled),
        behaviour_logprobs=array("f", [-generator.uniform(1, 5) * mark for mark in sampled]),
        prompt_length=len(prompt),
        advantage=generator.uniform(-1, 1),
        weight_version=0,
        kept=_random_kept(generator, ids, sampled) if with_kept else None,
    )


def _random_kept(generator: random.Random, ids: list[int], sampled: list[int]) -> KeptTokens:
    offsets, kept = [0], []
    for token, mark in zip(ids, sampled, strict=True):
        if mark:
            kept += sorted({token, *generator.sample(range(VOCABULARY), generator.randint(1, 10))})
            offsets.append(len(kept))
    return KeptTokens(offsets=array("q", offsets), ids=array("i", kept))


@torch.no_grad()
def with_routes(model: Decoder, samples: list[TrainSample], shift: int = 0) -> list[TrainSample]:
    """Samples with the experts that the model chooses, or, with `shift`, with others: the same for equal prompts."""
    routed = []
    for sample in samples:
        layout = causal_layout([len(sample.token_ids) - 1])
        routes_TLK = model(torch.tensor(sample.token_ids[:-1].tolist()), layout).routes
        assert routes_TLK is not None and model.config.moe is not None
        experts = ((routes_TLK + shift) % model.config.moe.num_experts).flatten().tolist()
        routes = Routes(
            experts=array("h", experts), num_layers=routes_TLK.shape[1], experts_per_token=routes_TLK.shape[2]
        )
        routed.append(replace(sample, routes=routes))
    return routed
