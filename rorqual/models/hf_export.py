"""ModelConfig as a Hugging Face `config.json`, checked by reading it back."""

from __future__ import annotations

from typing import Any

import msgspec

from rorqual.models.config import DSAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig
from rorqual.models.hf import (
    ALWAYS_INDEXED,
    ARCHITECTURES,
    BLOCKWISE_PREFIX,
    INDEXED_PREFIX,
    ROPE_FIELDS,
    Raw,
    from_hf_config,
)


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` that `transformers` 4.57 and later read as the same model.

    `balance_rate` has no place there and is left out.
    Raises: ValueError naming the fields that the family cannot express.
    """
    raw: dict[str, Any] = {
        **_names(config),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_window,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_to_hf(config.rope),
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": config.initializer_range,
        "use_cache": True,
    }
    if config.family != "qwen2":
        raw["attention_bias"] = config.qkv_bias
    if config.family == "llama":
        raw["mlp_bias"] = config.mlp_bias
    raw.update(_mla_to_hf(config, config.mla) if config.mla else {})
    raw.update(_moe_to_hf(config, config.moe) if config.moe else {})
    raw.update(_indexer_to_hf(config, config.dsa) if config.dsa else {})
    raw.update({"nsa": msgspec.structs.asdict(config.nsa)} if config.nsa else {})
    _check_expressible(config, raw)
    return raw


def _names(config: ModelConfig) -> dict[str, Any]:
    (name,) = [name for name, family in ARCHITECTURES.items() if family == config.family]
    if config.nsa is not None:
        return {"architectures": [BLOCKWISE_PREFIX + name], "model_type": f"nsa_{config.family}"}
    if config.dsa is None or config.family in ALWAYS_INDEXED:
        return {"architectures": [name], "model_type": config.family}
    return {"architectures": [INDEXED_PREFIX + name], "model_type": f"dsa_{config.family}"}


def _indexer_to_hf(config: ModelConfig, dsa: DSAConfig) -> dict[str, Any]:
    """Under DeepSeek's and GLM's names; what they leave unsaid only where it is not what they mean."""
    raw: dict[str, Any] = {
        "index_topk": dsa.top_k,
        "index_n_heads": dsa.num_heads,
        "index_head_dim": dsa.head_dim,
        "indexer_rope_interleave": dsa.interleaved,
    }
    if config.family == "glm_moe_dsa":
        types = ["shared" if layer in dsa.shared_layers else "full" for layer in range(config.num_layers)]
        raw["indexer_types"] = types
    own = {
        "index_attention": (config.attention, "dsa"),
        "index_rope_dim": (dsa.rope_dim, config.mla.qk_rope_head_dim if config.mla else 0),
        "index_hadamard": (dsa.hadamard, False),
        "index_fp8": (dsa.fp8, False),
        "index_k_norm_eps": (dsa.k_norm_eps, 1e-6),
    }
    return raw | {name: value for name, (value, understood) in own.items() if value != understood}


def _rope_to_hf(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.scaling == "none":
        return None
    fields = {name: getattr(rope, name) for name in ROPE_FIELDS[rope.scaling]}
    return {"rope_type": rope.scaling, **{name: value for name, value in fields.items() if value is not None}}


def _mla_to_hf(config: ModelConfig, mla: MLAConfig) -> dict[str, Any]:
    told = {} if config.family in ALWAYS_INDEXED else {"rope_interleave": config.rope.interleaved}
    return {
        **msgspec.structs.asdict(mla),
        "num_key_value_heads": config.num_heads,
        "head_dim": mla.qk_rope_head_dim,
        "num_nextn_predict_layers": 0,
        **told,
    }


def _moe_to_hf(config: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    shared = {
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.expert_intermediate_size,
        "norm_topk_prob": moe.normalize_weights,
    }
    if config.family == "qwen3_moe":
        return {
            **shared,
            "num_experts": moe.num_experts,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(moe.dense_layers),
        }
    return {
        **shared,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "n_group": moe.num_groups,
        "topk_group": moe.groups_per_token,
        "routed_scaling_factor": moe.routed_scaling,
        "first_k_dense_replace": len(moe.dense_layers),
        "scoring_func": moe.scoring,
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
    }


def _check_expressible(config: ModelConfig, raw: Raw) -> None:
    """What was written, read again, must be the same model."""
    wanted, found = _canonical(config), _canonical(from_hf_config(raw))
    lost = [
        f"{name} = {getattr(wanted, name)!r} (reads back as {getattr(found, name)!r})"
        for name in wanted.__struct_fields__
        if getattr(wanted, name) != getattr(found, name)
    ]
    if lost:
        raise ValueError(f"A Hugging Face {config.family} checkpoint cannot express: {'; '.join(lost)}.")


def _canonical(config: ModelConfig) -> ModelConfig:
    """The same model with every field at its default that plays no part in it."""
    used = ("theta", "interleaved", "scaling", *ROPE_FIELDS[config.rope.scaling])
    changes: dict[str, Any] = {"rope": RopeConfig(**{name: getattr(config.rope, name) for name in used})}
    if config.mla is not None:
        changes.update(num_kv_heads=config.num_heads, head_dim=0)
    if config.moe is not None:
        default_rate = MoEConfig.__struct_defaults__[-1]
        changes["moe"] = msgspec.structs.replace(
            config.moe, balance_rate=default_rate, dense_layers=tuple(sorted(config.moe.dense_layers))
        )
    return msgspec.structs.replace(config, **changes)
