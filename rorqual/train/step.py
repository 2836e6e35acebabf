"""One optimiser step for any objective: forward, log-probs of the targets, loss, backward; accumulate, clip, AdamW.

Pre-training, SFT and RL differ only in the objective that they pass in (see `objectives.py`). A loss or gradient that
is not finite raises before any weight has changed.

Shapes: N targets of a micro-batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rorqual.models.decoder import Decoder, DecoderOutput
from rorqual.rl.diagnostics import Diagnostics, merge
from rorqual.train.data import PackedBatch
from rorqual.train.indexer import INDEXER, indexer_diagnostics
from rorqual.train.logprobs import selected_logprobs
from rorqual.train.optim import OptimizerConfig, learning_rate

Objective = Callable[[Tensor, PackedBatch], tuple[Tensor, Diagnostics]]
"""From the current log-probs [N] of a micro-batch to its share of the step's loss, scaled by the step's totals."""


class TrainingDiverged(ValueError):
    """A loss or a gradient is not finite. The weights and the optimiser state are those from before the step."""


@dataclass(frozen=True)
class StepStats:
    """What one step did. num_tokens: tokens fed, a shared prompt counted once.

    diagnostics: what the objective measured, mergeable with that of other steps. sample_ids: the sequences, in the
    order of `diagnostics.sequences`.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    num_tokens: int
    num_targets: int
    num_sequences: int
    seconds: float
    diagnostics: Diagnostics
    sample_ids: tuple[str, ...]

    @property
    def sequences(self) -> dict[str, dict[str, float]]:
        """By sample id, what the objective measured on that sequence alone."""
        columns = {key: values_S.tolist() for key, values_S in self.diagnostics.sequences.items()}
        return {name: {key: column[i] for key, column in columns.items()} for i, name in enumerate(self.sample_ids)}


def train_step(
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[PackedBatch],
    objective: Objective | None,
    config: OptimizerConfig,
    step: int,
    temperature: float = 1.0,
) -> StepStats:
    """Accumulate the gradients of all micro-batches, then move the weights once. `temperature`: that of the sampler.

    objective: None trains the indexers alone. Their loss is added for batches that ask for it (`with_indexer_loss`).
    Raises: TrainingDiverged, naming step, micro-batch and samples; ValueError when there is no micro-batch.
    """
    if not batches:
        raise ValueError(f"step {step} has no micro-batch; there is nothing to train on.")
    started = time.perf_counter()
    model.train()
    optimizer.zero_grad(set_to_none=True)
    total, diagnostics = 0.0, []
    for index, batch in enumerate(batches):
        loss, diagnostic = _backward(model, batch, objective, temperature, where=f"step {step}, micro-batch {index}")
        total += loss
        diagnostics.append(diagnostic)
    gradient_norm = _clip(model, config.max_grad_norm)
    if not math.isfinite(gradient_norm):
        _blame_gradient(model, batches, objective, temperature, step)
    rate = learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if config.balance_experts:
        model.update_expert_bias()
    return StepStats(
        step=step,
        loss=total,
        gradient_norm=gradient_norm,
        learning_rate=rate,
        num_tokens=sum(batch.num_tokens for batch in batches),
        num_targets=sum(batch.num_targets for batch in batches),
        num_sequences=sum(batch.num_sequences for batch in batches),
        seconds=time.perf_counter() - started,
        diagnostics=merge(diagnostics),
        sample_ids=tuple(name for batch in batches for name in batch.sample_ids),
    )


def batch_logprobs(model: Decoder, batch: PackedBatch, temperature: float = 1.0) -> Tensor:
    """Log-probs [N] of the targets of one micro-batch, in nats, with the batch's kept sets and recorded routes."""
    return _target_logprobs(model, batch, _forward(model, batch).hidden, temperature)


def _forward(model: Decoder, batch: PackedBatch) -> DecoderOutput:
    output: DecoderOutput = model(
        batch.token_ids_T, batch.layout, batch.routes_TLK, batch.selections_TLS, batch.indexer_weight_T
    )
    return output


def _target_logprobs(model: Decoder, batch: PackedBatch, hidden_TD: Tensor, temperature: float) -> Tensor:
    hidden_ND = hidden_TD.index_select(0, batch.predict_index_N)
    return selected_logprobs(hidden_ND, model.unembedding_VD, batch.target_N, temperature=temperature, kept=batch.kept)


