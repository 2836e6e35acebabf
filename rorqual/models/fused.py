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
        self.input_norm, self.attention, self.post_norm, self.mlp = input_norm, attention, post_norm, mlp
        weights = (*attention.parameters(), *mlp.parameters())
        self.small = sum(parameter.numel() for parameter in weights) <= MOST_WEIGHTS
        self.eps = input_norm.eps or 0.0
        self.found: tuple[tuple[int, ...], BlockWeights] | None = None

    def weights(self) -> BlockWeights:
        """The kernel's view of the parameters: the same memory, so that an optimiser's step is seen."""
        parameters = self._parameters()
        # A deep copy brings the arrays of its original along; the id tells them from its own.
        where = (id(self), *(0 if each is None else each.data_ptr() for each in parameters))
        if self.found is None or self.found[0] != where:
            self.found = where, BlockWeights(*(EMPTY if each is None else array(each) for each in parameters))
        return self.found[1]

    def _parameters(self) -> tuple[Tensor | None, ...]:
        """In the order of BlockWeights."""
        a, m = self.attention, self.mlp
        return (
            self.input_norm.weight,
            *(a.q_proj.weight, a.k_proj.weight, a.v_proj.weight, a.q_proj.bias, a.k_proj.bias, a.v_proj.bias),
            *(norm.weight if isinstance(norm, nn.RMSNorm) else None for norm in (a.q_norm, a.k_norm)),
            *(a.o_proj.weight, a.o_proj.bias, self.post_norm.weight),
            *(m.gate_proj.weight, m.up_proj.weight, m.down_proj.weight),
            *(m.gate_proj.bias, m.up_proj.bias, m.down_proj.bias),
        )


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
        num_kv_heads, scale = block.attention.num_kv_heads, block.attention.scale
        keys, values = (array(column.unflatten(-1, (num_kv_heads, -1))) for column in columns)
        decode_block(x, block.weights(), cos, sin, keys, values, reads, block.eps, scale)
    return out_RD
