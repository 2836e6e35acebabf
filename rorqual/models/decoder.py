"""The decoder: one transformer for every family in ModelConfig.

In: packed token ids and a PackedLayout (training), or rows of new tokens and a cache (generation).
Out: hidden states after the last norm, and the experts that each token visited. Logits are left to the caller:
training takes log-probs of chosen tokens without ever holding [T, vocabulary].

Shapes: T packed tokens, R rows, Q queries a row, N = R*Q, D hidden, V vocabulary, L mixture-of-experts layers, K
experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rorqual.models.attention import GroupedQueryAttention
from rorqual.models.cache import CachedLayout, KVCache
from rorqual.models.config import ModelConfig
from rorqual.models.fused import FusedBlock, decode_fused
from rorqual.models.index_keys import IndexKeys
from rorqual.models.kinds import build_attention, cache_columns
from rorqual.models.layout import PackedLayout
from rorqual.models.moe import MLP, Experts, MixtureOfExperts, Router
from rorqual.models.nsa import NativeSparseAttention
from rorqual.models.pointwise import RMSNorm
from rorqual.models.rope import Rope
from rorqual.models.sparse import IndexerLoss, Rotations, SparseAttention, SparseRequest
from rorqual.ops.dispatch import Kernels


@dataclass(frozen=True)
class DecoderOutput:
    """hidden: [T, D] or [R, Q, D], after the last norm. routes: int64 [tokens, L, K], None without experts.

    selections: int64 [tokens, layers with an indexer, selected], None where all keys are attended to as a matter of
    config. indexer_losses: one a layer with an indexer, where they were asked for.
    """

    hidden: Tensor
    routes: Tensor | None
    selections: Tensor | None = None
    indexer_losses: tuple[IndexerLoss, ...] = ()


@dataclass(frozen=True)
class BlockInput:
    """What is given to a block beside the tokens: experts [T, K] and selection to use instead of its own choice, the
    weights of the queries in the indexer's loss, and how many keys to measure the recall of."""

    experts_TK: Tensor | None = None
    selected_TS: Tensor | None = None
    loss_weight_T: Tensor | None = None
    recall_at: int = 0


