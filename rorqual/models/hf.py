"""Hugging Face `config.json` as a ModelConfig, for the families that the decoder supports.

Reads what `transformers` 4 and 5 write, and the hand-written files of DeepSeek and Moonshot. An option that would
change the logits and that the decoder does not have is refused by name; options of training alone are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from rorqual.models.config import Family, ModelConfig

CONFIG_NAME: Final = "config.json"

ARCHITECTURES: Final[dict[str, Family]] = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "DeepseekV32ForCausalLM": "deepseek_v32",
    "GlmMoeDsaForCausalLM": "glm_moe_dsa",
}

ALWAYS_INDEXED: Final[tuple[Family, ...]] = ("deepseek_v32", "glm_moe_dsa")
"""Families whose every layer selects its keys. Of the others, this library writes indexers under a name of its own."""

INDEXED_PREFIX: Final = "Dsa"
"""`DsaQwen3ForCausalLM` is Qwen3 with indexers, which no other library knows: better refused there than run dense."""

BLOCKWISE_PREFIX: Final = "Nsa"
"""`NsaQwen3ForCausalLM`, likewise, has native sparse attention; the sizes of its blocks stand under `nsa`."""

UNSUPPORTED: Final[dict[str, float | None]] = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": None,
    "partial_rotary_factor": 1.0,
    "no_rope_layers": None,
    "attention_chunk_size": None,
    "clip_qkv": None,
    "index_topk": None,
}
"""Options of relatives of these families, with the value that changes nothing; any other, but null, is refused."""

ROPE_FIELDS: Final[dict[str, tuple[str, ...]]] = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
        "truncate",
    ),
}
"""The fields of RopeConfig that each scaling reads; Hugging Face gives them the same names."""

Raw = Mapping[str, Any]


def read_model_config(directory: Path | str) -> ModelConfig:
    """ModelConfig of a Hugging Face checkpoint directory.

    Raises: ValueError naming the file and what in it is absent, malformed or unsupported.
    """
    raw = read_json(Path(directory) / CONFIG_NAME)
    try:
        return from_hf_config(raw)
    except ValueError as error:
        raise ValueError(f"{Path(directory) / CONFIG_NAME}: {error}") from error


def from_hf_config(raw: Raw) -> ModelConfig:
    """ModelConfig from the contents of a `config.json`.

    Raises: ValueError naming the architecture or option that is not supported, or the field that is absent or
    malformed.
    """
    try:
        family = _family(raw)
        _refuse_unsupported(raw, family)
        fields = {**_common(raw, family), **_FAMILY_FIELDS[family](raw, family), **_sparse(raw, family)}
    except (TypeError, AttributeError) as error:
        raise ValueError(f"a value is not of the type that its field has ({error}).") from error
    try:
        return msgspec.convert(fields, ModelConfig)
    except msgspec.ValidationError as error:
        raise ValueError(f"the sizes do not make a model: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises: ValueError naming the file when it is absent or is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; a Hugging Face checkpoint directory holds one.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Fetch it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, and a JSON object was expected.")
    return value


def _family(raw: Raw) -> Family:
    """The architecture decides; `model_type` speaks where it is absent."""
    known = ", ".join(f"{name} ({family})" for name, family in ARCHITECTURES.items())
    names = raw.get("architectures") or []
    if names:
        found = names[0]
        family = ARCHITECTURES.get(found.removeprefix(INDEXED_PREFIX).removeprefix(BLOCKWISE_PREFIX))
    else:
        found = raw.get("model_type")
        family = next((family for family in ARCHITECTURES.values() if family == found), None)
    if family is None:
        raise ValueError(f"architecture {found!r} is not supported. Supported: {known}.")
    return family


def _refuse_unsupported(raw: Raw, family: Family) -> None:
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(f"hidden_act = {activation!r} is not supported; expected 'silu'.")
    for name, neutral in UNSUPPORTED.items():
        if name == "index_topk" and _is_indexed(raw, family):
            continue
        if raw.get(name) not in (None, neutral):
            raise ValueError(f"{name} = {raw[name]!r} is not supported; the decoder has no such option.")
    if _slides(raw, family):
        raise ValueError(
            f"sliding_window = {raw.get('sliding_window')} is switched on, and sliding-window attention is not "
            "supported. Set use_sliding_window to false only where the model was trained so."
        )


def _slides(raw: Raw, family: Family) -> bool:
    layer_types = raw.get("layer_types")
    if layer_types is not None:
        return any(kind not in ("full_attention", "indexed_attention") for kind in layer_types)
    if family in ("llama", "deepseek_v3", *ALWAYS_INDEXED):
        return raw.get("sliding_window") is not None
    if not raw.get("use_sliding_window", False) or raw.get("sliding_window", 4096) is None:
        return False
    first_sliding = 0 if family == "qwen3_moe" else raw.get("max_window_layers", 28)
    return bool(first_sliding < _require(raw, "num_hidden_layers"))


def _require(raw: Raw, name: str) -> Any:
    if raw.get(name) is None:
        raise ValueError(f"{name} is absent; it is needed to build the model.")
    return raw[name]


def _present(raw: Raw, name: str) -> Any:
    """The value, null included."""
    if name not in raw:
        raise ValueError(f"{name} is absent; give it, or null to do without.")
    return raw[name]


def _or(raw: Raw, name: str, default: Any) -> Any:
    """The value, or the default of `transformers` where it is absent or null."""
    return default if raw.get(name) is None else raw[name]


def _common(raw: Raw, family: Family) -> dict[str, Any]:
    num_heads = _require(raw, "num_attention_heads")
    return {
        "family": family,
        "vocab_size": _require(raw, "vocab_size"),
        "hidden_size": _require(raw, "hidden_size"),
        "intermediate_size": _require(raw, "intermediate_size"),
        "num_layers": _require(raw, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": _or(raw, "num_key_value_heads", num_heads),
        "context_window": _require(raw, "max_position_embeddings"),
        "rms_norm_eps": _or(raw, "rms_norm_eps", 1e-6),
        "rope": _rope(raw),
        "tie_embeddings": _or(raw, "tie_word_embeddings", False),
        "initializer_range": _or(raw, "initializer_range", 0.02),
    }


def _rope(raw: Raw) -> dict[str, Any]:
    """The old form (`rope_theta`, `rope_scaling`) and the new one (`rope_parameters`) of one description."""
    given = {**(raw.get("rope_scaling") or raw.get("rope_parameters") or {})}
    scaling = given.get("rope_type", given.get("type", "default"))
    scaling = "none" if scaling == "default" else scaling
    if scaling not in ROPE_FIELDS:
        raise ValueError(f"rope scaling {scaling!r} is not supported. Supported: default, linear, llama3, yarn.")
    if given.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor = {given['partial_rotary_factor']} is not supported; expected 1.")
    fields = {name: given[name] for name in ROPE_FIELDS[scaling] if given.get(name) is not None}
    if scaling in ("llama3", "yarn"):
        original = _or(raw, "original_max_position_embeddings", given.get("original_max_position_embeddings"))
        fields["original_max_position_embeddings"] = original or _require(raw, "max_position_embeddings")
    if scaling == "yarn" and "factor" not in fields:
        fields["factor"] = _require(raw, "max_position_embeddings") / fields["original_max_position_embeddings"]
    missing = {"linear": ("factor",), "llama3": ROPE_FIELDS["llama3"]}.get(scaling, ())
    for name in missing:
        if name not in fields:
            raise ValueError(f"rope scaling {scaling!r} needs {name}, which is absent.")
    theta = _or(given, "rope_theta", _or(raw, "rope_theta", 10_000.0))
    return {"theta": theta, "scaling": scaling, **fields}


def _head_dim(raw: Raw) -> int:
    return int(_or(raw, "head_dim", _require(raw, "hidden_size") // _require(raw, "num_attention_heads")))


def _llama(raw: Raw, family: Family) -> dict[str, Any]:
    bias = _or(raw, "attention_bias", False)
    return {
        "head_dim": _head_dim(raw),
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": _or(raw, "mlp_bias", False),
    }


def _qwen2(raw: Raw, family: Family) -> dict[str, Any]:
    return {"head_dim": _head_dim(raw), "qkv_bias": True}


def _qwen3(raw: Raw, family: Family) -> dict[str, Any]:
    bias = _or(raw, "attention_bias", False)
    return {"head_dim": _or(raw, "head_dim", 128), "qkv_bias": bias, "output_bias": bias, "qk_norm": True}


def _qwen3_moe(raw: Raw, family: Family) -> dict[str, Any]:
    num_experts = _or(raw, "num_experts", _or(raw, "num_local_experts", 128))
    num_layers = _require(raw, "num_hidden_layers")
    plain, step = set(_or(raw, "mlp_only_layers", [])), _or(raw, "decoder_sparse_step", 1)
    dense = [layer for layer in range(num_layers) if layer in plain or (layer + 1) % step]
    moe = {
        "num_experts": num_experts,
        "experts_per_token": _or(raw, "num_experts_per_tok", 8),
        "expert_intermediate_size": _or(raw, "moe_intermediate_size", 768),
        "scoring": "softmax",
        "normalize_weights": _or(raw, "norm_topk_prob", False),
        "dense_layers": dense,
    }
    return {**_qwen3(raw, family), "head_dim": _head_dim(raw), "moe": moe if num_experts else None}


def _deepseek_v3(raw: Raw, family: Family) -> dict[str, Any]:
    for name, expected in {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}.items():
        if raw.get(name, expected) != expected:
            raise ValueError(f"{name} = {raw[name]!r} is not supported for deepseek_v3; expected {expected!r}.")
    bias = _or(raw, "attention_bias", False)
    mla = {
        "q_lora_rank": _present(raw, "q_lora_rank"),
        **{
            name: _require(raw, name) for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        },
    }
    return {
        "num_kv_heads": _require(raw, "num_attention_heads"),
        "head_dim": mla["qk_nope_head_dim"] + mla["qk_rope_head_dim"],
        "rope": {**_rope(raw), "interleaved": family in ALWAYS_INDEXED or _or(raw, "rope_interleave", True)},
        "qkv_bias": bias,
        "output_bias": bias,
        "mla": mla,
        "moe": _deepseek_moe(raw),
    }


def _architecture(raw: Raw) -> str:
    return str((raw.get("architectures") or [""])[0])


def _is_indexed(raw: Raw, family: Family) -> bool:
    return family in ALWAYS_INDEXED or _architecture(raw).startswith(INDEXED_PREFIX)


def _sparse(raw: Raw, family: Family) -> dict[str, Any]:
    """DSA or NSA, where the architecture's name says so."""
    if _architecture(raw).startswith(BLOCKWISE_PREFIX):
        return {"attention": "nsa", "nsa": dict(_require(raw, "nsa"))}
    return _indexer(raw, family) if _is_indexed(raw, family) else {}


