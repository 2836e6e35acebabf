"""`config.json` both ways: what is read, what is refused, and what cannot be written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rorqual.models.config import ModelConfig, RopeConfig
from rorqual.models.decoder import Decoder
from rorqual.models.hf import from_hf_config, read_model_config
from rorqual.models.hf_export import to_hf_config

transformers = pytest.importorskip("transformers")

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "deepseek_v3", "deepseek_v32", "glm_moe_dsa")

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
QWEN3_MOE = {
    **LLAMA,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
DEEPSEEK = {
    **LLAMA,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_hidden_layers": 6,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("family", FAMILIES)
def test_written_configs_read_back(
    reference_options: Callable[[str, int], dict[str, Any]], family: str, seed: int, tmp_path: Path
) -> None:
    """transformers' own file, our reading of it, our writing of that, transformers' reading, and ours again."""
    config = transformers.AutoConfig.for_model(family, **reference_options(family, seed))
    config.architectures = [transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__]
    config.save_pretrained(tmp_path)
    ours = read_model_config(tmp_path)
    written = to_hf_config(ours)
    assert from_hf_config(json.loads(json.dumps(written))) == ours
    again = transformers.AutoConfig.for_model(**written)
    if config.model_type == "qwen3_moe":
        # One pattern of layers has more than one spelling; ours lists the dense ones.
        config.mlp_only_layers, config.decoder_sparse_step = list(ours.moe.dense_layers) if ours.moe else [], 1
    extra = set(again.to_dict()) - set(config.to_dict())
    ignored = {"num_nextn_predict_layers", "indexer_rope_interleave"} if ours.dsa else set()
    assert extra <= {"head_dim", "scoring_func", "topk_method", "moe_layer_freq"} | ignored
    ignored = {"dtype", "transformers_version", "rope_parameters", "num_nextn_predict_layers", "num_mtp_layers"}
    ignored |= {"bos_token_id", "eos_token_id", "pad_token_id"}
    for name in config.to_dict().keys() - ignored:
        assert again.to_dict()[name] == config.to_dict()[name], name
    for name, value in config.rope_parameters.items():
        assert again.rope_parameters[name] == value, name


@pytest.mark.parametrize("scaling", (None, {"rope_type": "linear", "factor": 2.0}, LLAMA3, {**YARN, "mscale": 0.7}))
def test_old_and_new_rope_forms_are_one(scaling: dict[str, Any] | None) -> None:
    old = from_hf_config({**LLAMA, "rope_theta": 5e5, "rope_scaling": scaling})
    new_form = {"rope_theta": 5e5, **(scaling or {"rope_type": "default"})}
    assert from_hf_config({**LLAMA, "rope_parameters": new_form}) == old
    legacy = {("type" if name == "rope_type" else name): value for name, value in (scaling or {}).items()}
    assert from_hf_config({**LLAMA, "rope_theta": 5e5, "rope_scaling": legacy or None}) == old
    assert old.rope.theta == 5e5
    assert old.rope.scaling == (scaling or {"rope_type": "none"})["rope_type"]


def test_rope_lengths_and_factors_are_filled_in_as_transformers_does() -> None:
    given = {**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    assert from_hf_config(given).rope.original_max_position_embeddings == 128
    by_ratio = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32}
    assert from_hf_config({**LLAMA, "rope_scaling": by_ratio}).rope.factor == 4.0
    outside = {**LLAMA, "rope_scaling": YARN, "original_max_position_embeddings": 16}
    assert from_hf_config(outside).rope.original_max_position_embeddings == 16


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (LLAMA, {"head_dim": 16, "num_kv_heads": 4, "qkv_bias": False, "output_bias": False, "tie_embeddings": False}),
        ({**LLAMA, "attention_bias": True}, {"qkv_bias": True, "output_bias": True, "mlp_bias": False}),
        ({**LLAMA, "mlp_bias": True, "head_dim": 8}, {"mlp_bias": True, "head_dim": 8}),
        ({**QWEN2, "num_key_value_heads": 2}, {"qkv_bias": True, "output_bias": False, "num_kv_heads": 2}),
        (QWEN3, {"head_dim": 128, "qk_norm": True, "qkv_bias": False}),
        ({**QWEN3_MOE, "head_dim": None}, {"head_dim": 16, "qk_norm": True}),
        (DEEPSEEK, {"head_dim": 16, "num_kv_heads": 4, "qk_norm": False}),
    ],
)
def test_defaults_by_family(raw: dict[str, Any], expected: dict[str, Any]) -> None:
    config = from_hf_config(raw)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("raw", "dense"),
    [
        (QWEN3_MOE, ()),
        ({**QWEN3_MOE, "mlp_only_layers": [1]}, (1,)),
        ({**QWEN3_MOE, "decoder_sparse_step": 2}, (0, 2)),
        ({**QWEN3_MOE, "decoder_sparse_step": 2, "mlp_only_layers": [3]}, (0, 2, 3)),
        (DEEPSEEK, (0, 1, 2)),
        ({**DEEPSEEK, "first_k_dense_replace": 0}, ()),
        ({**DEEPSEEK, "first_k_dense_replace": 2, "moe_layer_freq": 2}, (0, 1, 3, 5)),
    ],
)
def test_dense_layers(raw: dict[str, Any], dense: tuple[int, ...]) -> None:
    config = from_hf_config(raw)
    assert config.moe is not None
    assert config.moe.dense_layers == dense


def test_models_without_experts() -> None:
    assert from_hf_config({**DEEPSEEK, "n_routed_experts": None}).moe is None
    assert from_hf_config({**QWEN3_MOE, "num_experts": 0}).moe is None


def test_the_architecture_outranks_the_model_type() -> None:
    """Moonshot's Kimi K2 is a DeepSeek-V3 under another model_type."""
    assert from_hf_config({**DEEPSEEK, "model_type": "kimi_k2"}).family == "deepseek_v3"
    assert from_hf_config({**QWEN2, "architectures": None}).family == "qwen2"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({**LLAMA, "architectures": ["GptOssForCausalLM"]}, r"'GptOssForCausalLM' is not supported.*LlamaForCausalLM"),
        ({**DEEPSEEK, "architectures": ["DeepseekV4ForCausalLM"]}, r"DeepseekV4ForCausalLM.*not supported"),
        ({**DEEPSEEK, "architectures": ["Glm4MoeForCausalLM"]}, r"Glm4MoeForCausalLM.*not supported"),
        ({**LLAMA, "architectures": None, "model_type": "mistral"}, r"'mistral' is not supported"),
        ({"vocab_size": 3}, r"None is not supported"),
        ({**DEEPSEEK, "index_topk": 2048}, r"index_topk = 2048"),
        ({**LLAMA, "hidden_act": "gelu"}, r"hidden_act = 'gelu'"),
        ({**LLAMA, "attn_logit_softcapping": 50.0}, r"attn_logit_softcapping = 50.0"),
        ({**LLAMA, "final_logit_softcapping": 30.0}, r"final_logit_softcapping = 30.0"),
        ({**LLAMA, "logit_scale": 0.5}, r"logit_scale = 0.5"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0.5"),
        (
            {**LLAMA, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            r"partial_rotary_factor",
        ),
        ({**LLAMA, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, r"rope scaling 'dynamic'"),
        ({**LLAMA, "rope_scaling": {"type": "longrope"}}, r"rope scaling 'longrope'"),
        ({**LLAMA, "rope_scaling": {"rope_type": "linear"}}, r"'linear' needs factor"),
        ({**LLAMA, "rope_scaling": {**YARN, "rope_type": "llama3"}}, r"'llama3' needs low_freq_factor"),
        ({**LLAMA, "sliding_window": 32}, r"sliding_window = 32 is switched on"),
        ({**QWEN2, "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}, r"sliding_window = 32"),
        ({**QWEN2, "layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, r"sliding"),
        ({**QWEN3_MOE, "use_sliding_window": True, "sliding_window": 32}, r"sliding_window = 32"),
        ({**DEEPSEEK, "scoring_func": "softmax"}, r"scoring_func = 'softmax'.*'sigmoid'"),
        ({**DEEPSEEK, "topk_method": "greedy"}, r"topk_method = 'greedy'.*'noaux_tc'"),
        ({name: value for name, value in DEEPSEEK.items() if name != "q_lora_rank"}, r"q_lora_rank is absent"),
        ({name: value for name, value in LLAMA.items() if name != "hidden_size"}, r"hidden_size is absent"),
        ({**LLAMA, "num_key_value_heads": 3}, r"num_kv_heads = 3 must divide num_heads = 4"),
        ({**LLAMA, "vocab_size": "many"}, r"vocab_size"),
        ({**LLAMA, "architectures": [None]}, r"not of the type that its field has"),
    ],
)
def test_refusals_name_the_option(raw: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        from_hf_config(raw)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=str(tmp_path / "config.json")):
        read_model_config(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 4},
        {"layer_types": ["full_attention"] * 4},
    ],
)
def test_windows_that_are_off_are_accepted(changes: dict[str, Any]) -> None:
    assert from_hf_config({**QWEN2, **changes}) == from_hf_config(QWEN2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b'{"a": 1', "not valid JSON"),
        (b"[1]", "holds a list"),
        (b"\xff\xfe{", "not valid JSON"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_model_config(tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gqa", {"family": "llama"}, r"llama checkpoint cannot express: qk_norm = True"),
        ("gqa", {"output_bias": True}, r"qkv_bias = False.*output_bias|output_bias = True"),
        ("gqa", {"family": "qwen2", "qk_norm": False}, r"qkv_bias = False \(reads back as True\)"),
        ("gqa", {"mlp_bias": True}, r"mlp_bias = True"),
        ("mla", {"qk_norm": True}, r"qk_norm"),
        ("mla", {"dense_layers": (1,)}, r"moe"),
        ("mla", {"scoring": "softmax"}, r"scoring_func = 'softmax'"),
        ("softmax", {"num_shared_experts": 1}, r"moe"),
        ("gqa", {"rope": RopeConfig(interleaved=True)}, r"rope"),
    ],
)
def test_what_a_family_cannot_express_is_refused(
    tiny_decoder: Callable[..., Decoder], kind: str, changes: dict[str, Any], message: str
) -> None:
    config = tiny_decoder(kind).config
    in_moe = {
        name: value for name, value in changes.items() if name in ("dense_layers", "scoring", "num_shared_experts")
    }
    if in_moe:
        changes = {"moe": msgspec.structs.replace(config.moe, **in_moe)}
    with pytest.raises(ValueError, match=message):
        to_hf_config(msgspec.structs.replace(config, **changes))


def test_fields_that_play_no_part_do_not_matter(tiny_decoder: Callable[..., Decoder]) -> None:
    config: ModelConfig = tiny_decoder("mla").config
    idle = msgspec.structs.replace(
        config,
        num_kv_heads=1,
        head_dim=2,
        rope=RopeConfig(factor=3.0, beta_fast=7.0, interleaved=True),
        moe=msgspec.structs.replace(config.moe, balance_rate=0.5),
    )
    plain = msgspec.structs.replace(config, rope=RopeConfig(interleaved=True))
    assert to_hf_config(idle) == to_hf_config(plain)
