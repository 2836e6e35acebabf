"""Attention: grouped-query (GQA) and multi-head latent (MLA), on packed tokens and against a cache.

Both kinds offer the same two calls. `forward(x_TD, rotation, layout)` serves training: packed tokens, no cache.
`forward_cached(x_ND, rotation, columns, layout)` serves generation: it writes the new tokens to the cache and
attends to all. MLA decodes in its absorbed form: the up-projections move onto the query and the output, so that all
heads read one latent a token (multi-query attention over kv_lora_rank + rope dimensions; DeepSeek-V2, arXiv
2405.04434, section 2.1).

Shapes: T packed tokens, R rows, Q queries a row, N = R*Q, K keys a row, D hidden, H heads, G key-value heads, J = H/G,
E head dimension, N (after H) no-position dimension, P rotary dimension, V value dimension, L latent rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.models.cache import CachedLayout, SharedPrefix
from rorqual.models.config import MLAConfig, ModelConfig
from rorqual.models.layout import AttentionBlock, PackedLayout
from rorqual.models.pointwise import RMSNorm
from rorqual.models.rope import Rotation, softmax_scale

HALF_PRECISION = (torch.float16, torch.bfloat16)

WHOLE_ROW_HEADS = 4
"""On a CPU, decoding reads the keys of up to so many key-value heads as one row."""


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

    @staticmethod
    def cache_widths(config: ModelConfig) -> tuple[int, ...]:
        return (config.num_kv_heads * config.head_dim,) * 2

    def forward(self, x_TD: Tensor, rotation: Rotation, layout: PackedLayout) -> Tensor:
        q_THE, k_TGE, v_TGE = self._project(x_TD, rotation)
        return self.o_proj(attend_packed(q_THE, k_TGE, v_TGE, layout, self.scale))

    def forward_cached(self, x_ND: Tensor, rotation: Rotation, columns: list[Tensor], layout: CachedLayout) -> Tensor:
        q_NHE, k_NGE, v_NGE = self._project(x_ND, rotation)
        layout.write(columns, (k_NGE.flatten(1), v_NGE.flatten(1)))
        k_RKW, v_RKW = layout.read(columns[0]), layout.read(columns[1])
        if len(x_ND) == layout.num_rows:
            q_RGJE = q_NHE.unflatten(1, (self.num_kv_heads, -1))
            return self.o_proj(_attend_once(q_RGJE, k_RKW, v_RKW, layout, self.scale))
        k_RGKE = k_RKW.unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)
        v_RGKE = v_RKW.unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)
        q_RHQE = q_NHE.unflatten(0, (layout.num_rows, -1)).transpose(1, 2)
        out_RHQE = attend(q_RHQE, k_RGKE, v_RGKE, layout.bias_RQK, self.scale)
        return self.o_proj(out_RHQE.transpose(1, 2).reshape(len(x_ND), -1))

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

    @staticmethod
    def cache_widths(config: ModelConfig) -> tuple[int, ...]:
        mla = _mla(config)
        return (mla.kv_lora_rank, mla.qk_rope_head_dim)

    def forward(self, x_TD: Tensor, rotation: Rotation, layout: PackedLayout) -> Tensor:
        q_nope_THN, q_rope_THP, latent_TL, k_rope_TP = self._project(x_TD, rotation)
        k_THE, v_THV = self._expand(latent_TL, k_rope_TP)
        q_THE = torch.cat((q_nope_THN, q_rope_THP), dim=-1)
        return self.o_proj(attend_packed(q_THE, k_THE, v_THV, layout, self.scale))

    def forward_cached(self, x_ND: Tensor, rotation: Rotation, columns: list[Tensor], layout: CachedLayout) -> Tensor:
        q_nope, q_rope, latent, k_rope = self._project(x_ND, rotation)
        layout.write(columns, (latent, k_rope))
        latent_RKL, k_rope_RKP = layout.read(columns[0]), layout.read(columns[1])
        if len(x_ND) == layout.num_rows:
            return self._decode_absorbed(q_nope, q_rope, latent_RKL, k_rope_RKP, layout.bias_RQK)
        k_RKHE, v_RKHV = self._expand(latent_RKL, k_rope_RKP)
        q_RHQE = torch.cat((q_nope, q_rope), dim=-1).unflatten(0, (layout.num_rows, -1)).transpose(1, 2)
        out_RHQV = attend(q_RHQE, k_RKHE.transpose(1, 2), v_RKHV.transpose(1, 2), layout.bias_RQK, self.scale)
        return self.o_proj(out_RHQV.transpose(1, 2).reshape(len(x_ND), -1))

    def _project(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries (without and with position), the normalised latent, the rotated shared key."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.q_lora else self.q_proj(x)
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
        self, q_nope_RHN: Tensor, q_rope_RHP: Tensor, latent_RKL: Tensor, k_rope_RKP: Tensor, bias_R1K: Tensor | None
    ) -> Tensor:
        """One query a row against the latents themselves; the softmax scale stays that of N + P dimensions."""
        up_HXL = self.kv_b_proj.weight.view(self.num_heads, self.nope_dim + self.value_dim, self.latent_dim)
        key_up_HNL, value_up_HVL = up_HXL.split((self.nope_dim, self.value_dim), dim=1)
        q_latent_RHL = torch.bmm(q_nope_RHN.transpose(0, 1), key_up_HNL).transpose(0, 1)
        scores_RHK = torch.bmm(q_latent_RHL, latent_RKL.transpose(1, 2))
        scores_RHK = torch.baddbmm(scores_RHK, q_rope_RHP, k_rope_RKP.transpose(1, 2)).mul_(self.scale)
        scores_RHK = scores_RHK if bias_R1K is None else scores_RHK.add_(bias_R1K)
        out_RHL = torch.bmm(scores_RHK.softmax(dim=-1), latent_RKL)
        out_RHV = torch.bmm(out_RHL.transpose(0, 1), value_up_HVL.transpose(1, 2)).transpose(0, 1)
        return self.o_proj(out_RHV.reshape(len(out_RHV), -1))


def attention_class(config: ModelConfig) -> type[GroupedQueryAttention] | type[MultiHeadLatentAttention]:
    """The module that `config.attention` and `config.mla` name. Raises: ValueError for a kind that there is not."""
    if config.attention not in ATTENTION:
        raise ValueError(f"There is no attention {config.attention!r}; there is {', '.join(ATTENTION)}.")
    grouped_query, latent = ATTENTION[config.attention]
    return latent if config.mla else grouped_query


ATTENTION = {"dense": (GroupedQueryAttention, MultiHeadLatentAttention)}
"""Attention kind -> its form for grouped-query models, and its form for latent ones."""


def _mla(config: ModelConfig) -> MLAConfig:
    if config.mla is None:
        raise ValueError("MultiHeadLatentAttention needs ModelConfig.mla; set it, or use grouped-query attention.")
    return config.mla


def _attend_once(q_RGJE: Tensor, k_RKW: Tensor, v_RKW: Tensor, layout: CachedLayout, scale: float) -> Tensor:
    """One query a row and head against cached keys and values, W = G*E wide: [R, H*E].

    The J query heads that share keys are taken together, so that the keys are read once. With few key-value heads the
    keys are read as they lie, against queries that are 0 outside their own head: G times the products, which cost less
    than the copies that separate heads would need.
    """
    num_rows, num_kv_heads, _, head_dim = q_RGJE.shape
    bias_R1K = layout.bias_RQK
    if num_kv_heads > WHOLE_ROW_HEADS or q_RGJE.device.type != "cpu":
        k_RGKE = k_RKW.unflatten(-1, (num_kv_heads, head_dim)).transpose(1, 2)
        v_RGKE = v_RKW.unflatten(-1, (num_kv_heads, head_dim)).transpose(1, 2)
        bias_R11K = None if bias_R1K is None else bias_R1K[:, None]
        out_RGJE = F.scaled_dot_product_attention(q_RGJE, k_RGKE, v_RGKE, attn_mask=bias_R11K, scale=scale)
        return out_RGJE.reshape(num_rows, -1)
    q_RGJGE = q_RGJE.new_zeros(*q_RGJE.shape[:3], num_kv_heads, head_dim)
    q_RGJGE.diagonal(dim1=1, dim2=3).copy_(q_RGJE.permute(0, 2, 3, 1))
    q_RHW = q_RGJGE.flatten(3).flatten(1, 2)
    if layout.shared is not None:
        out_RHW = _attend_shared(q_RHW, k_RKW, v_RKW, bias_R1K, layout.shared, scale)
    else:
        out_RHW = torch.bmm(_scores(q_RHW, k_RKW, bias_R1K, scale).softmax(dim=-1), v_RKW)
    out_RJEG = out_RHW.view(num_rows, num_kv_heads, -1, num_kv_heads, head_dim).diagonal(dim1=1, dim2=3)
    return out_RJEG.permute(0, 3, 1, 2).reshape(num_rows, -1)


def _scores(q_RHW: Tensor, k_RKW: Tensor, bias_R1K: Tensor | None, scale: float) -> Tensor:
    if bias_R1K is None:
        return torch.bmm(q_RHW, k_RKW.transpose(1, 2)).mul_(scale)
    return torch.baddbmm(bias_R1K, q_RHW, k_RKW.transpose(1, 2), alpha=scale)


def _attend_shared(
    q_RHW: Tensor, k_RKW: Tensor, v_RKW: Tensor, bias_R1K: Tensor | None, shared: SharedPrefix, scale: float
) -> Tensor:
    """The keys and values of a shared prefix are read once for all rows that share it; the softmax is over all keys."""
    num_rows, num_heads, width = q_RHW.shape
    split = shared.length
    scores_RHK = q_RHW.new_empty(num_rows, num_heads, k_RKW.shape[1])
    bias_R1K = None if bias_R1K is None else bias_R1K[..., split:]
    scores_RHK[..., split:] = _scores(q_RHW, k_RKW[:, split:], bias_R1K, scale)
    for rows, first in shared.families:
        scores_XK = (q_RHW[rows].flatten(0, 1) @ k_RKW[first, :split].T).mul_(scale)
        scores_RHK[rows, :, :split] = scores_XK.view(-1, num_heads, split)
    weights_RHK = scores_RHK.softmax(dim=-1)
    out_RHW = torch.bmm(weights_RHK[..., split:], v_RKW[:, split:])
    for rows, first in shared.families:
        weights_XK = weights_RHK[rows, :, :split].reshape(-1, split)
        out_RHW[rows] += (weights_XK @ v_RKW[first, :split]).view(-1, num_heads, width)
    return out_RHW


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
    return F.scaled_dot_product_attention(
        q_RHQE,
        k_RGKE,
        v_RGKV,
        attn_mask=mask_R1QK,
        is_causal=causal,
        scale=scale,
        enable_gqa=num_heads != k_RGKE.shape[1],
    )


def one_each(x_RGKE: Tensor, num_heads: int) -> Tensor:
    """Key-value heads repeated for the query heads that share them: [R, H, K, E]."""
    num_sharing = num_heads // x_RGKE.shape[1]
    return x_RGKE if num_sharing == 1 else x_RGKE.repeat_interleave(num_sharing, dim=1)


def attend_packed(q_THE: Tensor, k_TGE: Tensor, v_TGV: Tensor, layout: PackedLayout, scale: float) -> Tensor:
    """Softmax attention block by block; returns [T, H*V] in packed order."""
    outputs = [_attend_block(q_THE, k_TGE, v_TGV, block, scale) for block in layout.blocks]
    flat = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return flat if layout.gather_T is None else flat.index_select(0, layout.gather_T)


def _attend_block(q_THE: Tensor, k_TGE: Tensor, v_TGV: Tensor, block: AttentionBlock, scale: float) -> Tensor:
    mask_RQK = block.mask_RQK()
    q_RHQE = _take(q_THE, block.query_index_RQ)
    k_RGKE, v_RGKV = _take(k_TGE, block.key_index_RK), _take(v_TGV, block.key_index_RK)
    out_RHQV = attend(q_RHQE, k_RGKE, v_RGKV, mask_RQK, scale, causal=mask_RQK is None)
    return out_RHQV.transpose(1, 2).flatten(2).flatten(0, 1)


def _take(x_THE: Tensor, index_RQ: Tensor) -> Tensor:
    """Rows of packed tokens as [R, H, Q, E]."""
    rows = x_THE.index_select(0, index_RQ.flatten())
    return rows.view(*index_RQ.shape, *x_THE.shape[1:]).transpose(1, 2)
