"""How the cache keeps the indexer's keys: of what it holds, the one thing that each step reads whole.

In FP8 a key is its e4m3 numbers and one power of two, 132 bytes at DeepSeek-V3.2's 128 dimensions, a quarter of
float32. For a model whose indexer rounds its keys so (`DSAConfig.fp8`) nothing is lost; others select by rounded keys.

Shapes: N tokens, C index dimension.
"""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor

from rorqual.models.cache import Column
from rorqual.ops import dsa
from rorqual.ops.cpu.compiled import available
from rorqual.ops.cpu.fp8 import unpack_fp8

IndexKeys = Literal["model", "float32", "bfloat16", "fp8"]
"""model: in the dtype of the weights."""

SCALE_BYTES: Final = 4

DTYPES: Final[dict[str, torch.dtype | None]] = {
    "model": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "fp8": torch.uint8,
}


def index_column(head_dim: int, index_keys: IndexKeys) -> Column:
    """The cache's column. Raises: ValueError for an unknown format."""
    if index_keys not in DTYPES:
        raise ValueError(f"index_keys = {index_keys!r}; expected one of {', '.join(DTYPES)}.")
    return Column(head_dim + SCALE_BYTES if index_keys == "fp8" else head_dim, DTYPES[index_keys])


def pack_index_keys(k_NC: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys as a column of `dtype` holds them: [..., C], or bytes [..., C + 4]."""
    if dtype != torch.uint8:
        return k_NC.to(dtype)
    values, scale = dsa.fp8_quantize(k_NC)
    return torch.cat((values.view(torch.uint8), scale.unsqueeze(-1).view(torch.uint8)), dim=-1)


def unpack_index_keys(stored: Tensor) -> Tensor:
    """Keys [..., C] that can be multiplied, in float32 where they were bytes."""
    if stored.dtype != torch.uint8:
        return stored
    if stored.device.type == "cpu" and available():
        return unpack_fp8(stored.reshape(-1, stored.shape[-1])).view(*stored.shape[:-1], -1)
    values, scale = stored[..., :-SCALE_BYTES], stored[..., -SCALE_BYTES:]
    return values.contiguous().view(torch.float8_e4m3fn).float() * scale.contiguous().view(torch.float32)
