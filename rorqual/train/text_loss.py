"""How well a model predicts held-out text, and how well its indexers know where it looks.

Shapes: T packed tokens, N targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rorqual.models.convert import with_attention
from rorqual.models.decoder import Decoder
from rorqual.models.sparse import IndexerLoss
from rorqual.train.data import PackedBatch, pack_documents
from rorqual.train.step import batch_logprobs


@dataclass(frozen=True)
class HeldOut:
    """cross_entropy: mean over the targets, in nats a token, with the model's own attention.

    The others are by layer with an indexer, over the queries that see more keys than are selected; empty for a model
    without. kl and uniform: of the indexer's prediction, and of one that knows nothing, to where dense attention looks.
    recall: share of the dense attention on the selected keys.
    """

    cross_entropy: float
    num_targets: int
    kl: tuple[float, ...] = ()
    uniform: tuple[float, ...] = ()
    recall: tuple[float, ...] = ()

    @property
    def kl_over_uniform(self) -> float | None:
        """0 for an indexer that predicts attention exactly, 1 for one that knows nothing."""
        return sum(self.kl) / sum(self.uniform) if sum(self.uniform) else None

    def metrics(self) -> dict[str, float]:
        """Flat figures for the metrics file."""
        figures = {"held_out/cross_entropy": self.cross_entropy}
        if self.kl_over_uniform is not None:
            figures["held_out/kl_over_uniform"] = self.kl_over_uniform
            figures["held_out/recall"] = sum(self.recall) / len(self.recall)
            figures |= {f"held_out/recall/{layer}": value for layer, value in enumerate(self.recall)}
        return figures

    def summary(self) -> str:
        """One line for a person."""
        text = f"{self.cross_entropy:.4f} nats a token on {self.num_targets:,} held-out tokens"
        if self.kl_over_uniform is None:
            return text
        recall = sum(self.recall) / len(self.recall)
        return f"{text}; KL {self.kl_over_uniform:.2f} of uniform's, {recall:.1%} of the attention found"


@torch.no_grad()
def measure_held_out(model: Decoder, sequences: Sequence[np.ndarray], token_budget: int) -> HeldOut:
    """Measure `model`, in evaluation mode, on sequences of token ids.

    Raises: ValueError when there is no sequence.
    """
    if not sequences:
        raise ValueError("There is no held-out sequence; give more text, or shorter sequences.")
    was_training = model.training
    batches = pack_documents(sequences, token_budget, device=model.embed_tokens.weight.device)
    model.eval()
    total = sum(float(batch_logprobs(model, batch).sum(dtype=torch.float64)) for batch in batches)
    num_targets = sum(batch.num_targets for batch in batches)
    dense = with_attention(model, "dense").eval() if model.config.dsa is not None else None
    columns = _indexer_columns(dense, batches) if dense is not None else []
    model.train(was_training)
    return HeldOut(-total / num_targets, num_targets, *columns)


def _indexer_columns(dense: Decoder, batches: Sequence[PackedBatch]) -> list[tuple[float, ...]]:
    """Means of KL, KL to uniform and recall, by layer."""
    assert dense.config.dsa is not None
    sums = np.zeros((3, len(dense.config.indexer_layers)))
    count = 0
    for batch in batches:
        weight_T = torch.zeros(batch.num_tokens, device=batch.token_ids_T.device)
        losses = dense(batch.token_ids_T, batch.layout, indexer_weight_T=weight_T).indexer_losses
        late_T = batch.layout.positions_T >= dense.config.dsa.top_k
        count += int(late_T.sum())
        sums += np.array([_sums(loss, late_T) for loss in losses]).T
    return [tuple((row / max(count, 1)).tolist()) for row in sums]


def _sums(loss: IndexerLoss, chosen_T: torch.Tensor) -> list[float]:
    assert loss.recall_T is not None
    return [float(each[chosen_T].sum(dtype=torch.float64)) for each in (loss.kl_T, loss.uniform_T, loss.recall_T)]
