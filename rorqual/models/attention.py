"""Attention: grouped-query (GQA) and multi-head latent (MLA), on packed tokens and against a cache.

Both offer the same two calls. `forward(x_TD, rotation, layout)` serves training: packed tokens, no cache.
`forward_cached(x_ND, rotation, columns, layout)` serves generation: it writes the new tokens to the cache and
attends to all. MLA decodes in its absorbed form: the up-projections move onto the query and the output, so that all
heads read one latent a token (multi-query attention over kv_lora_rank + rope dimensions; DeepSeek-V2, arXiv
2405.04434, section 2.1).

Shapes: T packed tokens, R rows, Q queries a row, N = R*Q, K keys a row, D hidden, H heads, G key-value heads, J = H/G,
E head dimension, N (after H) no-position dimension, P rotary dimension, V value dimension, L latent rank, S slots, C
capacity of a slot.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.models.cache import CachedLayout
from rorqual.models.config import MLAConfig, ModelConfig
from rorqual.models.layout import AttentionBlock, PackedLayout
from rorqual.models.pointwise import RMSNorm
from rorqual.models.rope import Rotation, softmax_scale
from rorqual.ops.cpu import attention as kernels
from rorqual.ops.cpu.compiled import array, serves

HALF_PRECISION = (torch.float16, torch.bfloat16)


class GroupedQueryAttention(nn.Module):
    """Llama, Qwen2 (biases on q, k, v), Qwen3 (norms on q and k)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.scale = config.head_dim**-0.5
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_TD: Tensor, rotation: Rotation, layout: PackedLayout) -> Tensor:
        q_THE, k_TGE, v_TGE = self._project(x_TD, rotation)
        return self.o_proj(attend_packed(q_THE, k_TGE, v_TGE, layout, self.scale))

    def forward_cached(self, x_ND: Tensor, rotation: Rotation, columns: list[Tensor], layout: CachedLayout) -> Tensor:
        q_NHE, k_NGE, v_NGE = self._project(x_ND, rotation)
        layout.write(columns, (k_NGE.flatten(1), v_NGE.flatten(1)))
        return self._attend_cached(q_NHE, columns, layout)

    def _attend_cached(self, q_NHE: Tensor, columns: list[Tensor], layout: CachedLayout) -> Tensor:
        """What the block adds [N, D], the new tokens being in the cache."""
        k_SCGE, v_SCGE = (column.unflatten(-1, (self.num_kv_heads, -1)) for column in columns[:2])
        if layout.one_query:
            return self.o_proj(attend_once(q_NHE, k_SCGE, v_SCGE, self.head_dim, layout, self.scale).flatten(1))
        k_RGKE, v_RGKE = layout.read(k_SCGE).transpose(1, 2), layout.read(v_SCGE).transpose(1, 2)
        q_RHQE = q_NHE.unflatten(0, (layout.num_rows, -1)).transpose(1, 2)
        out_RHQE = attend(q_RHQE, k_RGKE, v_RGKE, layout.bias_RQK, self.scale)
        return self.o_proj(out_RHQE.transpose(1, 2).reshape(len(q_NHE), -1))

    def _project(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q_norm(self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim)))
        k = self.k_norm(self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim)))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        return rotation.rotate(q), rotation.rotate(k), v


