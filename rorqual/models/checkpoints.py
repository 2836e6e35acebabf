"""Hugging Face checkpoints: safetensors, one file or many, to and from a Decoder.

Names on disk are those of `transformers` with a `model.` prefix; each expert's projections are tensors of their own
there and slices of a stack here. `pieces` holds that correspondence once, for reading and writing alike.

Reading goes file by file and tensor by tensor into the model's own memory, so that the peak is the model plus one
tensor; writing holds the model plus one file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rorqual.models.config import ModelConfig
from rorqual.models.decoder import Decoder
from rorqual.models.hf import CONFIG_NAME, read_json, read_model_config
from rorqual.models.hf_export import to_hf_config
from rorqual.models.tensors import INDEX_NAME, SINGLE_NAME, TensorReader, some_names
from rorqual.store.files import disk_errors, sync_directory, sync_tree

STAGE_NAME: Final = ".tmp-checkpoint"
KEPT_FLOAT32: Final = ("e_score_correction_bias", "indexer.weights_proj.weight")
"""Float32 on disk and in memory, whatever the dtype of the rest."""
SPECIAL_TOKENS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Piece:
    """One tensor on disk: `state[name][where]` of the Decoder, of the given shape."""

    name: str
    where: tuple[int | slice, ...]
    shape: tuple[int, ...]


def pieces(model: Decoder) -> dict[str, Piece]:
    """Every tensor of a checkpoint of this model, by its name on disk, in the model's order."""
    found: dict[str, Piece] = {}
    for name, tensor in model.state_dict().items():
        disk_name = name if name.startswith("lm_head.") else f"model.{name}"
        if name.endswith("experts.gate_up_proj"):
            found.update(_gate_up_pieces(name, disk_name, tensor))
        elif name.endswith("experts.down_proj"):
            for expert in range(len(tensor)):
                part = f"{disk_name.removesuffix('down_proj')}{expert}.down_proj.weight"
                found[part] = Piece(name, (expert,), tuple(tensor.shape[1:]))
        else:
            found[disk_name] = Piece(name, (), tuple(tensor.shape))
    return found


def _gate_up_pieces(name: str, disk_name: str, stacked_XID: Tensor) -> Iterator[tuple[str, Piece]]:
    num_experts, double_width, hidden_size = stacked_XID.shape
    width = double_width // 2
    prefix = disk_name.removesuffix("gate_up_proj")
    for expert in range(num_experts):
        for half, part in enumerate(("gate_proj", "up_proj")):
            where = (expert, slice(half * width, (half + 1) * width))
            yield f"{prefix}{expert}.{part}.weight", Piece(name, where, (width, hidden_size))


# ------------------------------------------------------------------------------------------------------------- reading


