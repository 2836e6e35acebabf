"""Decoding through the compiled block kernel: which models it serves, and the arrays that it is given.

In: the blocks of a Decoder and one new token a row. Out: the hidden states that `Block.forward_cached`, its twin, would
give.

Shapes: R rows, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from rorqual.models.attention import GroupedQueryAttention
from rorqual.models.cache import CachedLayout, KVCache
from rorqual.models.moe import MLP
from rorqual.models.rope import Rotation
from rorqual.ops.block_numba import BlockWeights, decode_block
from rorqual.ops.compiled import array, serves

MOST_WEIGHTS = 1 << 21
"""Of a block. The products of larger ones are left to torch, which cuts them to the size of the cache."""

EMPTY = np.empty(0, dtype=np.float32)


class FusedBlock:
    """One block as the kernel takes it: the arrays of its parameters, found anew whenever a parameter has moved."""

    def __init__(
        self, input_norm: nn.RMSNorm, attention: GroupedQueryAttention, post_norm: nn.RMSNorm, mlp: MLP
    ) -> None:
        self.num_kv_heads, self.scale, self.eps = attention.num_kv_heads, attention.scale, input_norm.eps or 0.0
        self.small = sum(each.numel() for part in (attention, mlp) for each in part.parameters()) <= MOST_WEIGHTS
        a, m = attention, mlp
        owners: tuple[tuple[nn.Module, str], ...] = (
            *((input_norm, "weight"), (a.q_proj, "weight"), (a.k_proj, "weight"), (a.v_proj, "weight")),
            *((a.q_proj, "bias"), (a.k_proj, "bias"), (a.v_proj, "bias"), (a.q_norm, "weight"), (a.k_norm, "weight")),
            *((a.o_proj, "weight"), (a.o_proj, "bias"), (post_norm, "weight")),
            *((m.gate_proj, "weight"), (m.up_proj, "weight"), (m.down_proj, "weight")),
            *((m.gate_proj, "bias"), (m.up_proj, "bias"), (m.down_proj, "bias")),
        )
        # The modules' own tables, because every attribute of a module costs a microsecond, and a step asks for all.
        self.places = [(owner._parameters, name) for owner, name in owners]
        self.found: tuple[list[int], BlockWeights] | None = None

    def weights(self) -> BlockWeights:
        """The kernel's view of the parameters: the same memory, so that an optimiser's step is seen."""
        parameters = [table.get(name) for table, name in self.places]
        # A deep copy brings the arrays of its original along; the id tells them from its own.
        where = [id(self), *[0 if each is None else each.data_ptr() for each in parameters]]
        if self.found is None or self.found[0] != where:
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
    out_RD = x_RD.clone()
    x, cos, sin = array(out_RD), array(rotation.cos.squeeze(1)), array(rotation.sin.squeeze(1))
    for block, columns in zip(fused, cache.columns, strict=True):
        keys, values = (array(column.view(*column.shape[:2], block.num_kv_heads, -1)) for column in columns)
        decode_block(x, block.weights(), cos, sin, keys, values, reads, block.eps, block.scale)
    return out_RD
