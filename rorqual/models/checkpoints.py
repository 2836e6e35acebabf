"""Hugging Face checkpoints: safetensors, one file or many, to and from a Decoder.

Names on disk are those of `transformers` with a `model.` prefix; each expert's projections are tensors of their own there and
slices of a stack here. `pieces` holds that correspondence once, for reading and writing alike.

Reading goes file by file and tensor by tensor into the model's own memory, so that the peak is the model plus one tensor.
FP8 weights with block scales (DeepSeek-V3, arXiv 2412.19437, section 3.3) are multiplied out while they are read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rorqual.models.config import ModelConfig
from rorqual.models.decoder import Decoder
from rorqual.models.hf import CONFIG_NAME, from_hf_config, read_json, to_hf_config
from rorqual.store.files import disk_errors, sync_directory, sync_tree

SINGLE_NAME: Final = "model.safetensors"
INDEX_NAME: Final = "model.safetensors.index.json"
STAGE_NAME: Final = ".tmp-checkpoint"
KEPT_FLOAT32: Final = "e_score_correction_bias"
SCALE_SUFFIX: Final = "_scale_inv"
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

    dtype: None keeps that of the stored embedding. The routers' correction bias is float32 always. Layers for multi-token
    prediction, which follow the decoder's own, and old files' `rotary_emb.inv_freq` are left out.
    Raises: ValueError naming the tensor and the file, what was expected and what was found, for a missing, unexpected or
    misshapen tensor, a missing or truncated file, an unsupported architecture or quantisation.
    """
    directory = Path(directory)
    raw = read_json(directory / CONFIG_NAME)
    try:
        config = from_hf_config(raw)
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG_NAME}: {error}") from error
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
            f"{_some(unseen)}. The checkpoint is incomplete, or the config is of another model."
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
    if config.family != "deepseek_v3":
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
            f"{directory / CONFIG_NAME}: quantization {method!r} with weight_block_size {block} is not supported; expected "
            "none, or 'fp8' with two block sizes. Use an unquantised checkpoint."
        )
    return int(block[0]), int(block[1])


class TensorReader:
    """The tensors of a checkpoint directory by name, whichever files hold them. Files are opened when first needed."""

    def __init__(self, directory: Path, fp8_block: tuple[int, int] | None = None) -> None:
        self.directory, self.fp8_block = directory, fp8_block
        self._open: dict[Path, Any] = {}
        self._paths = self._index() if (directory / INDEX_NAME).exists() else self._single()

    @property
    def names(self) -> list[str]:
        return list(self._paths)

    def path(self, name: str) -> Path:
        if name not in self._paths:
            raise ValueError(f"{self.directory} has no tensor {name}; the checkpoint is incomplete.")
        return self._paths[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        return self._file(self.path(name)).get_slice(name)[:0].dtype

    def is_scale(self, name: str) -> bool:
        return self.fp8_block is not None and name.removesuffix(SCALE_SUFFIX) in self._paths

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor, multiplied out in float32 if it is stored as FP8. Raises: ValueError for another shape."""
        path, found = self.path(name), self.shape(name)
        if found != shape:
            raise ValueError(f"{path}: {name} has shape {list(found)}, expected {list(shape)} from {CONFIG_NAME}.")
        tensor = self._file(path).get_tensor(name)
        if tensor.dtype == torch.float8_e4m3fn:
            return self._multiply_out(name, tensor)
        if not tensor.is_floating_point() or tensor.element_size() == 1:
            raise ValueError(
                f"{path}: {name} is stored as {tensor.dtype}; expected float32, bfloat16, float16 or FP8 (e4m3)."
            )
        return tensor

    def _multiply_out(self, name: str, weight: Tensor) -> Tensor:
        if self.fp8_block is None:
            raise ValueError(
                f"{self.path(name)}: {name} is stored as FP8, and {CONFIG_NAME} has no quantization_config."
            )
        rows, columns = weight.shape
        block_rows, block_columns = self.fp8_block
        scale = self.read(name + SCALE_SUFFIX, (-(-rows // block_rows), -(-columns // block_columns))).float()
        scale = scale.repeat_interleave(block_rows, 0)[:rows].repeat_interleave(block_columns, 1)[:, :columns]
        return weight.float() * scale

    def _single(self) -> dict[str, Path]:
        path = self.directory / SINGLE_NAME
        if not path.exists():
            raise ValueError(f"{self.directory} has neither {SINGLE_NAME} nor {INDEX_NAME}; fetch the weights.")
        return dict.fromkeys(self._file(path).keys(), path)

    def _index(self) -> dict[str, Path]:
        path = self.directory / INDEX_NAME
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{path} has no weight_map; expected the name of a file for every tensor.")
        by_file: dict[str, list[str]] = {}
        for name, file_name in weight_map.items():
            by_file.setdefault(file_name, []).append(name)
        for file_name, names in by_file.items():
            if Path(file_name).name != file_name:
                raise ValueError(f"{path}: {file_name!r} leads out of the directory; expected a plain file name.")
            if not (self.directory / file_name).exists():
                raise ValueError(
                    f"{self.directory / file_name} is missing; {path} places {len(names)} tensors there: {_some(names)}."
                )
        return {name: self.directory / file_name for file_name, names in by_file.items() for name in names}

    def _slice(self, name: str) -> Any:
        path = self.path(name)
        try:
            return self._file(path).get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{path} does not hold {name}, although {INDEX_NAME} says so ({error}).") from error

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path} cannot be read: {_what_is_wrong(path)} ({error}). Fetch it again.") from error
        return self._open[path]


def _what_is_wrong(path: Path) -> str:
    """Compares the size that the header promises with the file's own."""
    found = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            return f"expected a header, found {found} bytes"
        header_size = struct.unpack("<Q", prefix)[0]
        if 8 + header_size > found:
            return f"expected at least {8 + header_size} bytes, found {found}: it is truncated or no safetensors file"
        try:
            header = json.loads(file.read(header_size))
            end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            return "its header is not that of a safetensors file"
    return f"expected {8 + header_size + end} bytes, found {found}"


def _some(names: Sequence[str] | Mapping[str, Any], limit: int = 5) -> str:
    shown = list(names)[:limit]
    return ", ".join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "")


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
    `eos_token_id` and `pad_token_id`, null where absent, so that `generate` stops where the tokenizer says and nowhere else.
    All is written aside and then moved into place, `config.json` last: a crash leaves the old checkpoint, the new one, or a
    directory without `config.json`, never a mixture that loads.
    Raises: ValueError when the family cannot express the config, a tokenizer file is absent, or the disk refuses.
    """
    directory = Path(directory)
    dtype = dtype or model.embed_tokens.weight.dtype
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
    """Consecutive pieces, each shard as full as the limit allows (a larger tensor has a shard of its own); total bytes."""
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
