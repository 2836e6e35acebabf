"""Feed-forward layers: the gated MLP, and the mixture of experts with its router.

The router's choice can be recorded and forced ("keep routing", DeepSeek-V3.2, arXiv 2512.02556, section 3.1): the
experts are then given, and their weights still come from the current router scores, so that the gradient reaches the
router.

Shapes: T tokens, D hidden, X experts, K experts a token, I expert width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.models.buffers import ExactBuffers
from rorqual.models.config import MoEConfig
from rorqual.models.pointwise import swiglu

FREE_ROUTE = -1
"""A row of forced routes that begins with this is not forced: the router chooses for that token."""


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        result: Tensor = self.down_proj(swiglu(self.gate_proj(x_TD), self.up_proj(x_TD)))
        return result


class Router(ExactBuffers):
    """Scores in float32. With a sigmoid gate, `e_score_correction_bias` steers the choice and never the weights."""

    e_score_correction_bias: Tensor | None
    load_X: Tensor

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        bias = torch.zeros(config.num_experts) if config.scoring == "sigmoid" else None
        self.register_buffer("e_score_correction_bias", bias)
        self.register_buffer("load_X", torch.zeros(config.num_experts, device="cpu"), persistent=False)

    def forward(self, x_TD: Tensor, forced_TK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights [T, K] in float32 (float64 stays) and chosen experts [T, K] (int64)."""
        precise = x_TD.dtype if x_TD.dtype == torch.float64 else torch.float32
        logits_TX = F.linear(x_TD.to(precise), self.weight.to(precise))
        scores_TX = logits_TX.sigmoid() if self.config.scoring == "sigmoid" else logits_TX.softmax(dim=-1)
        experts_TK = self._choose(scores_TX.detach(), forced_TK)
        weights_TK = scores_TX.gather(1, experts_TK)
        if self.config.normalize_weights:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return weights_TK * self.config.routed_scaling, experts_TK

    def _choose(self, scores_TX: Tensor, forced_TK: Tensor | None) -> Tensor:
        if forced_TK is None:
            return self._top_experts(scores_TX)
        forced_TK = forced_TK.long()
        free_T1 = forced_TK[:, :1] == FREE_ROUTE
        return torch.where(free_T1, self._top_experts(scores_TX), forced_TK) if bool(free_T1.any()) else forced_TK

    def _top_experts(self, scores_TX: Tensor) -> Tensor:
        """Group-limited top-k (DeepSeek-V3, arXiv 2412.19437, section 2.1.2): a group counts by its two best
        experts."""
        moe = self.config
        if self.e_score_correction_bias is not None:
            scores_TX = scores_TX + self.e_score_correction_bias
        if moe.groups_per_token < moe.num_groups:
            grouped = scores_TX.unflatten(-1, (moe.num_groups, -1))
            group_scores = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
            kept = group_scores.topk(moe.groups_per_token, dim=-1).indices
            closed = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, False)
            scores_TX = grouped.masked_fill(closed[..., None], float("-inf")).flatten(1)
        return scores_TX.topk(moe.experts_per_token, dim=-1).indices

    @torch.no_grad()
    def count(self, experts_TK: Tensor) -> None:
        """Add what was chosen to the load. Apart from `forward`, which checkpointed activations run twice."""
        self.load_X += torch.bincount(experts_TK.flatten(), minlength=self.config.num_experts)

    @torch.no_grad()
    def balance(self) -> None:
        """Move each expert's bias one step against its load since the last call (arXiv 2408.15664), and count anew."""
        if self.e_score_correction_bias is not None and bool(self.load_X.any()):
            self.e_score_correction_bias += self.config.balance_rate * torch.sign(self.load_X.mean() - self.load_X)
        self.load_X.zero_()


class Experts(nn.Module):
    """The routed experts' weights, stacked; each token visits K of them."""

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(
            torch.empty(config.num_experts, 2 * config.expert_intermediate_size, hidden_size)
        )
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, hidden_size, config.expert_intermediate_size))

    def forward(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        """Sort the T*K visits by expert, run each expert once, and sum the weighted outputs back per token."""
        num_tokens, per_token = experts_TK.shape
        visit_order = experts_TK.flatten().argsort(stable=True)
        counts = torch.bincount(experts_TK.flatten(), minlength=len(self.down_proj)).tolist()
        visits = x_TD.index_select(0, visit_order // per_token).split(counts)
        outputs = [self._run(expert, rows) for expert, rows in enumerate(visits) if len(rows)]
        place = torch.empty_like(visit_order)
        place[visit_order] = torch.arange(len(visit_order), device=place.device)
        out_TKD = torch.cat(outputs).index_select(0, place).view(num_tokens, per_token, -1)
        return torch.bmm(weights_TK.to(out_TKD.dtype).unsqueeze(1), out_TKD).squeeze(1)

    def _run(self, expert: int, rows: Tensor) -> Tensor:
        gate, up = F.linear(rows, self.gate_up_proj[expert]).chunk(2, dim=-1)
        return F.linear(swiglu(gate, up), self.down_proj[expert])


class MixtureOfExperts(nn.Module):
    """Routed experts plus, where configured, shared experts that every token visits (DeepSeekMoE, arXiv 2401.06066)."""

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.gate = Router(config, hidden_size)
        self.experts = Experts(config, hidden_size)
        shared_width = config.num_shared_experts * config.expert_intermediate_size
        self.shared_experts = MLP(hidden_size, shared_width) if shared_width else None

    def forward(self, x_TD: Tensor, forced_TK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The layer's output [T, D] and the experts that were chosen [T, K]."""
        weights_TK, experts_TK = self.gate(x_TD, forced_TK)
        out_TD = self.experts(x_TD, weights_TK, experts_TK)
        if self.shared_experts is not None:
            out_TD = out_TD + self.shared_experts(x_TD)
        return out_TD, experts_TK
