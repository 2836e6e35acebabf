"""Checkpoints both ways between `transformers` and the decoder, and every kind of damage to one."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rorqual.models.checkpoints import KEPT_FLOAT32, load_checkpoint, pieces, save_checkpoint
from rorqual.models.decoder import Decoder
from rorqual.models.layout import causal_layout

transformers = pytest.importorskip("transformers")

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "deepseek_v3", "deepseek_v32", "glm_moe_dsa")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@torch.no_grad()
def logits(decoder: Decoder, ids: Tensor) -> Tensor:
    return decoder.logits(decoder(ids, causal_layout([len(ids)])).hidden)


def random_ids(length: int = 20) -> Tensor:
    return torch.randint(61, (length,), generator=torch.Generator().manual_seed(3))


def assert_equal_states(first: Decoder, second: Decoder) -> None:
    theirs = second.state_dict()
    assert first.state_dict().keys() == theirs.keys()
    for name, tensor in first.state_dict().items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("max_shard_bytes", (10**9, 9000))
@pytest.mark.parametrize("seed", (0, 1, 2))
@pytest.mark.parametrize("family", FAMILIES)
def test_export_loads_in_transformers(
    pair: Callable, family: str, seed: int, max_shard_bytes: int, tmp_path: Path
) -> None:
    """No tensor missing or left over; the same state bit for bit; the same logits; and back again."""
    model = pair(family, seed)
    save_checkpoint(model.decoder, tmp_path, max_shard_bytes=max_shard_bytes)
    assert (tmp_path / INDEX).exists() == (max_shard_bytes == 9000)
    exported, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, experts_implementation="eager"
    )
    assert not any(info.values()), info
    assert type(exported) is type(model.reference)
    state = exported.state_dict()
    assert state.keys() == model.reference.state_dict().keys()
    for name, tensor in model.reference.state_dict().items():
        assert torch.equal(state[name], tensor), name
    with torch.no_grad():
        assert torch.equal(exported.eval()(random_ids()[None]).logits[0], model.reference_logits(random_ids()))
    again = load_checkpoint(tmp_path)
    assert_equal_states(again, model.decoder)
    assert again.config == model.decoder.config
    assert torch.equal(logits(again, random_ids()), logits(model.decoder, random_ids()))


@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_import(pair: Callable, family: str, tmp_path: Path) -> None:
    model = pair(family, 1)
    model.reference.save_pretrained(tmp_path, max_shard_size="9KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_equal_states(load_checkpoint(tmp_path), model.decoder)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_checkpoints(pair: Callable, reference_model: Callable, family: str, tmp_path: Path) -> None:
    """A bfloat16 file stays bfloat16, or is widened exactly; correction biases and index weights stay float32."""
    reference = reference_model(family, 1).bfloat16()
    reference.save_pretrained(tmp_path / "theirs")
    narrow = load_checkpoint(tmp_path / "theirs")
    for name, tensor in narrow.state_dict().items():
        expected = torch.float32 if name.endswith(KEPT_FLOAT32) else torch.bfloat16
        assert tensor.dtype == expected, name
    wide = load_checkpoint(tmp_path / "theirs", dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "theirs", dtype=torch.float32, experts_implementation="eager"
    )
    with torch.no_grad():
        expected = theirs.eval()(random_ids()[None]).logits[0]
    assert (logits(wide, random_ids()) - expected).abs().max() < 1e-5 * expected.abs().max()
    save_checkpoint(narrow, tmp_path / "ours")
    assert json.loads((tmp_path / "ours/config.json").read_text())["dtype"] == "bfloat16"
    assert_equal_states(load_checkpoint(tmp_path / "ours"), narrow)
    save_checkpoint(wide, tmp_path / "narrowed", dtype=torch.bfloat16)
    assert_equal_states(load_checkpoint(tmp_path / "narrowed"), narrow)


@pytest.mark.parametrize("family", ("qwen3_moe", "deepseek_v3"))
def test_stacked_experts_on_disk(pair: Callable, family: str, tmp_path: Path) -> None:
    """Files that hold the experts as `transformers` 5 holds them in memory: one tensor for all."""
    model = pair(family, 1)
    tensors = {name: tensor.contiguous().clone() for name, tensor in model.reference.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in tensors)
    if model.decoder.config.tie_embeddings:
        tensors.pop("lm_head.weight")
    write(tmp_path, json.loads((model.directory / "config.json").read_text()), tensors)
    assert_equal_states(load_checkpoint(tmp_path), model.decoder)


@pytest.mark.parametrize("kind", ("gqa", "mla", "softmax"))
def test_pieces_cover_the_model_once(tiny_decoder: Callable[..., Decoder], kind: str) -> None:
    decoder = tiny_decoder(kind)
    counts = {name: torch.zeros_like(tensor) for name, tensor in decoder.state_dict().items()}
    for piece in pieces(decoder).values():
        assert counts[piece.name][piece.where].shape == piece.shape
        counts[piece.name][piece.where] += 1
    assert all(count.eq(1).all() for count in counts.values())


def test_loaded_weights_do_not_lean_on_the_file(pair: Callable, tmp_path: Path) -> None:
    model = pair("llama", 0)
    save_checkpoint(model.decoder, tmp_path)
    loaded = load_checkpoint(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"")
    assert_equal_states(loaded, model.decoder)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


# --------------------------------------------------------------------------------------------------------- left out


def test_prediction_layers_and_old_buffers_are_left_out(pair: Callable, tmp_path: Path) -> None:
    model = pair("deepseek_v3", 0)
    config, tensors = parts_of(model.directory)
    layer = config["num_hidden_layers"]
    tensors[f"model.layers.{layer}.eh_proj.weight"] = torch.ones(4, 4)
    tensors[f"model.layers.{layer}.self_attn.kv_a_layernorm.weight"] = torch.ones(4)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    write(tmp_path, {**config, "num_nextn_predict_layers": 1}, tensors)
    assert_equal_states(load_checkpoint(tmp_path), model.decoder)
    write(tmp_path, {**config, "num_nextn_predict_layers": 0}, tensors)
    with pytest.raises(
        ValueError, match=rf"unexpected tensor model\.layers\.{layer}\.eh_proj\.weight of shape \[4, 4\]"
    ):
        load_checkpoint(tmp_path)


def test_a_stored_head_of_a_tied_model_must_equal_the_embedding(
    tiny_decoder: Callable[..., Decoder], tmp_path: Path
) -> None:
    decoder = tiny_decoder("gqa", tie_embeddings=True).float()
    save_checkpoint(decoder, tmp_path)
    config, tensors = parts_of(tmp_path)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write(tmp_path, config, tensors)
    assert_equal_states(load_checkpoint(tmp_path), decoder)
    tensors["lm_head.weight"][0, 0] += 1
    write(tmp_path, config, tensors)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs.*tie_word_embeddings"):
        load_checkpoint(tmp_path)


# ---------------------------------------------------------------------------------------------------------------- FP8


def quantised(tensors: dict[str, Tensor], block: tuple[int, int]) -> dict[str, Tensor]:
    """DeepSeek's storage of every projection: e4m3 values, and one float32 scale a block."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or "_proj" not in name:
            stored[name] = tensor.bfloat16() if not name.endswith("bias") else tensor
            continue
        rows, columns = tensor.shape
        scale = torch.zeros(-(-rows // block[0]), -(-columns // block[1]))
        values = torch.zeros_like(tensor)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                where = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
                scale[i, j] = tensor[where].abs().max() / 448
                values[where] = tensor[where] / scale[i, j]
        stored[name], stored[f"{name}_scale_inv"] = values.to(torch.float8_e4m3fn), scale
    return stored


def test_fp8_checkpoints_are_multiplied_out(pair: Callable, tmp_path: Path) -> None:
    """Blocks that do not divide the matrices; scales in a shard of their own; within e4m3's half step of 1/16."""
    model, block = pair("deepseek_v3", 0), (8, 5)
    config, tensors = parts_of(model.directory)
    stored = quantised(tensors, block)
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    scales = {name: tensor for name, tensor in stored.items() if name.endswith("_scale_inv")}
    write_shards(
        tmp_path,
        {**config, "quantization_config": quantization},
        [{name: tensor for name, tensor in stored.items() if name not in scales}, scales],
    )
    loaded = load_checkpoint(tmp_path, dtype=torch.float32)
    exact = pieces(model.decoder)
    state = loaded.state_dict()
    for name, piece in exact.items():
        found, wanted = state[piece.name][piece.where], model.decoder.state_dict()[piece.name][piece.where]
        tolerance = 1 / 16 if f"{name}_scale_inv" in scales else 1 / 256
        limit = tolerance * wanted.abs() + (wanted.abs().max() / 448 / 2**7 if tolerance > 1 / 100 else 0)
        assert ((found - wanted).abs() <= limit).all(), name
    assert load_checkpoint(tmp_path).embed_tokens.weight.dtype == torch.bfloat16
    extra = {**stored, "model.layers.0.eh_proj.weight": torch.ones(2, 2)}
    write_shards(tmp_path, {**config, "quantization_config": quantization}, [extra])
    with pytest.raises(ValueError, match=r"unexpected tensor model\.layers\.0\.eh_proj\.weight"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, r"quantization 'awq'.*not supported"),
        ({"quant_method": "fp8"}, r"quantization 'fp8' with weight_block_size None"),
        (None, r"o_proj\.weight is stored as FP8, and config\.json has no quantization_config"),
        ({"quant_method": "fp8", "weight_block_size": [4, 4]}, r"_scale_inv has shape \[\d+, \d+\], expected"),
    ],
)
def test_other_quantisation_is_refused(pair: Callable, tmp_path: Path, quantization: dict | None, message: str) -> None:
    config, tensors = parts_of(pair("deepseek_v3", 0).directory)
    write(tmp_path, {**config, "quantization_config": quantization}, quantised(tensors, (8, 5)))
    with pytest.raises(ValueError, match=message if quantization else r"is stored as FP8"):
        load_checkpoint(tmp_path)


