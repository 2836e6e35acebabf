"""The indexers' loss in a training step: which weights the tokens have in it, what else is frozen, what is measured.

The two stages of DeepSeek-V3.2 (arXiv 2512.02556, section 2.1) are one step with different settings: the warm-up has
dense attention, everything but the indexers frozen and no other objective; the sparse stage has sparse attention, the
language-model objective for all other parameters, and both losses added up.

Shapes: T packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Literal

import torch
from torch import Tensor

from rorqual.models.decoder import Decoder
from rorqual.models.sparse import IndexerLoss
from rorqual.records import Record
from rorqual.rl.diagnostics import Diagnostics
from rorqual.train.data import PackedBatch

INDEXER: Final = ".indexer."
"""In the name of every parameter of an indexer, and of no other."""


class IndexerLossConfig(Record):
    """How the KL of the queries becomes a loss, in nats; the layers' losses are added up.

    reduction: "mean" over the tokens of the step, so that neither the batch size nor the length of the texts changes
    the step's size; "sum" is the report's equation taken literally. AdamW divides either out, but for gradient clipping
    and epsilon. weight: on top. The report gives neither; implementations in use range from 0.01 to 1.
    Raises: ValueError for a weight that is not positive.
    """

    weight: float = 1.0
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        if not self.weight > 0.0:
            raise ValueError(f"IndexerLossConfig.weight = {self.weight}; expected more than 0.")


def with_indexer_loss(batches: Sequence[PackedBatch], config: IndexerLossConfig) -> list[PackedBatch]:
    """The micro-batches of one step, asking for the indexers' loss."""
    total = sum(batch.num_tokens for batch in batches) if config.reduction == "mean" else 1
    return [
        replace(
            batch,
            indexer_weight_T=torch.full((batch.num_tokens,), config.weight / total, device=batch.token_ids_T.device),
        )
        for batch in batches
    ]


def train_indexers_only(model: Decoder) -> None:
    """Freeze everything else. Raises: ValueError for a model without indexers, or whose attention is sparse already."""
    if model.config.dsa is None or model.config.attention != "dense":
        raise ValueError(
            "The warm-up needs a model with indexers and dense attention: ModelConfig.dsa set, attention = 'dense'. "
            "Give a dense model indexers with `models.convert.with_indexers`."
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(INDEXER in name)


def indexer_diagnostics(losses: Sequence[IndexerLoss]) -> Diagnostics:
    """Mean KL and mean KL to uniform, over the tokens: of all layers, and by layer (in the order of the indexers)."""
    means: dict[str, Tensor] = {}
    for name, columns in (("kl", [loss.kl_T for loss in losses]), ("uniform", [loss.uniform_T for loss in losses])):
        for layer, values_T in enumerate(columns):
            means[f"indexer/{name}/{layer}"] = _pair(values_T)
        means[f"indexer/{name}"] = torch.stack([_pair(values_T) for values_T in columns]).sum(dim=0)
    return Diagnostics({}, means, {}, losses[0].kl_T.new_zeros(0))


def _pair(values_T: Tensor) -> Tensor:
    return torch.stack([values_T.sum(), values_T.new_tensor(float(len(values_T)))])