@dataclass(frozen=True)
class BlockOutput:
    """experts_TK and selected_TS: what the tokens visited and selected."""

    x_TD: Tensor
    experts_TK: Tensor | None
    selected_TS: Tensor | None = None
    indexer_loss: IndexerLoss | None = None


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = build_attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp: MLP | MixtureOfExperts
        if config.moe is not None and layer in config.moe_layers:
            self.mlp = MixtureOfExperts(config.moe, config.hidden_size)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.fused: FusedBlock | None = None
        if type(self.self_attn) is GroupedQueryAttention and isinstance(self.mlp, MLP):
            self.fused = FusedBlock(self, self.self_attn, self.mlp)

    def forward(self, x_TD: Tensor, rotations: Rotations, layout: PackedLayout, given: BlockInput) -> BlockOutput:
        normed_TD, attention = self.input_layernorm(x_TD), self.self_attn
        if not isinstance(attention, SparseAttention):
            x_TD = x_TD + attention(normed_TD, rotations.main, layout)
            return BlockOutput(*self._feed_forward(x_TD, given.experts_TK))
        request = SparseRequest(given.selected_TS, given.loss_weight_T, given.recall_at)
        sparse = attention.forward_sparse(normed_TD, rotations, layout, request)
        after = self._feed_forward(x_TD + sparse.out_TD, given.experts_TK)
        return BlockOutput(*after, sparse.selected_TS, sparse.loss)

    def forward_cached(
        self,
        x_ND: Tensor,
        rotations: Rotations,
        columns: list[Tensor],
        layout: CachedLayout,
        selected_NS: Tensor | None,
    ) -> BlockOutput:
        normed_ND, attention = self.input_layernorm(x_ND), self.self_attn
        if not isinstance(attention, SparseAttention):
            x_ND = x_ND + attention.forward_cached(normed_ND, rotations.main, columns, layout)
            return BlockOutput(*self._feed_forward(x_ND, None))
        sparse = attention.forward_cached_sparse(normed_ND, rotations, columns, layout, selected_NS)
        return BlockOutput(*self._feed_forward(x_ND + sparse.out_TD, None), sparse.selected_TS)

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
        self._kernels: Kernels = "auto"
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rope = Rope(config.rope, config.mla.qk_rope_head_dim if config.mla else config.head_dim)
        self.index_rope: Rope | None = None
        if config.dsa is not None and config.dsa.rope_dim:
            index_rope = msgspec.structs.replace(config.rope, interleaved=config.dsa.interleaved)
            self.index_rope = Rope(index_rope, config.dsa.rope_dim)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def kernels(self) -> Kernels:
        """The implementation of sparse attention, see `ops.dispatch`; set it for all layers at once."""
        return self._kernels

    @kernels.setter
    def kernels(self, name: Kernels) -> None:
        self._kernels = name
        for block in self.layers:
            attention = cast(Block, block).self_attn
            if isinstance(attention, SparseAttention):
                attention.rule = attention.rule._replace(kernels=name)
            elif isinstance(attention, NativeSparseAttention):
                attention.kernels = name

    @property
    def unembedding_VD(self) -> Tensor:
        """Weight that turns hidden states into logits; the embedding itself when tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        token_ids_T: Tensor,
        layout: PackedLayout,
        routes_TLK: Tensor | None = None,
        selections_TLS: Tensor | None = None,
        indexer_weight_T: Tensor | None = None,
    ) -> DecoderOutput:
        """Hidden states [T, D] of packed tokens. `routes_TLK` forces the experts; rows of -1 leave the router free.

        selections_TLS: forces what the layers with an indexer select. indexer_weight_T: asks for the indexers' losses,
        with these weights of the queries; where attention is dense and no gradient is kept, also for their recall.
        Raises: ValueError when routes or selections are not those of T tokens and of this model's layers.
        """
        forced = self._forced_experts(routes_TLK, len(token_ids_T))
        selections = self._forced_selections(selections_TLS, len(token_ids_T), layout.num_keys)
        x_TD = self.embed_tokens(token_ids_T)
        rotations = self.rotations(layout.positions_T, x_TD.dtype)
        outputs: list[BlockOutput] = []
        measures = self.config.dsa is not None and self.config.attention == "dense" and not torch.is_grad_enabled()
        recall_at = self.config.dsa.top_k if self.config.dsa is not None and measures else 0
        selected_TS: Tensor | None = None
        for layer, block in enumerate(self.layers):
            below_TS = selected_TS if self._shares_selection(layer) else selections.get(layer)
            given = BlockInput(forced.get(layer), below_TS, indexer_weight_T, recall_at)
            output = self._run_block(cast(Block, block), x_TD, rotations, layout, given)
            x_TD, selected_TS = output.x_TD, output.selected_TS
            outputs.append(output)
        return DecoderOutput(self.norm(x_TD), *self._chosen(outputs), self._losses(outputs))

    def rotations(self, positions: Tensor, dtype: torch.dtype) -> Rotations:
        """Of the attention's heads and of the indexer's, at `positions` (int64)."""
        main = self.rope(positions, dtype)
        return Rotations(main, main if self.index_rope is None else self.index_rope(positions, dtype))

    def _shares_selection(self, layer: int) -> bool:
        return self.config.dsa is not None and layer in self.config.dsa.shared_layers

    def _chosen(self, outputs: Sequence[BlockOutput]) -> tuple[Tensor | None, Tensor | None]:
        """Experts [tokens, L, K] and selections of the layers with an indexer."""
        experts = [output.experts_TK for output in outputs if output.experts_TK is not None]
        selected = [outputs[layer].selected_TS for layer in self.config.indexer_layers]
        present = [each for each in selected if each is not None]
        return (
            torch.stack(experts, dim=1) if experts else None,
            torch.stack(present, dim=1) if present else None,
        )

    def _losses(self, outputs: Sequence[BlockOutput]) -> tuple[IndexerLoss, ...]:
        return tuple(output.indexer_loss for output in outputs if output.indexer_loss is not None)

    def _run_block(
        self, block: Block, x_TD: Tensor, rotations: Rotations, layout: PackedLayout, given: BlockInput
    ) -> BlockOutput:
        if self.checkpoint_activations and self.training and torch.is_grad_enabled():
            output = _checkpointed(block, x_TD, rotations, layout, given)
        else:
            output = block(x_TD, rotations, layout, given)
        if self.training and output.experts_TK is not None and isinstance(block.mlp, MixtureOfExperts):
            block.mlp.gate.count(output.experts_TK)
        return output

    def _forced_selections(self, selections_TLS: Tensor | None, num_tokens: int, num_keys: int) -> dict[int, Tensor]:
        """The forced selection [T, S] of each layer with an indexer, by the layer's index."""
        if selections_TLS is None:
            return {}
        layers = self.config.indexer_layers if self.config.attention == "dsa" else ()
        top_k = self.config.dsa.top_k if self.config.dsa is not None else 0
        fits = tuple(selections_TLS.shape[:2]) == (num_tokens, len(layers))
        if not fits or selections_TLS.shape[2] not in (top_k, min(top_k, num_keys)) or not _is_integer(selections_TLS):
            raise ValueError(
                f"The recorded selections are {list(selections_TLS.shape)} of {selections_TLS.dtype}; expected "
                f"[tokens, layers that select, keys] = {[num_tokens, len(layers), top_k]} of integers. They come from "
                "another model, or from other tokens: sample anew, or do without."
            )
        return {layer: selections_TLS[:, index] for index, layer in enumerate(layers)}

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
        rotations = self.rotations(layout.positions_RQ.flatten(), x_ND.dtype)
        blocks = [cast(Block, block) for block in self.layers]
        fused_RD = decode_fused([block.fused for block in blocks], x_ND, rotations.main, cache, layout)
        if fused_RD is not None:
            return DecoderOutput(self.norm(fused_RD).unsqueeze(1), None)
        outputs: list[BlockOutput] = []
        selected_NS: Tensor | None = None
        for layer, (block, columns) in enumerate(zip(blocks, cache.columns, strict=True)):
            below_NS = selected_NS if self._shares_selection(layer) else None
            output = block.forward_cached(x_ND, rotations, columns, layout, below_NS)
            x_ND, selected_NS = output.x_TD, output.selected_TS
            outputs.append(output)
        return DecoderOutput(self.norm(x_ND).view(*token_ids_RQ.shape, -1), *self._chosen(outputs))

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        return F.linear(hidden, self.unembedding_VD)

    def new_cache(self, num_slots: int, capacity: int, index_keys: IndexKeys = "model") -> KVCache:
        """An empty cache in the model's dtype, on its device; the indexers' keys in the format that is asked for."""
        layers = [cache_columns(self.config, layer, index_keys) for layer in range(self.config.num_layers)]
        return KVCache(layers, num_slots, capacity, like=self.embed_tokens.weight)

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


def _is_integer(x: Tensor) -> bool:
    return x.dtype in (torch.int16, torch.int32, torch.int64)


def _checkpointed(
    block: Block, x_TD: Tensor, rotations: Rotations, layout: PackedLayout, given: BlockInput
) -> BlockOutput:
    """The block's output. Its second run, in backward, is given the experts and the selection of the first one."""
    first: list[BlockInput] = []

    def run(x_TD: Tensor) -> BlockOutput:
        if first:
            return cast(BlockOutput, block(x_TD, rotations, layout, first[0]))
        output: BlockOutput = block(x_TD, rotations, layout, given)
        first.append(replace(given, experts_TK=output.experts_TK, selected_TS=output.selected_TS))
        return output

    output: BlockOutput = checkpoint(run, x_TD, use_reentrant=False, preserve_rng_state=False)
    return output