# ------------------------------------------------------------------------------------------------------------- damage


def parts_of(directory: Path) -> tuple[dict, dict[str, Tensor]]:
    return json.loads((directory / "config.json").read_text()), load_file(directory / WEIGHTS)


def write(directory: Path, config: dict, tensors: dict[str, Tensor]) -> None:
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / WEIGHTS)


def write_shards(directory: Path, config: dict, shards: list[dict[str, Tensor]]) -> None:
    (directory / "config.json").write_text(json.dumps(config))
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, directory / name)
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def sharded(pair: Callable, tmp_path: Path) -> Path:
    """A sound checkpoint in several files, to be damaged."""
    save_checkpoint(pair("deepseek_v3", 0).decoder, tmp_path, max_shard_bytes=9000)
    load_checkpoint(tmp_path)
    return tmp_path


def shard_of(directory: Path, tensor: str) -> Path:
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][tensor]


def test_missing_tensor(pair: Callable, tmp_path: Path) -> None:
    config, tensors = parts_of(pair("deepseek_v3", 0).directory)
    lost = "model.layers.1.mlp.experts.1.up_proj.weight"
    del tensors[lost]
    write(tmp_path, config, tensors)
    with pytest.raises(ValueError, match=rf"lacks 1 of {len(tensors) + 1} tensors.*{lost}"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ("model.embed_tokens.weight", "model.norm.weight"))
