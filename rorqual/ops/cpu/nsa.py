"""Native Sparse Attention on a CPU: the selected branch in compiled loops, on all cores; the others are dense attention
under a mask, which torch does well.

Shapes: as in `nsa.py`.
"""

from __future__ import annotations

from torch import Tensor

from rorqual.ops import nsa_tiled
from rorqual.ops.cpu import dsa as dsa_cpu
from rorqual.ops.nsa import BlockSizes, Branches


def native_sparse_attention(
    q_RQHE: Tensor, branches: Branches, gates_RQH3: Tensor, position_RQ: Tensor, sizes: BlockSizes, scale: float
) -> Tensor:
    """`nsa.native_sparse_attention`: [R, Q, H, E]."""
    attend = dsa_cpu.grouped_sparse_attention
    return nsa_tiled.native_sparse_attention(q_RQHE, branches, gates_RQH3, position_RQ, sizes, scale, attend)