def _indexer(raw: Raw, family: Family) -> dict[str, Any]:
    """DSA, under the names of DeepSeek-V3.2 and GLM; `index_rope_dim` and those below it are this library's own."""
    num_layers = _require(raw, "num_hidden_layers")
    shared = [layer for layer, kind in enumerate(_indexer_types(raw, num_layers)) if kind == "shared"]
    attention = _or(raw, "index_attention", "dsa")
    return {
        "attention": attention,
        "dsa": {
            "top_k": _require(raw, "index_topk"),
            "num_heads": _require(raw, "index_n_heads"),
            "head_dim": _require(raw, "index_head_dim"),
            "rope_dim": _or(raw, "index_rope_dim", raw.get("qk_rope_head_dim", 0)),
            "interleaved": _or(raw, "indexer_rope_interleave", family == "glm_moe_dsa"),
            "hadamard": _or(raw, "index_hadamard", False),
            "fp8": _or(raw, "index_fp8", False),
            "k_norm_eps": _or(raw, "index_k_norm_eps", 1e-6),
            "shared_layers": shared if family == "glm_moe_dsa" else (),
        },
    }


def _indexer_types(raw: Raw, num_layers: int) -> list[str]:
    """GLM's pattern of layers with an indexer ("full") and without ("shared"), in its three spellings."""
    given = raw.get("indexer_types") or raw.get("index_topk_pattern")
    if given is not None:
        types = [{"F": "full", "S": "shared"}.get(kind, kind) for kind in given]
        if len(types) != num_layers or not set(types) <= {"full", "shared"}:
            raise ValueError(f"indexer_types = {given!r}: expected 'full' or 'shared' for each of {num_layers} layers.")
        return types
    every, offset = max(_or(raw, "index_topk_freq", 1), 1), _or(raw, "index_skip_topk_offset", 2)
    return ["shared" if max(layer - offset + 1, 0) % every else "full" for layer in range(num_layers)]


