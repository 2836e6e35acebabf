"""The training losses, as pure functions of the log-probs of sampled tokens.

In: flat tensors over the N sampled tokens of one micro-batch, and the totals of the whole optimiser step. Out: a scalar
to call `backward` on, and diagnostics. The micro-batch losses of a step add up to the loss of the step, however it was
split. Which objective is minimised is said by `objective.ObjectiveConfig`; where the log-probs come from is the
trainer's affair.

A trajectory whose context was rewritten is several sequences, its segments. The mean of the objective is over
trajectories, and the o_i of its 1/|o_i| is all that was sampled in one: however a trajectory is cut into segments, each
of its tokens has the same weight, and N is not larger. What is measured on a sequence is measured on a segment, since
each has a context of its own: the ratio of `ratio_level` "sequence", and the drift behind the sequence mask.

Shape suffixes: N sampled tokens of the micro-batch, S sequences of the micro-batch. A sequence is one TrainSample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.rl.diagnostics import Diagnostics, LossParts, diagnose
from rorqual.rl.objective import ObjectiveConfig


@dataclass(frozen=True, eq=False)
class PolicyTokens:
    """The sampled tokens of one micro-batch; a sequence is never split over micro-batches.

    All log-probs are in nats, of one floating dtype of at least 32 bits, over the same support (the kept tokens, if the
    sampler truncated).

    current_N: under the parameters being updated; the only tensor with a gradient.
    behaviour_N: those of the sampler at sampling time.
    proximal_N: the trainer's own before the update; None where the config does not ask for it.
    reference_N: those of the frozen KL anchor; None where every KL strength of the micro-batch is 0.
    sequence_index_N: int64 in [0, S): which sequence a token belongs to. advantage_S, kl_strength_S: one value a
        sequence.
    trajectory_length_S: int64, the sampled tokens of the whole trajectory that a sequence is a segment of; None where
        every sequence is a whole trajectory.
    Raises: ValueError for shapes, dtypes or devices that do not fit together.
    """

    current_N: Tensor
    behaviour_N: Tensor
    sequence_index_N: Tensor
    advantage_S: Tensor
    kl_strength_S: Tensor
    proximal_N: Tensor | None = None
    reference_N: Tensor | None = None
    trajectory_length_S: Tensor | None = None

    def __post_init__(self) -> None:
        current = self.current_N
        if current.dim() != 1 or current.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"current_N is {current.dtype} of shape {tuple(current.shape)}; expected one dimension in float32 or "
                "float64: a ratio of 16-bit log-probs is wrong by a few per cent."
            )
        per_token = {"behaviour_N": self.behaviour_N, "proximal_N": self.proximal_N, "reference_N": self.reference_N}
        per_sequence = {"kl_strength_S": self.kl_strength_S, "advantage_S": self.advantage_S}
        _check_alike(per_token, current, current.shape)
        _check_alike(per_sequence, current, torch.Size([self.advantage_S.numel()]))
        if self.sequence_index_N.dtype != torch.int64 or self.sequence_index_N.shape != current.shape:
            raise ValueError(
                f"sequence_index_N is {self.sequence_index_N.dtype} of shape {tuple(self.sequence_index_N.shape)}; "
                f"expected int64 of shape {tuple(current.shape)}."
            )
        whole = self.trajectory_length_S
        if whole is not None and (whole.dtype != torch.int64 or whole.shape != self.advantage_S.shape):
            raise ValueError(
                f"trajectory_length_S is {whole.dtype} of shape {tuple(whole.shape)}; expected int64 of shape "
                f"{tuple(self.advantage_S.shape)}."
            )

    @property
    def num_sequences(self) -> int:
        return self.advantage_S.numel()


@dataclass(frozen=True)
class LossScale:
    """Totals over every micro-batch, and every rank, of one optimiser step: gradients are then *summed* over ranks."""

    num_trajectories: int
    num_tokens: int

    def __post_init__(self) -> None:
        """Raises: ValueError for a step without trajectories or tokens: there is nothing to take the mean of."""
        if self.num_trajectories < 1 or self.num_tokens < 1:
            raise ValueError(
                f"the step has {self.num_trajectories} trajectories and {self.num_tokens} tokens; skip a step that has "
                "none."
            )


def policy_loss(tokens: PolicyTokens, config: ObjectiveConfig, scale: LossScale) -> tuple[Tensor, Diagnostics]:
    """Minus the objective of DeepSeek-V3.2 (arXiv 2512.02556, eq. 5, 7-9), for the tokens of one micro-batch.

        1/N sum_i 1/|o_i| sum_t  min(r A, clip(r, 1 - low, 1 + high) A) M[i]  -  beta_i KL[i, t]

    Returns the loss, whose only gradient is with respect to `current_N`, and detached diagnostics.
    Raises: ValueError when a tensor that the config needs is missing, or when a sequence has no token.
    """
    lengths_S = _lengths(tokens)
    _check_inputs(tokens, config, lengths_S)
    log_ratio_N = _log_ratio(tokens, config, lengths_S)
    advantage_N = tokens.advantage_S[tokens.sequence_index_N]
    surrogate_N, clipped_N = _clipped_surrogate(log_ratio_N, advantage_N, config)
    drift_S = _sequence_mean((tokens.behaviour_N - tokens.current_N).detach(), tokens, lengths_S)
    mask_S = _sequence_mask(drift_S, tokens.advantage_S, config.sequence_mask_delta)
    surrogate_N = surrogate_N * mask_S.to(surrogate_N.dtype)[tokens.sequence_index_N]
    importance_N = _importance_weight(tokens, config)
    if importance_N is not None:
        surrogate_N = surrogate_N * importance_N
    weight_N = _token_weights(tokens, config, scale, lengths_S)
    surrogate_loss = -(weight_N * surrogate_N).sum()
    kl_N = _kl(tokens, config)
    strength_N = tokens.kl_strength_S[tokens.sequence_index_N]
    kl_loss = (weight_N * strength_N * kl_N).sum() if kl_N is not None else surrogate_loss.new_zeros(())
    parts = LossParts(
        surrogate_loss=surrogate_loss,
        kl_loss=kl_loss,
        log_ratio_N=log_ratio_N,
        clipped_N=clipped_N,
        kl_N=kl_N,
        drift_S=drift_S,
        mask_S=mask_S,
        importance_N=importance_N,
        importance_cap=config.importance_cap,
    )
    diagnostics = diagnose(
        parts,
        current_N=tokens.current_N,
        behaviour_N=tokens.behaviour_N,
        proximal_N=tokens.proximal_N,
        advantage_S=tokens.advantage_S,
        sequence_index_N=tokens.sequence_index_N,
    )
    return surrogate_loss + kl_loss, diagnostics


# ------------------------------------------------------------------------------------------------------ terms


def _log_ratio(tokens: PolicyTokens, config: ObjectiveConfig, lengths_S: Tensor) -> Tensor:
    """log r per token; a sequence ratio is the same for all tokens of its sequence."""
    log_ratio_N = tokens.current_N - _denominator(tokens, config.ratio_denominator)
    if config.ratio_level == "token":
        return log_ratio_N
    return _sequence_mean(log_ratio_N, tokens, lengths_S)[tokens.sequence_index_N]


def _clipped_surrogate(log_ratio_N: Tensor, advantage_N: Tensor, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """min(r A, clip(r) A), and where the clip bites, that is where the gradient is zero."""
    ratio_N = log_ratio_N.exp()
    bounded_N = ratio_N.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    unclipped_N, clipped_N = ratio_N * advantage_N, bounded_N * advantage_N
    return torch.minimum(unclipped_N, clipped_N), (clipped_N < unclipped_N).detach()


def _sequence_mask(drift_S: Tensor, advantage_S: Tensor, delta: float | None) -> Tensor:
    """False for the sequences to drop: negative advantage and mean log(behaviour / current) above delta (eq. 8)."""
    if delta is None:
        return torch.ones_like(drift_S, dtype=torch.bool)
    return ~((advantage_S < 0.0) & (drift_S > delta))


def _importance_weight(tokens: PolicyTokens, config: ObjectiveConfig) -> Tensor | None:
    if config.importance_cap is None:
        return None
    proximal_N = _denominator(tokens, "proximal")
    return (proximal_N - tokens.behaviour_N).exp().clamp(max=config.importance_cap)


def _kl(tokens: PolicyTokens, config: ObjectiveConfig) -> Tensor | None:
    """The KL estimate per token, or None without a reference.

    Unbiased K3 is r (pi_ref/pi - log(pi_ref/pi) - 1). It is computed as pi_ref/pi_old - r (1 + log(pi_ref/pi)), which
    is the same without ever forming pi_ref/pi: that overflows, and times a vanished r gives NaN, where the policy has
    moved far below the reference.
    """
    if tokens.reference_N is None or config.kl_estimator == "none":
        return None
    log_reference_ratio_N = tokens.reference_N - tokens.current_N
    if config.kl_estimator == "k3":
        return torch.expm1(log_reference_ratio_N) - log_reference_ratio_N
    denominator_N = _denominator(tokens, config.kl_ratio_denominator)
    ratio_N = (tokens.current_N - denominator_N).exp()
    return (tokens.reference_N - denominator_N).exp() - ratio_N * (1.0 + log_reference_ratio_N)


def _token_weights(tokens: PolicyTokens, config: ObjectiveConfig, scale: LossScale, lengths_S: Tensor) -> Tensor:
    """How much each token counts in the loss of the whole step."""
    if config.aggregation == "token_mean":
        return torch.full_like(tokens.behaviour_N, 1.0 / scale.num_tokens)
    if config.aggregation == "constant_length":
        assert config.constant_length is not None
        return torch.full_like(tokens.behaviour_N, 1.0 / (scale.num_trajectories * config.constant_length))
    whole_S = lengths_S if tokens.trajectory_length_S is None else tokens.trajectory_length_S.to(lengths_S.dtype)
    return (1.0 / (scale.num_trajectories * whole_S))[tokens.sequence_index_N]


# ------------------------------------------------------------------------------------------------------ helpers


def _denominator(tokens: PolicyTokens, name: str) -> Tensor:
    if name == "behaviour":
        return tokens.behaviour_N
    assert tokens.proximal_N is not None
    return tokens.proximal_N


def _lengths(tokens: PolicyTokens) -> Tensor:
    ones_N = torch.ones_like(tokens.behaviour_N)
    return torch.zeros_like(tokens.advantage_S).index_add(0, tokens.sequence_index_N, ones_N)


def _sequence_mean(values_N: Tensor, tokens: PolicyTokens, lengths_S: Tensor) -> Tensor:
    return torch.zeros_like(tokens.advantage_S).index_add(0, tokens.sequence_index_N, values_N) / lengths_S


def _check_alike(tensors: Mapping[str, Tensor | None], current_N: Tensor, shape: torch.Size) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != current_N.dtype or tensor.device != current_N.device:
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}; expected "
                f"{current_N.dtype} of shape {tuple(shape)} on {current_N.device}."
            )
        if tensor.requires_grad:
            raise ValueError(f"{name} requires a gradient; only current_N may, so detach it.")


def _check_inputs(tokens: PolicyTokens, config: ObjectiveConfig, lengths_S: Tensor) -> None:
    if config.needs_proximal and tokens.proximal_N is None:
        raise ValueError(
            "the objective uses a proximal denominator, but proximal_N is None; compute it before the update."
        )
    kl_cannot_be_computed = tokens.reference_N is None or config.kl_estimator == "none"
    if kl_cannot_be_computed and bool((tokens.kl_strength_S != 0.0).any()):
        raise ValueError(
            f"kl_strength_S has entries above 0, but kl_estimator is {config.kl_estimator!r} and reference_N is "
            f"{'None' if tokens.reference_N is None else 'given'}; give the reference log-probs and an estimator."
        )
    if tokens.num_sequences and not bool((lengths_S > 0).all()):
        empty = [index for index, length in enumerate(lengths_S.tolist()) if length == 0]
        raise ValueError(f"sequences {empty} have no sampled token; leave them out of the micro-batch.")
