"""How often a model recalls the value of a needle, by the depth at which it lies.

A document counts when every token of the value is the model's first choice after the ones before it, which is when
greedy generation would write the value; one forward pass tells.

Shapes: N tokens of values, S documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from rorqual.models.decoder import Decoder
from rorqual.text.needle import NeedleDocument
from rorqual.train.data import PackedBatch, pack_documents


@torch.no_grad()
def needle_accuracy(
    model: Decoder, documents: Mapping[int, Sequence[NeedleDocument]], token_budget: int
) -> dict[int, float]:
    """Share of the documents of each depth whose value is recalled whole; in evaluation mode."""
    was_training = model.training
    model.eval()
    found = {depth: _share_recalled(model, each, token_budget) for depth, each in documents.items()}
    model.train(was_training)
    return found


def needle_metrics(accuracy: Mapping[int, float]) -> dict[str, float]:
    """Flat figures for the metrics file: of all depths, and of each by its percents."""
    if not accuracy:
        return {}
    mean = sum(accuracy.values()) / len(accuracy)
    return {"needle/accuracy": mean, **{f"needle/accuracy/{depth}": each for depth, each in accuracy.items()}}


def _share_recalled(model: Decoder, documents: Sequence[NeedleDocument], token_budget: int) -> float:
    batches = pack_documents(
        [each.ids for each in documents],
        token_budget,
        weights=[each.weights(of_text=0.0, of_answer=1.0) for each in documents],
        device=model.embed_tokens.weight.device,
    )
    return sum(_num_recalled(model, batch) for batch in batches) / len(documents)


def _num_recalled(model: Decoder, batch: PackedBatch) -> int:
    hidden_TD = model(batch.token_ids_T, batch.layout).hidden
    right_N = model.logits(hidden_TD[batch.predict_index_N]).argmax(dim=-1) == batch.target_N
    wrong_S = torch.zeros(batch.num_sequences, dtype=torch.int64, device=right_N.device)
    wrong_S.index_add_(0, batch.sequence_index_N, (~right_N).long())
    return int((wrong_S == 0).sum())