def _deepseek_moe(raw: Raw) -> dict[str, Any] | None:
    if not raw.get("n_routed_experts"):
        return None
    num_layers = _require(raw, "num_hidden_layers")
    return {
        "num_experts": raw["n_routed_experts"],
        "experts_per_token": _require(raw, "num_experts_per_tok"),
        "expert_intermediate_size": _require(raw, "moe_intermediate_size"),
        "num_shared_experts": _present(raw, "n_shared_experts") or 0,
        "num_groups": _require(raw, "n_group"),
        "groups_per_token": _require(raw, "topk_group"),
        "normalize_weights": _require(raw, "norm_topk_prob"),
        "routed_scaling": _require(raw, "routed_scaling_factor"),
        "dense_layers": _dense_layers(raw, num_layers),
    }


def _dense_layers(raw: Raw, num_layers: int) -> list[int]:
    if raw.get("mlp_layer_types") is not None:
        return [layer for layer, kind in enumerate(raw["mlp_layer_types"]) if kind == "dense"]
    first, every = _require(raw, "first_k_dense_replace"), _or(raw, "moe_layer_freq", 1)
    return [layer for layer in range(num_layers) if layer < first or layer % every]


_FAMILY_FIELDS: Final = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v3": _deepseek_v3,
    "deepseek_v32": _deepseek_v3,
    "glm_moe_dsa": _deepseek_v3,
}
