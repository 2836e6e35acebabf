"""Decoding through the compiled block kernel: which models it serves, and the arrays that it is given.

In: the blocks of a Decoder and one new token a row. Out: the hidden states that `Block.forward_cached`, its twin, would
give.

Shapes: R rows, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from rorqual.models.attention import GroupedQueryAttention
from rorqual.models.cache import CachedLayout, KVCache
from rorqual.models.moe import MLP
from rorqual.models.rope import Rotation
from rorqual.ops.cpu.block import BlockWeights, decode_block
from rorqual.ops.cpu.compiled import array, serves

MOST_WEIGHTS = 1 << 21
"""Of a block. The products of larger ones are left to torch, which cuts them to the size of the cache."""

EMPTY = np.empty(0, dtype=np.float32)

NORMS = ("input_layernorm", "post_attention_layernorm")

PARAMETERS = (
    *(("input_layernorm", "weight"), ("q_proj", "weight"), ("k_proj", "weight"), ("v_proj", "weight")),
    *(("q_proj", "bias"), ("k_proj", "bias"), ("v_proj", "bias"), ("q_norm", "weight"), ("k_norm", "weight")),
    *(("o_proj", "weight"), ("o_proj", "bias"), ("post_attention_layernorm", "weight")),
    *(("gate_proj", "weight"), ("up_proj", "weight"), ("down_proj", "weight")),
    *(("gate_proj", "bias"), ("up_proj", "bias"), ("down_proj", "bias")),
)
"""In the order of BlockWeights."""


class FusedBlock:
    """One block as the kernel takes it: the arrays of its parameters, found anew whenever a parameter has moved."""

    def __init__(self, block: nn.Module, attention: GroupedQueryAttention, mlp: MLP) -> None:
        parts = {name: cast(nn.RMSNorm, block.get_submodule(name)) for name in NORMS}
        self.num_kv_heads, self.scale = attention.num_kv_heads, attention.scale
        self.eps = parts["input_layernorm"].eps or 0.0
        self.small = sum(each.numel() for part in (attention, mlp) for each in part.parameters()) <= MOST_WEIGHTS
        # The modules' own tables, because every attribute of a module costs a microsecond, and a step asks for all.
        self.modules = [
            (owner._modules, name, module, type(module))
            for owner in (block, attention, mlp)
            for name, module in owner._modules.items()
        ]
        tables = {name: module._parameters for _, name, module, _ in self.modules if module is not None}
        self.places = [(tables[owner], name) for owner, name in PARAMETERS]
        self.found: tuple[list[int], BlockWeights] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or a pickle, finds the arrays of its own parameters."""
        return {**self.__dict__, "found": None}

    def weights(self) -> BlockWeights | None:
        """The kernel's view of the parameters: the same memory, so that an optimiser's step is seen.

        None where a module was replaced, changed its class or has a hook, or a parameter is not contiguous.
        """
        for table, name, module, kind in self.modules:
            if table.get(name) is not module or type(module) is not kind:
                return None
            if module is not None and (module._forward_hooks or module._forward_pre_hooks):
                return None
        parameters = [table.get(name) for table, name in self.places]
        where = [0 if each is None else each.data_ptr() for each in parameters]
        if self.found is None or self.found[0] != where:
            if not all(each is None or each.is_contiguous() for each in parameters):
                return None
            self.found = where, BlockWeights(*(EMPTY if each is None else array(each) for each in parameters))
        return self.found[1]


def decode_fused(
    blocks: Sequence[FusedBlock | None], x_RD: Tensor, rotation: Rotation, cache: KVCache, layout: CachedLayout
) -> Tensor | None:
    """The hidden states after all blocks, before the last norm; the cache then holds the new tokens.

    None, and nothing done, where the kernel has no form for these blocks, rows or numbers.
    """
    fused, reads = [block for block in blocks if block is not None and block.small], layout.reads
    if len(fused) < len(blocks) or reads is None or rotation.interleaved or torch.is_grad_enabled():
        return None
    if not serves(x_RD):
        return None
    found = [weights for block in fused if (weights := block.weights()) is not None]
    if len(found) < len(fused):
        return None
    out_RD = x_RD.clone()
    x, cos, sin = array(out_RD), array(rotation.cos.squeeze(1)), array(rotation.sin.squeeze(1))
    for block, weights, columns in zip(fused, found, cache.columns, strict=True):
        keys, values = (array(column.view(*column.shape[:2], block.num_kv_heads, -1)) for column in columns)
        decode_block(x, weights, cos, sin, keys, values, reads, block.eps, block.scale)
    return out_RD
