"""Native Sparse Attention in the decoder: three branches with keys and values of their own, trained from scratch.

What the paper leaves open is settled here: keys are compressed before they are rotated, and a compressed key is rotated
to the position of its block's last token, at which the block becomes visible; one perceptron for keys and one for
values serve all heads of a layer; the gates' perceptron has one layer. arXiv 2502.11089, section 3.

Shapes: T packed tokens, R rows, Q queries a row, N = R*Q, K keys a row, D hidden, H heads, G key-value heads, E head
dimension, B compressed blocks, L tokens in one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.models.cache import CachedLayout
from rorqual.models.config import ModelConfig, NSAConfig
from rorqual.models.layout import AttentionBlock, PackedLayout
from rorqual.models.pointwise import RMSNorm
from rorqual.models.rope import Rotation
from rorqual.ops import nsa
from rorqual.ops.dispatch import Kernels, nsa_kernels

NUM_COLUMNS = 8
"""In the cache: `TokenColumns`, then keys and values of the compressed blocks, each where its last token stands."""


class TokenColumns(NamedTuple):
    """Keys and values of each token, [T, G, E], for the three branches. Those to be compressed are not rotated."""

    raw_k: Tensor
    raw_v: Tensor
    selected_k: Tensor
    selected_v: Tensor
    window_k: Tensor
    window_v: Tensor


class Compressor(nn.Module):
    """The tokens of a block as one: a perceptron over all of them, each with its place in the block added
    (equation 7)."""

    def __init__(self, block_length: int, head_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(block_length, head_dim))
        self.up_proj = nn.Linear(block_length * head_dim, hidden_size)
        self.down_proj = nn.Linear(hidden_size, head_dim)

    def forward(self, windows_BLGE: Tensor) -> Tensor:
        """[B, G, E]."""
        placed_BGLE = windows_BLGE.transpose(1, 2) + self.position
        out: Tensor = self.down_proj(F.gelu(self.up_proj(placed_BGLE.flatten(-2))))
        return out


class Branch(nn.Module):
    """Keys and values of one branch."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_kv_heads = config.num_kv_heads
        width = config.num_kv_heads * config.head_dim
        self.k_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """[T, G, E] each."""
        k_TGE, v_TGE = (each.unflatten(-1, (self.num_kv_heads, -1)) for each in (self.k_proj(x_TD), self.v_proj(x_TD)))
        return self.k_norm(k_TGE), v_TGE


