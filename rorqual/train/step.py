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

from rorqual.models.decoder import Decoder
from rorqual.rl.diagnostics import Diagnostics, merge
from rorqual.train.data import PackedBatch
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
    objective: Objective,
    config: OptimizerConfig,
    step: int,
    temperature: float = 1.0,
) -> StepStats:
    """Accumulate the gradients of all micro-batches, then move the weights once. `temperature`: that of the sampler.

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
    gradient_norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm))
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
    hidden_TD = model(batch.token_ids_T, batch.layout, batch.routes_TLK).hidden
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
    model: Decoder, batch: PackedBatch, objective: Objective, temperature: float, where: str
) -> tuple[float, Diagnostics]:
    current_N = batch_logprobs(model, batch, temperature)
    loss, diagnostics = objective(current_N, batch)
    value = float(loss.detach())
    if not math.isfinite(value):
        model.zero_grad(set_to_none=True)
        raise TrainingDiverged(_message(f"The loss is {value}", where, current_N, batch))
    loss.backward()
    return value, diagnostics


def _blame_gradient(
    model: Decoder, batches: Sequence[PackedBatch], objective: Objective, temperature: float, step: int
) -> None:
    """Repeat the micro-batches one by one, to name the first whose own gradient is not finite."""
    for index, batch in enumerate(batches):
        model.zero_grad(set_to_none=True)
        current_N = batch_logprobs(model, batch, temperature)
        objective(current_N, batch)[0].backward()
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
