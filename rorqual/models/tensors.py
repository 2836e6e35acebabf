"""Reading the safetensors files of a checkpoint directory, one tensor at a time, with errors that say what is wrong.

FP8 weights with block scales (DeepSeek-V3, arXiv 2412.19437, section 3.3) are multiplied out while they are read.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rorqual.models.hf import CONFIG_NAME, read_json

SINGLE_NAME: Final = "model.safetensors"
INDEX_NAME: Final = "model.safetensors.index.json"
SCALE_SUFFIX: Final = "_scale_inv"


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
        return (
            self.fp8_block is not None
            and name.endswith(SCALE_SUFFIX)
            and name.removesuffix(SCALE_SUFFIX) in self._paths
        )

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
                    f"{self.directory / file_name} is missing; {path} places {len(names)} tensors there: "
                    f"{some_names(names)}."
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


def some_names(names: Sequence[str] | Mapping[str, Any], limit: int = 5) -> str:
    shown = list(names)[:limit]
    return ", ".join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "")
