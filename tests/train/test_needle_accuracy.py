"""A document counts when greedy decoding would write its whole value, and only then."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rorqual.models.decoder import Decoder
from rorqual.models.layout import causal_layout
from rorqual.text.needle import NeedleDocument
from rorqual.train.needle_accuracy import needle_accuracy, needle_metrics
from tests.train.fakes import VOCABULARY, build_decoder

NUM_ANSWER = 3


def greedy(model: Decoder, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(NUM_ANSWER):
            hidden = model(torch.tensor(ids), causal_layout([len(ids)])).hidden
            ids.append(int(model.logits(hidden[-1]).argmax()))
    return ids


@pytest.mark.parametrize("token_budget", (1000, 20))
def test_what_counts_is_what_greedy_decoding_writes(token_budget: int) -> None:
    model = build_decoder("gqa")
    dice = np.random.default_rng(0)
    documents: dict[int, list[NeedleDocument]] = {0: [], 50: [], 100: []}
    for depth, spoiled in ((0, ()), (50, (0, 2)), (100, (0, 1, 2, 3))):
        for number in range(4):
            ids = greedy(model, dice.integers(VOCABULARY, size=10 + 3 * number).tolist())
            if number in spoiled:
                place = -1 - number % NUM_ANSWER
                ids[place] = (ids[place] + 1) % VOCABULARY
            answer = np.arange(len(ids)) >= len(ids) - NUM_ANSWER
            documents[depth].append(NeedleDocument(np.array(ids, dtype=np.int32), answer))
    assert needle_accuracy(model, documents, token_budget) == {0: 1.0, 50: 0.5, 100: 0.0}
    assert model.training


def test_figures_are_of_all_depths_and_of_each() -> None:
    found = needle_metrics({0: 1.0, 50: 0.5, 100: 0.0})
    assert found == {"needle/accuracy": 0.5, "needle/accuracy/0": 1.0, "needle/accuracy/50": 0.5} | {
        "needle/accuracy/100": 0.0
    }
    assert needle_metrics({}) == {}