@torch.no_grad()
def compute_logprobs(model: Decoder, batches: Sequence[PackedBatch], temperature: float = 1.0) -> list[Tensor]:
    """Log-probs of every micro-batch without gradient: proximal ones before the update, or those of the reference."""
    was_training = model.training
    model.eval()
    logprobs = [batch_logprobs(model, batch, temperature) for batch in batches]
    model.train(was_training)
    return logprobs


def with_proximal(batches: Sequence[PackedBatch], logprobs: Sequence[Tensor]) -> list[PackedBatch]:
    """The batches, carrying the trainer's own log-probs from before the update."""
    return [replace(batch, proximal_N=each) for batch, each in zip(batches, logprobs, strict=True)]


def with_reference(batches: Sequence[PackedBatch], logprobs: Sequence[Tensor]) -> list[PackedBatch]:
    """The batches, carrying the log-probs of the frozen KL anchor."""
    return [replace(batch, reference_N=each) for batch, each in zip(batches, logprobs, strict=True)]


def _backward(
    model: Decoder, batch: PackedBatch, objective: Objective | None, temperature: float, where: str
) -> tuple[float, Diagnostics]:
    loss, diagnostics, current_N = _loss(model, batch, objective, temperature)
    value = float(loss.detach())
    if not math.isfinite(value):
        model.zero_grad(set_to_none=True)
        raise TrainingDiverged(_message(f"The loss is {value}", where, current_N, batch))
    loss.backward()
    return value, diagnostics


def _loss(
    model: Decoder, batch: PackedBatch, objective: Objective | None, temperature: float
) -> tuple[Tensor, Diagnostics, Tensor]:
    """The objective's loss and the indexers', what was measured, and the log-probs of the targets (none without an
    objective)."""
    output = _forward(model, batch)
    losses = [each.total for each in output.indexer_losses]
    diagnostics = [indexer_diagnostics(output.indexer_losses)] if losses else []
    current_N = output.hidden.new_zeros(0)
    if objective is not None:
        current_N = _target_logprobs(model, batch, output.hidden, temperature)
        loss, measured = objective(current_N, batch)
        losses.append(loss)
        diagnostics.append(measured)
    if not losses:
        raise ValueError("The batch asks for no indexer loss and there is no objective: nothing would be trained.")
    return torch.stack(losses).sum(), merge(diagnostics), current_N


def _clip(model: Decoder, max_norm: float) -> float:
    """Indexers and model each by their own norm: they descend from losses that have nothing to do with each other.
    Returns the norm of both."""
    indexers = [each for name, each in model.named_parameters() if INDEXER in name]
    known = {id(each) for each in indexers}
    rest = [each for each in model.parameters() if id(each) not in known]
    norms = [torch.nn.utils.clip_grad_norm_(part, max_norm) for part in (rest, indexers) if part]
    return math.hypot(*(float(norm) for norm in norms))


def _blame_gradient(
    model: Decoder, batches: Sequence[PackedBatch], objective: Objective | None, temperature: float, step: int
) -> None:
    """Repeat the micro-batches one by one, to name the first whose own gradient is not finite."""
    for index, batch in enumerate(batches):
        model.zero_grad(set_to_none=True)
        loss, _, current_N = _loss(model, batch, objective, temperature)
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not math.isfinite(float(torch.nn.utils.get_total_norm(gradients))):
            model.zero_grad(set_to_none=True)
            where = f"step {step}, micro-batch {index}"
            raise TrainingDiverged(_message("The gradient norm is not finite", where, current_N, batch))
    model.zero_grad(set_to_none=True)
    raise TrainingDiverged(
        f"The summed gradient of step {step} is not finite, though that of each micro-batch is. No weight was changed. "
        "Lower the learning rate, and look at the gradient norms of the steps before."
    )


def _message(what: str, where: str, current_N: Tensor, batch: PackedBatch, num_named: int = 3) -> str:
    if not len(current_N):
        return (
            f"{what} in {where}, in the indexers' loss; no weight was changed. Lower the learning rate, or resume from "
            "an earlier checkpoint."
        )
    current_N = current_N.detach()
    severity_N = torch.where(current_N.isfinite(), -current_N, math.inf)
    worst = severity_N.argsort(descending=True)[:num_named].tolist()
    names = [batch.sample_ids[int(batch.sequence_index_N[n])] for n in worst]
    named = "; ".join(
        f"{name} (token {int(batch.target_N[n])}, log-prob {float(current_N[n]):.4g})"
        for name, n in zip(names, worst, strict=True)
    )
    return (
        f"{what} in {where}; no weight was changed. Least likely targets: {named}. Look at these samples, lower the "
        "learning rate, or resume from an earlier checkpoint."
    )