def test_missing_tensor_of_any_kind_is_named(pair: Callable, tmp_path: Path, name: str) -> None:
    config, tensors = parts_of(pair("llama", 0).directory)
    del tensors[name]
    write(tmp_path, config, tensors)
    with pytest.raises(ValueError, match=name):
        load_checkpoint(tmp_path)


def test_unexpected_tensor(pair: Callable, tmp_path: Path) -> None:
    config, tensors = parts_of(pair("qwen3", 0).directory)
    tensors["model.layers.0.self_attn.sinks"] = torch.ones(4)
    write(tmp_path, config, tensors)
    with pytest.raises(ValueError, match=r"model\.safetensors: unexpected tensor .*sinks of shape \[4\]"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("change", ("transposed", "one row more", "flat"))
def test_wrong_shape(pair: Callable, tmp_path: Path, change: str) -> None:
    config, tensors = parts_of(pair("llama", 0).directory)
    name = "model.layers.0.mlp.down_proj.weight"
    shape = list(tensors[name].shape)
    rows, columns = shape
    found = {"transposed": (columns, rows), "one row more": (rows + 1, columns), "flat": (rows * columns,)}[change]
    tensors[name] = torch.ones(found)
    write(tmp_path, config, tensors)
    with pytest.raises(ValueError) as error:
        load_checkpoint(tmp_path)
    for part in (str(tmp_path / WEIGHTS), name, str(list(found)), f"expected {shape}"):
        assert part in str(error.value)


def test_integers_are_refused(pair: Callable, tmp_path: Path) -> None:
    config, tensors = parts_of(pair("llama", 0).directory)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)
    write(tmp_path, config, tensors)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is stored as torch\.int32; expected float32"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("kept", (0.0, 0.001, 0.5, 0.999))
def test_truncated_file(sharded: Path, kept: float) -> None:
    path = shard_of(sharded, "model.norm.weight")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError) as error:
        load_checkpoint(sharded)
    assert str(path) in str(error.value)
    assert f"found {int(len(content) * kept)}" in str(error.value)
    if kept > 0.9:
        assert f"expected {len(content)} bytes" in str(error.value)


@pytest.mark.parametrize("header", (b"not json", b"[1, 2]", b'{"a": {}}'))
def test_header_of_another_format(sharded: Path, header: bytes) -> None:
    path = shard_of(sharded, "model.norm.weight")
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match=rf"{path.name} cannot be read"):
        load_checkpoint(sharded)


