"""Random tiny models of `transformers`, and the same models read by this library."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from torch import Tensor

from rorqual.models.checkpoints import load_checkpoint
from rorqual.models.config import DSAConfig, MLAConfig, ModelConfig, MoEConfig, NSAConfig, RopeConfig
from rorqual.models.decoder import Decoder

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "deepseek_v3", "deepseek_v32", "glm_moe_dsa")
VOCABULARY = 61


def rope_options(rng: random.Random) -> dict[str, Any]:
    """A rotary description in the old form; lengths are short, so that scaling acts within a few dozen positions."""
    original = rng.choice([8, 16, 24])
    yarn = {"rope_type": "yarn", "factor": rng.choice([2.0, 4.0, 8.0]), "original_max_position_embeddings": original}
    scaling = rng.choice(
        [
            None,
            {"rope_type": "linear", "factor": rng.choice([2.0, 3.5])},
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            },
            yarn,
            {**yarn, "attention_factor": 1.3, "truncate": False},
            {**yarn, "mscale": 0.7, "mscale_all_dim": 0.9, "beta_fast": 4.0, "beta_slow": 0.5},
            {**yarn, "mscale": 1.0, "mscale_all_dim": 1.0},
        ]
    )
    return {"rope_theta": rng.choice([100.0, 10_000.0]), **({"rope_scaling": scaling} if scaling else {})}


def common_options(rng: random.Random) -> dict[str, Any]:
    heads = rng.choice([1, 2, 4, 6])
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": heads * rng.choice([6, 8, 10]),
        "intermediate_size": rng.choice([24, 40]),
        "num_hidden_layers": rng.choice([2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([kv for kv in range(1, heads + 1) if heads % kv == 0]),
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": None,
        "rms_norm_eps": rng.choice([1e-6, 1e-3]),
        "tie_word_embeddings": rng.random() < 0.5,
        **rope_options(rng),
    }


def dense_options(rng: random.Random, family: str) -> dict[str, Any]:
    options = common_options(rng)
    if family == "qwen3" or rng.random() < 0.5:
        options["head_dim"] = rng.choice([4, 10, 16])
    if family == "llama":
        options["mlp_bias"] = rng.random() < 0.5
    if family != "qwen2":
        options["attention_bias"] = rng.random() < 0.5
    return options


def qwen3_moe_options(rng: random.Random) -> dict[str, Any]:
    experts = rng.choice([3, 6, 8])
    return {
        **dense_options(rng, "qwen3"),
        "num_experts": experts,
        "num_experts_per_tok": rng.randint(1, experts),
        "moe_intermediate_size": rng.choice([6, 20]),
        "norm_topk_prob": rng.random() < 0.5,
        "decoder_sparse_step": rng.choice([1, 1, 2]),
        "mlp_only_layers": rng.choice([[], [0], [1]]),
    }


def deepseek_v3_options(rng: random.Random) -> dict[str, Any]:
    options = common_options(rng)
    groups, group_size = rng.choice([1, 2, 4]), rng.choice([2, 3])
    kept = rng.randint(1, groups)
    return {
        **options,
        "num_key_value_heads": options["num_attention_heads"],
        "attention_bias": rng.random() < 0.5,
        "q_lora_rank": rng.choice([None, 12]),
        "kv_lora_rank": rng.choice([8, 14]),
        "qk_rope_head_dim": rng.choice([2, 4, 8]),
        "qk_nope_head_dim": rng.choice([5, 8]),
        "v_head_dim": rng.choice([4, 7]),
        "n_routed_experts": groups * group_size,
        "n_group": groups,
        "topk_group": kept,
        "num_experts_per_tok": rng.randint(1, kept * group_size),
        "n_shared_experts": rng.choice([1, 2]),
        "moe_intermediate_size": rng.choice([6, 20]),
        "norm_topk_prob": rng.random() < 0.5,
        "routed_scaling_factor": rng.choice([1.0, 2.5]),
        "first_k_dense_replace": rng.choice([0, 1]),
        "rope_interleave": rng.random() < 0.7,
    }


def indexed_options(rng: random.Random, family: str) -> dict[str, Any]:
    """V3.2 and GLM-5. So many keys are selected that attention is dense: which ones of equal score `transformers` takes
    is not defined."""
    options = {**deepseek_v3_options(rng), "q_lora_rank": rng.choice([10, 12]), "index_topk": 64}
    del options["rope_interleave"]
    options["index_n_heads"] = rng.choice([1, 3, 4])
    options["index_head_dim"] = options["qk_rope_head_dim"] + rng.choice([0, 2, 8])
    if family == "glm_moe_dsa" and rng.random() < 0.7:
        layers = options["num_hidden_layers"]
        options["indexer_types"] = ["full", *(rng.choice(["full", "shared"]) for _ in range(layers - 1))]
    return options


def family_options(family: str, seed: int) -> dict[str, Any]:
    rng = random.Random(f"{family}/{seed}")
    if family == "qwen3_moe":
        return qwen3_moe_options(rng)
    if family in ("deepseek_v32", "glm_moe_dsa"):
        return indexed_options(rng, family)
    return deepseek_v3_options(rng) if family == "deepseek_v3" else dense_options(rng, family)


def random_reference(family: str, seed: int, **changes: Any) -> Any:
    """A `transformers` model with weights so large that no part of it can be wrong unseen."""
    options = {**family_options(family, seed), **changes}
    config = transformers.AutoConfig.for_model(family, **options)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2, generator=generator)
    return model


@dataclass(frozen=True)
class Pair:
    """One model twice, and the directory that the reference was saved to."""

    reference: Any
    decoder: Decoder
    directory: Path

    @torch.no_grad()
    def reference_logits(self, token_ids_T: Tensor) -> Tensor:
        return self.reference(token_ids_T[None]).logits[0]


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Pair]:
    """`pair(family, seed)`: a random reference and what `load_checkpoint` makes of it."""
    made: dict[tuple[str, int], Pair] = {}

    def make(family: str, seed: int) -> Pair:
        if (family, seed) not in made:
            directory = tmp_path_factory.mktemp(f"{family}-{seed}")
            reference = random_reference(family, seed)
            reference.save_pretrained(directory)
            made[family, seed] = Pair(reference, load_checkpoint(directory), directory)
        return made[family, seed]

    return make


@pytest.fixture(scope="session")
def reference_model() -> Callable[..., Any]:
    return random_reference


@pytest.fixture(scope="session")
def reference_options() -> Callable[[str, int], dict[str, Any]]:
    return family_options


def tiny_config(kind: str = "mla", **changes: Any) -> ModelConfig:
    """Small models by hand: "gqa" is dense, "mla" has experts in groups, "softmax" is Qwen's mixture; "gqa+dsa" and
    "mla+dsa" select 5 keys, and the last layer of the latter shares the selection of the one below; "gqa+nsa" reads two
    of its blocks of 4 tokens, compresses 6 tokens every 2, and has a window of 3."""
    kind, _, sparse = kind.partition("+")
    families = {"gqa": "qwen3", "mla": "glm_moe_dsa" if sparse else "deepseek_v3", "softmax": "qwen3_moe"}
    fields: dict[str, Any] = {
        "family": families[kind],
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 4 if kind == "mla" else 2,
        "head_dim": 10,
        "context_window": 64,
        "qk_norm": kind != "mla",
        "initializer_range": 0.3,
    }
    if kind == "mla":
        fields["mla"] = MLAConfig(q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
        fields["moe"] = MoEConfig(
            num_experts=8,
            experts_per_token=3,
            expert_intermediate_size=12,
            num_shared_experts=1,
            num_groups=4,
            groups_per_token=2,
            routed_scaling=1.7,
            dense_layers=(0,),
        )
    if sparse == "nsa":
        fields["attention"], fields["family"] = "nsa", "qwen3"
        fields["nsa"] = NSAConfig(
            block_length=6,
            block_stride=2,
            selected_length=4,
            num_selected=2,
            num_initial=0,
            num_local=1,
            window=3,
            compressor_size=16,
        )
    elif sparse:
        shared = (2,) if kind == "mla" else ()
        fields["attention"] = "dsa"
        fields["rope"] = RopeConfig(interleaved=kind == "mla")
        fields["dsa"] = DSAConfig(top_k=5, num_heads=3, head_dim=8, rope_dim=4, shared_layers=shared)
    if kind == "softmax":
        fields["moe"] = MoEConfig(num_experts=6, experts_per_token=2, expert_intermediate_size=12, scoring="softmax")
    return ModelConfig(**{**fields, **changes})


@pytest.fixture
def tiny_decoder() -> Callable[..., Decoder]:
    """`tiny_decoder("mla")`: a float64 model in evaluation mode; every bias and norm is away from its neutral value."""

    def make(kind: str = "mla", seed: int = 0, **changes: Any) -> Decoder:
        decoder = Decoder(tiny_config(kind, **changes)).double().eval()
        generator = torch.Generator().manual_seed(seed)
        decoder.initialize(generator)
        with torch.no_grad():
            for tensor in decoder.state_dict().values():
                if tensor.dim() == 1:
                    tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * 0.2)
        return decoder

    return make
