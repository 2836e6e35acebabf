"""The decoder: one transformer for every family in ModelConfig.

In: packed token ids and a PackedLayout (training), or rows of new tokens and a cache (generation).
Out: hidden states after the last norm, and the experts that each token visited. Logits are left to the caller:
training takes log-probs of chosen tokens without ever holding [T, vocabulary].

Shapes: T packed tokens, R rows, Q queries a row, N = R*Q, D hidden, V vocabulary, L mixture-of-experts layers, K
experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rorqual.models.attention import GroupedQueryAttention, attention_class
from rorqual.models.cache import CachedLayout, KVCache
from rorqual.models.config import ModelConfig
from rorqual.models.fused import FusedBlock, decode_fused
from rorqual.models.layout import PackedLayout
from rorqual.models.moe import MLP, Experts, MixtureOfExperts, Router
from rorqual.models.pointwise import RMSNorm
from rorqual.models.rope import Rope, Rotation


@dataclass(frozen=True)
class DecoderOutput:
    """hidden: [T, D] or [R, Q, D], after the last norm. routes: int64 [tokens, L, K], None without experts."""

    hidden: Tensor
    routes: Tensor | None


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = attention_class(config)(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp: MLP | MixtureOfExperts
        if config.moe is not None and layer in config.moe_layers:
            self.mlp = MixtureOfExperts(config.moe, config.hidden_size)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.fused: FusedBlock | None = None
        if isinstance(self.self_attn, GroupedQueryAttention) and isinstance(self.mlp, MLP):
            self.fused = FusedBlock(self.input_layernorm, self.self_attn, self.post_attention_layernorm, self.mlp)

    def forward(
        self, x_TD: Tensor, rotation: Rotation, layout: PackedLayout, forced_TK: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), rotation, layout)
        return self._feed_forward(x_TD, forced_TK)

    def forward_cached(
        self, x_ND: Tensor, rotation: Rotation, columns: list[Tensor], layout: CachedLayout
    ) -> tuple[Tensor, Tensor | None]:
        x_ND = x_ND + self.self_attn.forward_cached(self.input_layernorm(x_ND), rotation, columns, layout)
        return self._feed_forward(x_ND, None)

    def _feed_forward(self, x_TD: Tensor, forced_TK: Tensor | None) -> tuple[Tensor, Tensor | None]:
        normed_TD = self.post_attention_layernorm(x_TD)
        if isinstance(self.mlp, MLP):
            return x_TD + self.mlp(normed_TD), None
        out_TD, experts_TK = self.mlp(normed_TD, forced_TK)
        return x_TD + out_TD, experts_TK


class Decoder(nn.Module):
    """Parameter names follow the Hugging Face checkpoints, but for the experts, which are stacked.

    checkpoint_activations: training keeps the input of each block alone and computes its inside again in backward, with
    the same experts (arXiv 1604.06174): a third more computation for a fraction of the memory, and the same gradients.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rope = Rope(config.rope, config.mla.qk_rope_head_dim if config.mla else config.head_dim)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def unembedding_VD(self) -> Tensor:
        """Weight that turns hidden states into logits; the embedding itself when tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, token_ids_T: Tensor, layout: PackedLayout, routes_TLK: Tensor | None = None) -> DecoderOutput:
        """Hidden states [T, D] of packed tokens. `routes_TLK` forces the experts; rows of -1 leave the router free.

        Raises: ValueError when the routes are not those of T tokens and of this model's mixture-of-experts layers.
        """
        forced = self._forced_experts(routes_TLK, len(token_ids_T))
        x_TD = self.embed_tokens(token_ids_T)
        rotation = self.rope(layout.positions_T, x_TD.dtype)
        chosen: list[Tensor] = []
        for layer, block in enumerate(self.layers):
            x_TD, experts_TK = self._run_block(cast(Block, block), x_TD, rotation, layout, forced.get(layer))
            if experts_TK is not None:
                chosen.append(experts_TK)
        return DecoderOutput(self.norm(x_TD), torch.stack(chosen, dim=1) if chosen else None)

    def _run_block(
        self, block: Block, x_TD: Tensor, rotation: Rotation, layout: PackedLayout, forced_TK: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.checkpoint_activations and self.training and torch.is_grad_enabled():
            x_TD, experts_TK = _checkpointed(block, x_TD, rotation, layout, forced_TK)
        else:
            x_TD, experts_TK = block(x_TD, rotation, layout, forced_TK)
        if self.training and experts_TK is not None and isinstance(block.mlp, MixtureOfExperts):
            block.mlp.gate.count(experts_TK)
        return x_TD, experts_TK

    def _forced_experts(self, routes_TLK: Tensor | None, num_tokens: int) -> dict[int, Tensor]:
        """The forced experts [T, K] of each mixture-of-experts layer, by the layer's index."""
        if routes_TLK is None:
            return {}
        layers = self.config.moe_layers
        per_token = self.config.moe.experts_per_token if self.config.moe else 0
        if tuple(routes_TLK.shape) != (num_tokens, len(layers), per_token):
            raise ValueError(
                f"The recorded routes are {list(routes_TLK.shape)}; expected [tokens, mixture-of-experts layers, "
                f"experts a token] = {[num_tokens, len(layers), per_token]}. They come from another model, or from "
                "other tokens: sample anew, or turn keep_routing off."
            )
        return {layer: routes_TLK[:, index] for index, layer in enumerate(layers)}

    def forward_cached(self, token_ids_RQ: Tensor, cache: KVCache, layout: CachedLayout) -> DecoderOutput:
        """Hidden states [R, Q, D] of new tokens, which are written to the cache; routes are [R*Q, L, K]."""
        x_ND = self.embed_tokens(token_ids_RQ.flatten())
        rotation = self.rope(layout.positions_RQ.flatten(), x_ND.dtype)
        blocks = [cast(Block, block) for block in self.layers]
        fused_RD = decode_fused([block.fused for block in blocks], x_ND, rotation, cache, layout)
        if fused_RD is not None:
            return DecoderOutput(self.norm(fused_RD).unsqueeze(1), None)
        chosen: list[Tensor] = []
        for block, columns in zip(blocks, cache.columns, strict=True):
            x_ND, experts = block.forward_cached(x_ND, rotation, columns, layout)
            if experts is not None:
                chosen.append(experts)
        hidden_RQD = self.norm(x_ND).view(*token_ids_RQ.shape, -1)
        return DecoderOutput(hidden_RQD, torch.stack(chosen, dim=1) if chosen else None)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        return F.linear(hidden, self.unembedding_VD)

    def new_cache(self, num_slots: int, capacity: int) -> KVCache:
        """An empty cache in the model's dtype, on its device."""
        widths = attention_class(self.config).cache_widths(self.config)
        return KVCache(self.config.num_layers, widths, num_slots, capacity, like=self.embed_tokens.weight)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Normal weights of standard deviation `initializer_range`, smaller where a block writes to the residual
        stream."""
        depth_scale = (2 * self.config.num_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            writes_residual = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
            std = self.config.initializer_range * (depth_scale if writes_residual else 1.0)
            parameter.normal_(0.0, std, generator=generator)

    def update_expert_bias(self) -> None:
        """Auxiliary-loss-free balancing, once after each optimiser step of pre-training (arXiv 2408.15664)."""
        for module in self.modules():
            if isinstance(module, Router):
                module.balance()

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token meets: all but the experts that it does not visit."""
        moe = self.config.moe
        if moe is None:
            return self.num_parameters
        routed = sum(p.numel() for m in self.modules() if isinstance(m, Experts) for p in m.parameters())
        return self.num_parameters - routed + routed * moe.experts_per_token // moe.num_experts


def _checkpointed(
    block: Block, x_TD: Tensor, rotation: Rotation, layout: PackedLayout, forced_TK: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The block's output. Its second run, in backward, is forced to the experts that the first one chose."""
    chosen: list[Tensor | None] = []

    def run(x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        out_TD, experts_TK = block(x_TD, rotation, layout, chosen[0] if chosen else forced_TK)
        if not chosen:
            chosen.append(experts_TK)
        return out_TD, experts_TK

    output: tuple[Tensor, Tensor | None] = checkpoint(run, x_TD, use_reentrant=False, preserve_rng_state=False)
    return output
