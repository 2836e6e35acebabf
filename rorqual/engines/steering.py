"""What a server asks of single requests: tokens that are forbidden, and what else could have been drawn.

Shapes: R rows, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from rorqual.records import Alternatives, GenerateRequest

FORBIDDEN = -1e9
"""The logit of a token that may not be drawn: its probability is exactly 0, and the arithmetic stays finite."""


class Constraint(Protocol):
    """Which tokens may come next, for one request; the engine calls both in turn, from its own thread."""

    def allowed(self) -> np.ndarray | None:
        """A flag for each token of the vocabulary, or None where all may come."""
        ...

    def accept(self, token_id: int) -> None:
        """This token was drawn."""
        ...


class Drawn(NamedTuple):
    """Tokens of a request that goes on, in the order in which they were drawn."""

    token_ids: array[int]
    alternatives: Alternatives | None


def forbid(
    logits_RV: Tensor, requests: Sequence[GenerateRequest | None], constraints: Mapping[str, Constraint]
) -> Tensor:
    """The logits with `FORBIDDEN` where a request's constraint says so.

    Raises: ValueError when a constraint leaves no token, which the vocabulary cannot satisfy then.
    """
    if not constraints:
        return logits_RV
    logits_RV = logits_RV.clone()
    for row, request in enumerate(requests):
        constraint = constraints.get(request.request_id) if request is not None else None
        allowed = constraint.allowed() if constraint is not None else None
        if allowed is not None:
            allowed = allowed[: logits_RV.shape[1]]
            if not allowed.any():
                raise ValueError("A constraint leaves no token to draw; the tokenizer cannot write what it asks for.")
            forbidden_V = torch.from_numpy(~allowed).to(logits_RV.device)
            logits_RV[row, : len(allowed)].masked_fill_(forbidden_V, FORBIDDEN)
            logits_RV[row, len(allowed) :] = FORBIDDEN
    return logits_RV


def log_probs(logits_RV: Tensor, requests: Sequence[GenerateRequest | None]) -> dict[int, Tensor]:
    """Row -> log-probs under the model's own distribution, of the requests that ask for alternatives."""
    rows = [row for row, request in enumerate(requests) if request is not None and request.num_alternatives is not None]
    if not rows:
        return {}
    return dict(zip(rows, logits_RV[rows].double().log_softmax(dim=-1), strict=True))


def alternatives_row(logprob_V: Tensor, token_id: int, count: int) -> np.ndarray:
    """[1 + 2K]: the log-prob of the drawn token, then the K likeliest ids, then their log-probs."""
    best_K, ids_K = logprob_V.topk(min(count, len(logprob_V)))
    return torch.cat([logprob_V[token_id, None], ids_K.double(), best_K]).cpu().numpy()


def pack_alternatives(rows: Sequence[np.ndarray], count: int) -> Alternatives:
    """Rows of `alternatives_row` as a record."""
    columns = np.stack(rows) if rows else np.zeros((0, 1 + 2 * count))
    count = (columns.shape[1] - 1) // 2
    return Alternatives(
        num=count,
        logprobs=array("d", columns[:, 0].tobytes()),
        ids=array("i", columns[:, 1 : 1 + count].astype(np.int32).tobytes()),
        top_logprobs=array("d", np.ascontiguousarray(columns[:, 1 + count :]).tobytes()),
    )
