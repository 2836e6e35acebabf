"""The lightning indexer: a few small heads that score every key for a query, much cheaper than attention would.

It reads the block's normalised input and, under MLA, the query latent that the main attention uses too; both are cut
off from the gradient, so that the language model's loss never moves the indexer, nor the indexer's loss the model
(DeepSeek-V3.2, arXiv 2512.02556, section 2.1).

Shapes: T tokens, D hidden, W width of the query input, I index heads, C index dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.models.config import DSAConfig
from rorqual.models.rope import Rotation
from rorqual.ops import dsa


class Indexer(nn.Module):
    """Parameters are named as in DeepSeek-V3.2's and GLM's checkpoints."""

    def __init__(self, config: DSAConfig, hidden_size: int, query_size: int) -> None:
        super().__init__()
        self.config = config
        self.wq_b = nn.Linear(query_size, config.num_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(hidden_size, config.head_dim, bias=False)
        self.k_norm = nn.LayerNorm(config.head_dim, eps=config.k_norm_eps)
        self.weights_proj = nn.Linear(hidden_size, config.num_heads, bias=False)

    def forward(self, x_TD: Tensor, query_TW: Tensor, rotation: Rotation) -> dsa.IndexerOutput:
        """Queries [T, I, C], keys [T, C] and head weights [T, I], the last in float32 or wider.

        rotation: of `DSAConfig.rope_dim` dimensions, which are the first ones of a head. The weights are
        w * num_heads^-0.5 * head_dim^-0.5 and may be negative.
        """
        x_TD, query_TW = x_TD.detach(), query_TW.detach()
        q_TIC = self._turn(self.wq_b(query_TW).unflatten(-1, (self.config.num_heads, -1)), rotation)
        k_TC = self._turn(self.k_norm(self.wk(x_TD)).unsqueeze(1), rotation).squeeze(1)
        precise = torch.promote_types(x_TD.dtype, torch.float32)
        weight_TI = F.linear(x_TD.to(precise), self.weights_proj.weight.to(precise))
        scale = self.config.num_heads**-0.5 * self.config.head_dim**-0.5
        return dsa.IndexerOutput(q_TIC, k_TC, weight_TI * scale)

    def _turn(self, x_TIC: Tensor, rotation: Rotation) -> Tensor:
        """Positions, then what the release does to make FP8 do."""
        if self.config.rope_dim:
            split = (self.config.rope_dim, self.config.head_dim - self.config.rope_dim)
            turned_TIP, rest = x_TIC.split(split, dim=-1)
            x_TIC = torch.cat((rotation.rotate(turned_TIP), rest), dim=-1)
        if self.config.hadamard:
            x_TIC = dsa.hadamard(x_TIC)
        return dsa.fp8_round(x_TIC) if self.config.fp8 else x_TIC