def test_missing_shard(sharded: Path) -> None:
    path = shard_of(sharded, "model.norm.weight")
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path.name} is missing; .* places \d+ tensors there: "):
        load_checkpoint(sharded)


def test_index_that_lies(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    other = next(name for name in index["weight_map"].values() if name != index["weight_map"]["model.norm.weight"])
    index["weight_map"]["model.norm.weight"] = other
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"{other} does not hold model\.norm\.weight"):
        load_checkpoint(sharded)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "has no weight_map"),
        ('{"weight_map": {"model.norm.weight": "../secret.safetensors"}}', "leads out of the directory"),
        ("{", "not valid JSON"),
    ],
)
def test_bad_index(sharded: Path, content: str, message: str) -> None:
    (sharded / INDEX).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(sharded)


def test_no_weights(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
        load_checkpoint(sharded)


# ------------------------------------------------------------------------------------------------------------- saving


def test_saving_again_leaves_no_stale_file(pair: Callable, tmp_path: Path) -> None:
    model = pair("llama", 0)
    (tmp_path / "notes.txt").write_text("mine")
    save_checkpoint(model.decoder, tmp_path, max_shard_bytes=9000)
    save_checkpoint(model.decoder, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        WEIGHTS,
        "notes.txt",
    ]
    save_checkpoint(model.decoder, tmp_path, max_shard_bytes=9000)
    assert not (tmp_path / WEIGHTS).exists()
    assert_equal_states(load_checkpoint(tmp_path), model.decoder)


def test_shards_respect_the_limit(pair: Callable, tmp_path: Path) -> None:
    decoder = pair("deepseek_v3", 0).decoder
    save_checkpoint(decoder, tmp_path, max_shard_bytes=9000)
    index = json.loads((tmp_path / INDEX).read_text())
    sizes = {path.name: sum(tensor.nbytes for tensor in load_file(path).values()) for path in tmp_path.glob("model-*")}
    largest = max(4 * torch.Size(piece.shape).numel() for piece in pieces(decoder).values())
    assert max(sizes.values()) <= max(9000, largest)
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert index["weight_map"].keys() == pieces(decoder).keys()


@pytest.mark.parametrize("writes_allowed", range(3))
def test_a_failed_save_keeps_the_old_checkpoint(
    pair: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes_allowed: int
) -> None:
    """The disk fills up while the shards are written: an error says so, and the old weights still load."""
    old, new = pair("llama", 0).decoder, pair("llama", 1).decoder
    save_checkpoint(old, tmp_path)
    done = 0

    def full_disk(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        nonlocal done
        if done == writes_allowed:
            raise OSError(28, "No space left on device")
        done += 1
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr("rorqual.models.checkpoints.save_file", full_disk)
    with pytest.raises(ValueError, match=r"Could not write .*No space left on device.*Free some space"):
        save_checkpoint(new, tmp_path, max_shard_bytes=5000)
    assert_equal_states(load_checkpoint(tmp_path), old)
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("moves_allowed", range(4))
def test_a_crash_between_moves_never_leaves_a_mixture(
    pair: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves_allowed: int
) -> None:
    old, new = pair("llama", 0).decoder, pair("llama", 1).decoder
    save_checkpoint(old, tmp_path, max_shard_bytes=9000)
    replace, done = os.replace, 0

    def crash(source: Path, target: Path) -> None:
        nonlocal done
        if done == moves_allowed:
            raise KeyboardInterrupt
        done += 1
        replace(source, target)

    monkeypatch.setattr("rorqual.models.checkpoints.os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(new, tmp_path, max_shard_bytes=9000)
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        load_checkpoint(tmp_path)
    monkeypatch.undo()
    save_checkpoint(new, tmp_path, max_shard_bytes=9000)
    assert_equal_states(load_checkpoint(tmp_path), new)


def test_special_tokens_and_tokenizer_files(pair: Callable, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    decoder = pair("llama", 0).decoder
    save_checkpoint(
        decoder,
        tmp_path / "out",
        tokenizer_files=[tokenizer],
        special_tokens={"bos_token_id": 3, "eos_token_id": [7, 9]},
    )
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.generation_config.eos_token_id == [7, 9]
    assert exported.generation_config.bos_token_id == 3
    assert exported.config.pad_token_id is None
    plain = tmp_path / "plain"
    save_checkpoint(decoder, plain)
    assert transformers.AutoModelForCausalLM.from_pretrained(plain).generation_config.eos_token_id is None
    with pytest.raises(ValueError, match=r"gone\.json does not exist"):
        save_checkpoint(decoder, plain, tokenizer_files=[tmp_path / "gone.json"])
    with pytest.raises(ValueError, match="unk_token_id"):
        save_checkpoint(decoder, plain, special_tokens={"unk_token_id": 1})