class MultiHeadLatentAttention(nn.Module):
    """DeepSeek-V2/V3. The cache keeps the normalised latent and the rotated key that all heads share."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        mla = _mla(config)
        self.num_heads = config.num_heads
        self.nope_dim, self.rope_dim, self.value_dim = mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim
        self.latent_dim = mla.kv_lora_rank
        query_width = config.num_heads * (self.nope_dim + self.rope_dim)
        self.scale = softmax_scale(config.rope, self.nope_dim + self.rope_dim)
        self.q_lora = mla.q_lora_rank is not None
        if mla.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, mla.q_lora_rank, bias=config.qkv_bias)
            self.q_a_layernorm = RMSNorm(mla.q_lora_rank, eps=1e-6)
            self.q_b_proj = nn.Linear(mla.q_lora_rank, query_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, self.latent_dim + self.rope_dim, bias=config.qkv_bias)
        self.kv_a_layernorm = RMSNorm(self.latent_dim, eps=1e-6)
        self.kv_b_proj = nn.Linear(self.latent_dim, config.num_heads * (self.nope_dim + self.value_dim), bias=False)
        self.o_proj = nn.Linear(config.num_heads * self.value_dim, config.hidden_size, bias=config.output_bias)

    def forward(self, x_TD: Tensor, rotation: Rotation, layout: PackedLayout) -> Tensor:
        q_nope_THN, q_rope_THP, latent_TL, k_rope_TP = self._project(x_TD, rotation, self._query_input(x_TD))
        k_THE, v_THV = self._expand(latent_TL, k_rope_TP)
        q_THE = torch.cat((q_nope_THN, q_rope_THP), dim=-1)
        return self.o_proj(attend_packed(q_THE, k_THE, v_THV, layout, self.scale))

    def forward_cached(self, x_ND: Tensor, rotation: Rotation, columns: list[Tensor], layout: CachedLayout) -> Tensor:
        q_nope, q_rope, latent, k_rope = self._project(x_ND, rotation, self._query_input(x_ND))
        layout.write(columns, (torch.cat((latent, k_rope), dim=-1),))
        return self._attend_cached(q_nope, q_rope, columns, layout)

    def _attend_cached(self, q_nope: Tensor, q_rope: Tensor, columns: list[Tensor], layout: CachedLayout) -> Tensor:
        """What the block adds [N, D], the new tokens being in the cache."""
        if layout.one_query:
            return self._decode_absorbed(q_nope, q_rope, columns[0].unsqueeze(2), layout)
        latent_RKL, k_rope_RKP = layout.read(columns[0]).split((self.latent_dim, self.rope_dim), dim=-1)
        k_RKHE, v_RKHV = self._expand(latent_RKL, k_rope_RKP)
        q_RHQE = torch.cat((q_nope, q_rope), dim=-1).unflatten(0, (layout.num_rows, -1)).transpose(1, 2)
        out_RHQV = attend(q_RHQE, k_RKHE.transpose(1, 2), v_RKHV.transpose(1, 2), layout.bias_RQK, self.scale)
        return self.o_proj(out_RHQV.transpose(1, 2).reshape(len(q_nope), -1))

    def _query_input(self, x: Tensor) -> Tensor:
        """What the queries are made of: the normalised query latent, or `x` itself."""
        return self.q_a_layernorm(self.q_a_proj(x)) if self.q_lora else x

    def _project(self, x: Tensor, rotation: Rotation, query_input: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries (without and with position), the normalised latent, the rotated shared key."""
        q = self.q_b_proj(query_input) if self.q_lora else self.q_proj(query_input)
        q_nope, q_rope = q.unflatten(-1, (self.num_heads, -1)).split((self.nope_dim, self.rope_dim), dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((self.latent_dim, self.rope_dim), dim=-1)
        k_rope = rotation.rotate(k_rope.unsqueeze(-2)).squeeze(-2)
        return q_nope, rotation.rotate(q_rope), self.kv_a_layernorm(latent), k_rope

    def _expand(self, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Per-head keys and values from latents: [..., H, N+P] and [..., H, V]."""
        kv = self.kv_b_proj(latent).unflatten(-1, (self.num_heads, -1))
        k_nope, v = kv.split((self.nope_dim, self.value_dim), dim=-1)
        k_rope = k_rope.unsqueeze(-2).expand(*k_nope.shape[:-1], self.rope_dim)
        return torch.cat((k_nope, k_rope), dim=-1), v

    def _decode_absorbed(
        self, q_nope_RHN: Tensor, q_rope_RHP: Tensor, cached_SC1E: Tensor, layout: CachedLayout
    ) -> Tensor:
        """One query a row against the latents themselves; the softmax scale stays that of N + P dimensions."""
        q_RHE = self._absorb_query(q_nope_RHN, q_rope_RHP)
        out_RHL = attend_once(q_RHE, cached_SC1E, cached_SC1E, self.latent_dim, layout, self.scale)
        return self.o_proj(self._raise_value(out_RHL).flatten(1))

    def _up_projections(self) -> tuple[Tensor, Tensor]:
        """From the latent to each head's keys [H, N, L] and values [H, V, L]."""
        up_HXL = self.kv_b_proj.weight.view(self.num_heads, self.nope_dim + self.value_dim, self.latent_dim)
        key_up_HNL, value_up_HVL = up_HXL.split((self.nope_dim, self.value_dim), dim=1)
        return key_up_HNL, value_up_HVL

    def _absorb_query(self, q_nope_RHN: Tensor, q_rope_RHP: Tensor) -> Tensor:
        """Queries against the latents themselves: [R, H, L+P]."""
        q_latent_RHL = torch.bmm(q_nope_RHN.transpose(0, 1), self._up_projections()[0]).transpose(0, 1)
        return torch.cat((q_latent_RHL, q_rope_RHP), dim=-1)

    def _raise_value(self, out_RHL: Tensor) -> Tensor:
        """Values from mixed latents: [R, H, V]."""
        return torch.bmm(out_RHL.transpose(0, 1), self._up_projections()[1].transpose(1, 2)).transpose(0, 1)


def _mla(config: ModelConfig) -> MLAConfig:
    if config.mla is None:
        raise ValueError("MultiHeadLatentAttention needs ModelConfig.mla; set it, or use grouped-query attention.")
    return config.mla


def attend_once(
    q_RHE: Tensor, k_SCGE: Tensor, v_SCGV: Tensor, value_dim: int, layout: CachedLayout, scale: float
) -> Tensor:
    """One query a row and head against the cached keys and values of all slots: [R, H, value_dim].

    The J query heads that share keys are taken together, so that the keys are read once. Of a cached value the first
    `value_dim` numbers count.
    """
    if layout.reads is not None and serves(q_RHE) and not torch.is_grad_enabled():
        out_RHV = q_RHE.new_empty(*q_RHE.shape[:2], value_dim)
        arrays = (array(q_RHE), array(k_SCGE), array(v_SCGV))
        kernels.attend_once(*arrays, layout.reads, scale, out_RHV.numpy())
        return out_RHV
    k_RGKE, v_RGKV = layout.read(k_SCGE).transpose(1, 2), layout.read(v_SCGV)[..., :value_dim].transpose(1, 2)
    bias_RQK = layout.bias_RQK
    bias_R11K = None if bias_RQK is None else bias_RQK[:, None]
    q_RGJE = q_RHE.unflatten(1, (k_RGKE.shape[1], -1))
    return F.scaled_dot_product_attention(q_RGJE, k_RGKE, v_RGKV, attn_mask=bias_R11K, scale=scale).flatten(1, 2)


def attend(
    q_RHQE: Tensor, k_RGKE: Tensor, v_RGKV: Tensor, mask_RQK: Tensor | None, scale: float, causal: bool = False
) -> Tensor:
    """Softmax attention of H query heads over G key-value heads: [R, H, Q, V]. `mask_RQK`: booleans or a bias.

    On a GPU, shared keys in float32 or under a mask are read by the one kernel that writes all scores to memory; there
    each head gets its own.
    """
    num_heads = q_RHQE.shape[1]
    if q_RHQE.device.type != "cpu" and (mask_RQK is not None or q_RHQE.dtype not in HALF_PRECISION):
        k_RGKE, v_RGKV = one_each(k_RGKE, num_heads), one_each(v_RGKV, num_heads)
    mask_R1QK = None if mask_RQK is None else mask_RQK[:, None]
    missing = q_RHQE.shape[-1] - v_RGKV.shape[-1]
    if q_RHQE.device.type == "cpu" and missing > 0:
        v_RGKV = F.pad(v_RGKV, (0, missing))  # Of unlike widths, a CPU would write all scores to memory.
    out_RHQV = F.scaled_dot_product_attention(
        q_RHQE,
        k_RGKE,
        v_RGKV,
        attn_mask=mask_R1QK,
        is_causal=causal,
        scale=scale,
        enable_gqa=num_heads != k_RGKE.shape[1],
    )
    return out_RHQV[..., :-missing] if q_RHQE.device.type == "cpu" and missing > 0 else out_RHQV


def one_each(x_RGKE: Tensor, num_heads: int) -> Tensor:
    """Key-value heads repeated for the query heads that share them: [R, H, K, E]."""
    num_sharing = num_heads // x_RGKE.shape[1]
    return x_RGKE if num_sharing == 1 else x_RGKE.repeat_interleave(num_sharing, dim=1)


def attend_packed(q_THE: Tensor, k_TGE: Tensor, v_TGV: Tensor, layout: PackedLayout, scale: float) -> Tensor:
    """Softmax attention block by block; returns [T, H*V] in packed order."""
    return layout.in_packed_order([_attend_block(q_THE, k_TGE, v_TGV, block, scale) for block in layout.blocks])


def _attend_block(q_THE: Tensor, k_TGE: Tensor, v_TGV: Tensor, block: AttentionBlock, scale: float) -> Tensor:
    mask_RQK = block.mask_RQK()
    q_RHQE = _take(q_THE, block.query_index_RQ)
    k_RGKE, v_RGKV = _take(k_TGE, block.key_index_RK), _take(v_TGV, block.key_index_RK)
    out_RHQV = attend(q_RHQE, k_RGKE, v_RGKV, mask_RQK, scale, causal=mask_RQK is None)
    return out_RHQV.transpose(1, 2).flatten(2)


def _take(x_THE: Tensor, index_RQ: Tensor) -> Tensor:
    """Rows of packed tokens as [R, H, Q, E]."""
    rows = x_THE.index_select(0, index_RQ.flatten())
    return rows.view(*index_RQ.shape, *x_THE.shape[1:]).transpose(1, 2)