def load_checkpoint(
    directory: Path | str, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Decoder:
    """A Decoder with the weights of a Hugging Face checkpoint directory.

    dtype: None keeps that of the stored embedding. The routers' correction bias is float32 always. Layers for
    multi-token prediction, which follow the decoder's own, and old files' `rotary_emb.inv_freq` are left out.
    Raises: ValueError naming the tensor and the file, what was expected and what was found, for a missing, unexpected
    or misshapen tensor, a missing or truncated file, an unsupported architecture or quantisation.
    """
    directory = Path(directory)
    raw, config = read_json(directory / CONFIG_NAME), read_model_config(directory)
    with torch.device("meta"):
        model = Decoder(config)
    reader = TensorReader(directory, _fp8_block(raw, directory))
    dtype = dtype or reader.dtype("model.embed_tokens.weight")
    state = _read_state(model, reader, _prediction_layers(raw, config), dtype, torch.device(device or "cpu"))
    model.load_state_dict(state, assign=True)
    return model.to(device) if device is not None else model


def _read_state(
    model: Decoder, reader: TensorReader, skipped_layers: range, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    expected = pieces(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    fused = {f"model.{name}": Piece(name, (), shape) for name, shape in shapes.items() if ".experts." in name}
    wanted = {**expected, **fused}
    state: dict[str, Tensor] = {}
    unseen = dict.fromkeys(expected)
    for name in reader.names:
        piece = wanted.get(name)
        if piece is None:
            _check_ignorable(name, model.config, reader, skipped_layers)
            continue
        if piece.name not in state:
            kept = torch.float32 if piece.name.endswith(KEPT_FLOAT32) else dtype
            state[piece.name] = torch.empty(shapes[piece.name], dtype=kept, device=device)
        state[piece.name][piece.where].copy_(reader.read(name, piece.shape))
        for seen in [other for other, part in expected.items() if part.name == piece.name] if name in fused else [name]:
            unseen.pop(seen, None)
    if unseen:
        raise ValueError(
            f"{reader.directory} lacks {len(unseen)} of {len(expected)} tensors that its {CONFIG_NAME} asks for: "
            f"{some_names(unseen)}. The checkpoint is incomplete, or the config is of another model."
        )
    return state


def _check_ignorable(name: str, config: ModelConfig, reader: TensorReader, skipped_layers: range) -> None:
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) in skipped_layers:
        return
    if name.endswith("rotary_emb.inv_freq") or reader.is_scale(name) or 0 in reader.shape(name):
        return
    if name == "lm_head.weight" and config.tie_embeddings:
        shape = (config.vocab_size, config.hidden_size)
        if torch.equal(reader.read(name, shape), reader.read("model.embed_tokens.weight", shape)):
            return
        raise ValueError(
            f"{reader.path(name)}: lm_head.weight differs from model.embed_tokens.weight, and {CONFIG_NAME} ties them. "
            "Set tie_word_embeddings to false to keep both."
        )
    raise ValueError(
        f"{reader.path(name)}: unexpected tensor {name} of shape {list(reader.shape(name))}; a {config.family} of this "
        f"{CONFIG_NAME} has no such part. The config is of another model, or of another architecture."
    )


def _prediction_layers(raw: Mapping[str, Any], config: ModelConfig) -> range:
    """Multi-token prediction layers stand after the decoder's own (DeepSeek-V3: layer 61)."""
    if config.mla is None:
        return range(0)
    count = raw.get("num_nextn_predict_layers", raw.get("num_mtp_layers", 1)) or 0
    return range(config.num_layers, config.num_layers + count)


def _fp8_block(raw: Mapping[str, Any], directory: Path) -> tuple[int, int] | None:
    """Rows and columns that one FP8 scale covers; None for a checkpoint that is not quantised."""
    quantization = raw.get("quantization_config")
    if not quantization:
        return None
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    if method != "fp8" or not isinstance(block, list) or len(block) != 2:
        raise ValueError(
            f"{directory / CONFIG_NAME}: quantization {method!r} with weight_block_size {block} is not supported; "
            "expected none, or 'fp8' with two block sizes. Use an unquantised checkpoint."
        )
    return int(block[0]), int(block[1])


# ------------------------------------------------------------------------------------------------------------- writing


def save_checkpoint(
    model: Decoder,
    directory: Path | str,
    max_shard_bytes: int = 5_000_000_000,
    dtype: torch.dtype | None = None,
    tokenizer_files: Sequence[Path] = (),
    special_tokens: Mapping[str, int | list[int]] | None = None,
) -> None:
    """Write a checkpoint that `AutoModelForCausalLM.from_pretrained(directory)` and `load_checkpoint` read.

    dtype: None keeps the model's. tokenizer_files are copied beside the weights. special_tokens: `bos_token_id`,
    `eos_token_id` and `pad_token_id`, null where absent, so that `generate` stops where the tokenizer says and nowhere
    else. All is written aside and then moved into place, `config.json` last: a crash leaves the old checkpoint, the new
    one, or a directory without `config.json`, never a mixture that loads.
    Raises: ValueError when the family cannot express the config, a tokenizer file is absent, or the disk refuses.
    """
    directory = Path(directory)
    dtype = dtype or model.embed_tokens.weight.dtype
    unknown = sorted(set(special_tokens or {}) - set(SPECIAL_TOKENS))
    if unknown:
        raise ValueError(f"special_tokens has {', '.join(unknown)}; expected only {', '.join(SPECIAL_TOKENS)}.")
    tokens = dict.fromkeys(SPECIAL_TOKENS, None) | dict(special_tokens or {})
    config = {**to_hf_config(model.config), **tokens, "dtype": str(dtype).removeprefix("torch.")}
    for path in tokenizer_files:
        if not path.is_file():
            raise ValueError(f"The tokenizer file {path} does not exist.")
    stage = directory / STAGE_NAME
    with disk_errors("write", directory):
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
        try:
            _write_weights(model, stage, max_shard_bytes, dtype)
            _write_json(stage / "generation_config.json", {"do_sample": False, **tokens})
            _write_json(stage / CONFIG_NAME, config)
            for path in tokenizer_files:
                shutil.copyfile(path, stage / path.name)
            sync_tree(stage)
            _move_into_place(stage, directory)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _write_weights(model: Decoder, stage: Path, max_shard_bytes: int, dtype: torch.dtype) -> None:
    shards, total = _shards(pieces(model), max_shard_bytes, dtype)
    state, weight_map = model.state_dict(), {}
    for number, shard in enumerate(shards, start=1):
        file_name = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _to_disk(state[piece.name][piece.where], piece, dtype) for name, piece in shard.items()}
        try:
            save_file(tensors, stage / file_name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{file_name}: {error}") from error
        weight_map.update(dict.fromkeys(shard, file_name))
    if len(shards) > 1:
        _write_json(stage / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(parts: Mapping[str, Piece], max_shard_bytes: int, dtype: torch.dtype) -> tuple[list[dict[str, Piece]], int]:
    """Consecutive pieces, each shard as full as the limit allows (a larger tensor has its own); and the total bytes."""
    shards: list[dict[str, Piece]] = [{}]
    filled = total = 0
    for name, piece in parts.items():
        size = torch.Size(piece.shape).numel() * _disk_dtype(piece, dtype).itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = piece
        filled, total = filled + size, total + size
    return shards, total


def _disk_dtype(piece: Piece, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if piece.name.endswith(KEPT_FLOAT32) else dtype


def _to_disk(tensor: Tensor, piece: Piece, dtype: torch.dtype) -> Tensor:
    """A copy of its own: safetensors refuses views that share their memory."""
    return tensor.detach().to("cpu", _disk_dtype(piece, dtype), copy=True).contiguous()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _move_into_place(stage: Path, directory: Path) -> None:
    (directory / CONFIG_NAME).unlink(missing_ok=True)
    sync_directory(directory)
    names = {path.name for path in stage.iterdir()}
    for path in directory.iterdir():
        stale = path.name == INDEX_NAME or re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", path.name)
        if stale and path.name not in names:
            path.unlink()
    for name in sorted(names - {CONFIG_NAME}):
        os.replace(stage / name, directory / name)
    sync_directory(directory)
    os.replace(stage / CONFIG_NAME, directory / CONFIG_NAME)
    sync_directory(directory)