class NativeSparseAttention(nn.Module):
    """Compression, selection and sliding window, gated for each head and summed (equation 5)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        sizes = _given(config.nsa)
        self.sizes = block_sizes(sizes)
        self.kernels: Kernels = "auto"
        self.num_heads, self.num_kv_heads, self.scale = config.num_heads, config.num_kv_heads, config.head_dim**-0.5
        width = config.num_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.compressed, self.selected, self.window = Branch(config), Branch(config), Branch(config)
        self.compress_k = Compressor(sizes.block_length, config.head_dim, sizes.compressor_size)
        self.compress_v = Compressor(sizes.block_length, config.head_dim, sizes.compressor_size)
        self.gate_proj = nn.Linear(config.hidden_size, 3 * config.num_heads)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.output_bias)

    def forward(self, x_TD: Tensor, rotation: Rotation, layout: PackedLayout) -> Tensor:
        """What the block adds [T, D], for packed tokens."""
        q_THE, columns, gates_TH3 = self._project(x_TD, rotation)
        outputs = []
        for block in layout.blocks:
            queries, keys_RK = block.query_index_RQ, _keys_in_order(block)
            rows = TokenColumns(*(_rows(column, keys_RK) for column in columns))
            last_RB = nsa.windows(keys_RK[..., None, None], self.sizes)[:, :, -1, 0, 0]
            raw_k, raw_v = (nsa.windows(column, self.sizes).flatten(0, 1) for column in rows[:2])
            k_BGE, v_BGE = self._compress(raw_k, raw_v, rotation, last_RB.flatten())
            k_RBGE, v_RBGE = k_BGE.unflatten(0, last_RB.shape), v_BGE.unflatten(0, last_RB.shape)
            position_RQ = layout.positions_T[queries[:, :1]] + torch.arange(queries.shape[1], device=x_TD.device)
            branches = nsa.Branches(k_RBGE, v_RBGE, *rows[2:])
            outputs.append(self._attend(_rows(q_THE, queries), branches, _rows(gates_TH3, queries), position_RQ))
        out: Tensor = self.o_proj(layout.in_packed_order(outputs).flatten(1))
        return out

    def forward_cached(self, x_ND: Tensor, rotation: Rotation, columns: list[Tensor], layout: CachedLayout) -> Tensor:
        """What the block adds [N, D]; writes the new tokens, and the blocks that they complete, to the cache."""
        q_NHE, new, gates_NH3 = self._project(x_ND, rotation)
        layout.write(columns[:6], tuple(column.flatten(1) for column in new))
        self._write_completed(columns, rotation, layout)
        first = self.sizes.length - 1
        blocks = [layout.read(column)[:, first :: self.sizes.stride] for column in columns[6:]]
        read = [self._heads(each) for each in (*blocks, *(layout.read(column) for column in columns[2:6]))]
        q_RQHE, gates_RQH3 = (each.unflatten(0, (layout.num_rows, -1)) for each in (q_NHE, gates_NH3))
        out_RQHE = self._attend(q_RQHE, nsa.Branches(*read), gates_RQH3, layout.positions_RQ)
        out: Tensor = self.o_proj(out_RQHE.flatten(0, 1).flatten(1))
        return out

    def _project(self, x_TD: Tensor, rotation: Rotation) -> tuple[Tensor, TokenColumns, Tensor]:
        """Queries [T, H, E], what the branches keep of the tokens, and gates [T, H, 3]."""
        q_THE = rotation.rotate(self.q_norm(self.q_proj(x_TD).unflatten(-1, (self.num_heads, -1))))
        raw_k, raw_v = self.compressed(x_TD)
        (selected_k, selected_v), (window_k, window_v) = self.selected(x_TD), self.window(x_TD)
        selected_k, window_k = rotation.rotate(selected_k), rotation.rotate(window_k)
        gates_TH3 = self.gate_proj(x_TD).sigmoid().unflatten(-1, (self.num_heads, 3))
        return q_THE, TokenColumns(raw_k, raw_v, selected_k, selected_v, window_k, window_v), gates_TH3

    def _compress(self, k_BLGE: Tensor, v_BLGE: Tensor, rotation: Rotation, last_B: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of blocks [B, G, E]; `last_B` says which of the rotation's tokens are their last ones."""
        at_last = Rotation(rotation.cos[last_B], rotation.sin[last_B], rotation.interleaved)
        return at_last.rotate(self.compress_k(k_BLGE)), self.compress_v(v_BLGE)

    def _attend(self, q_RQHE: Tensor, branches: nsa.Branches, gates_RQH3: Tensor, position_RQ: Tensor) -> Tensor:
        kernels = nsa_kernels(q_RQHE, self.kernels)
        return kernels.native_sparse_attention(q_RQHE, branches, gates_RQH3, position_RQ, self.sizes, self.scale)

    def _write_completed(self, columns: list[Tensor], rotation: Rotation, layout: CachedLayout) -> None:
        """Compress the blocks whose last token is among the new ones."""
        position_N = layout.positions_RQ.flatten()
        begun_N = position_N - (self.sizes.length - 1)
        (ends_B,) = torch.where((begun_N >= 0) & (begun_N % self.sizes.stride == 0))
        if len(ends_B) == 0:
            return
        place_B = layout.write_index_N[ends_B]
        token_BL = place_B[:, None] - torch.arange(self.sizes.length - 1, -1, -1, device=place_B.device)
        k_BLGE, v_BLGE = (self._heads(_rows(column.flatten(0, 1), token_BL)) for column in columns[:2])
        for column, made in zip(columns[6:], self._compress(k_BLGE, v_BLGE, rotation, ends_B), strict=True):
            column.view(-1, column.shape[-1]).index_copy_(0, place_B, made.flatten(1))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_kv_heads, -1))


def block_sizes(config: NSAConfig) -> nsa.BlockSizes:
    """What the operations need of the config."""
    return nsa.BlockSizes(
        config.block_length,
        config.block_stride,
        config.selected_length,
        config.num_selected,
        config.num_initial,
        config.num_local,
        config.window,
    )


def _given(config: NSAConfig | None) -> NSAConfig:
    if config is None:
        raise ValueError("NativeSparseAttention needs ModelConfig.nsa, the sizes of its blocks.")
    return config


def _keys_in_order(block: AttentionBlock) -> Tensor:
    """A row's keys [R, K] so that a token's place is its position in the sequence; padding comes last."""
    if block.key_valid_RK is None:
        return block.key_index_RK
    return block.key_index_RK.gather(1, (~block.key_valid_RK).int().argsort(dim=1, stable=True))


def _rows(x_T: Tensor, index_RK: Tensor) -> Tensor:
    """[R, K, ...]."""
    return x_T.index_select(0, index_RK.flatten()).view(*index_RK.shape, *x_T.shape[1:])
