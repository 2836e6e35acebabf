"""What to minimise, as functions of current log-probs and a packed batch: the two that every recipe is made of.

Shapes: N targets of a micro-batch, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rorqual.rl.diagnostics import Diagnostics
from rorqual.rl.losses import LossScale, PolicyTokens, policy_loss
from rorqual.rl.objective import ObjectiveConfig
from rorqual.train.data import PackedBatch
from rorqual.train.step import Objective


def language_model_objective(batches: Sequence[PackedBatch]) -> Objective:
    """Cross-entropy in nats: the weighted mean over all targets of the step, however they were split into `batches`.

    Raises: ValueError when the weights of the step add up to 0 or less.
    """
    total = sum(float(_weights(batch).sum(dtype=torch.float64)) for batch in batches)
    if not total > 0.0:
        raise ValueError(f"the loss weights of the step add up to {total}; expected more than 0.")

    def objective(current_N: Tensor, batch: PackedBatch) -> tuple[Tensor, Diagnostics]:
        weight_N = _weights(batch).to(current_N.dtype)
        loss = -(weight_N * current_N).sum()
        sums = torch.stack([loss.detach(), weight_N.sum()])
        return loss / total, Diagnostics({}, {"cross_entropy": sums}, {}, current_N.new_zeros(0))

    return objective


def policy_objective(config: ObjectiveConfig, scale: LossScale) -> Objective:
    """The policy loss of `rl.losses`; the batches carry behaviour, and where needed proximal and reference log-probs.

    Raises, when called: ValueError for a batch that was not packed from train samples.
    """

    def objective(current_N: Tensor, batch: PackedBatch) -> tuple[Tensor, Diagnostics]:
        if batch.behaviour_N is None or batch.advantage_S is None:
            raise ValueError("the policy objective needs behaviour log-probs and advantages; use pack_samples.")
        strengths = [config.kl_strength_for(domain) for domain in batch.domains_S]
        tokens = PolicyTokens(
            current_N=current_N,
            behaviour_N=batch.behaviour_N.to(current_N.dtype),
            sequence_index_N=batch.sequence_index_N,
            advantage_S=batch.advantage_S.to(current_N.dtype),
            kl_strength_S=current_N.new_tensor(strengths),
            proximal_N=batch.proximal_N,
            reference_N=batch.reference_N,
            trajectory_length_S=batch.trajectory_length_S,
        )
        return policy_loss(tokens, config, scale)

    return objective


def loss_scale(batches: Sequence[PackedBatch]) -> LossScale:
    """The totals of one optimiser step on one rank; add those of the other ranks.

    `batches` hold whole trajectories: the segments of one may be in several micro-batches, not in several steps or
    ranks.
    """
    return LossScale(
        num_trajectories=len({name for batch in batches for name in batch.trajectory_ids or batch.sample_ids}),
        num_tokens=sum(batch.num_targets for batch in batches),
    )


def _weights(batch: PackedBatch) -> Tensor:
    return torch.ones_like(batch.target_N, dtype=torch.float32) if batch.weight_N is None else batch.weight_N
