"""What the policy loss did, measured on the way and without waiting for the device.

In: the detached intermediate values of each micro-batch. Out: after `merge` over the micro-batches of a step, a flat
dict of floats. A figure that nothing was measured for (say, no sequence had a negative advantage) is absent, never 0 or
NaN.

Shape suffixes: N sampled tokens, S sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rorqual.records import Trajectory

RATIO_QUANTILES = {"min": 0.0, "p01": 0.01, "p50": 0.5, "p99": 0.99, "max": 1.0}

SIGNS = ("positive", "negative")


@dataclass(frozen=True, eq=False)
class LossParts:
    """Intermediate values of `losses.policy_loss`, before weighting: what the diagnostics are made of."""

    surrogate_loss: Tensor
    kl_loss: Tensor
    log_ratio_N: Tensor
    clipped_N: Tensor
    kl_N: Tensor | None
    drift_S: Tensor
    mask_S: Tensor
    importance_N: Tensor | None
    importance_cap: float | None


@dataclass(frozen=True, eq=False)
class Diagnostics:
    """Mergeable statistics of one or more micro-batches.

    totals: plain sums, such as the two parts of the loss. means: pairs (sum, count) as tensors of shape [2]. maxima:
    scalars. log_ratio_N: the raw log importance ratio of every token, before any clip, for the quantiles.
    sequences: one value a sequence, in the order of the micro-batches: "drift", and "masked" (1 where the off-policy
    sequence mask switched the surrogate off).
    """

    totals: dict[str, Tensor]
    means: dict[str, Tensor]
    maxima: dict[str, Tensor]
    log_ratio_N: Tensor
    sequences: dict[str, Tensor] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Flat figures for the metrics file. The only call that waits for the device."""
        metrics = {name: float(total) for name, total in self.totals.items()}
        for name, pair in self.means.items():
            total, count = pair.tolist()
            if count > 0:
                metrics[name] = total / count
        if self.log_ratio_N.numel():
            metrics |= {name: float(maximum) for name, maximum in self.maxima.items()}
            metrics |= _ratio_quantiles(self.log_ratio_N)
        return metrics


def merge(diagnostics: Sequence[Diagnostics]) -> Diagnostics:
    """The diagnostics of all given micro-batches together, as if they had been one. Raises: ValueError for none."""
    if not diagnostics:
        raise ValueError("there are no diagnostics to merge; a step has at least one micro-batch.")
    return Diagnostics(
        totals={name: torch.stack(values).sum() for name, values in _columns([each.totals for each in diagnostics])},
        means={name: torch.stack(values).sum(0) for name, values in _columns([each.means for each in diagnostics])},
        maxima={name: torch.stack(values).max() for name, values in _columns([each.maxima for each in diagnostics])},
        log_ratio_N=torch.cat([each.log_ratio_N for each in diagnostics]),
        sequences={name: torch.cat(values) for name, values in _columns([each.sequences for each in diagnostics])},
    )


def _columns(rows: Sequence[dict[str, Tensor]]) -> list[tuple[str, list[Tensor]]]:
    """Values by name; a micro-batch without a reference has no KL, so names may be missing from some rows."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [(name, [row[name] for row in rows if name in row]) for name in names]


@torch.no_grad()
def diagnose(
    parts: LossParts,
    *,
    current_N: Tensor,
    behaviour_N: Tensor,
    proximal_N: Tensor | None,
    advantage_S: Tensor,
    sequence_index_N: Tensor,
) -> Diagnostics:
    """Summarise one micro-batch. The mismatch between engine and trainer is proximal, else current, over behaviour."""
    advantage_N = advantage_S[sequence_index_N]
    means: dict[str, Tensor] = {"clip_fraction": _mean(parts.clipped_N)}
    for sign, tokens_N, sequences_S in zip(SIGNS, _by_sign(advantage_N), _by_sign(advantage_S), strict=True):
        means[f"clip_fraction/{sign}"] = _mean(parts.clipped_N, tokens_N)
        means[f"sequence_mask_rate/{sign}"] = _mean(~parts.mask_S, sequences_S)
        means[f"drift/{sign}"] = _mean(parts.drift_S, sequences_S)
        if parts.kl_N is not None:
            means[f"kl/{sign}"] = _mean(parts.kl_N, tokens_N)
    if parts.kl_N is not None:
        means["kl"] = _mean(parts.kl_N)
    if parts.importance_N is not None:
        assert parts.importance_cap is not None
        means["importance/mean"] = _mean(parts.importance_N)
        means["importance/capped_fraction"] = _mean(parts.importance_N >= parts.importance_cap)
    trainer_N = current_N if proximal_N is None else proximal_N
    difference_N = trainer_N - behaviour_N
    means["mismatch/mean"] = _mean(difference_N.abs())
    means["mismatch/kl"] = _mean(torch.expm1(difference_N) - difference_N)
    largest = difference_N.abs().max() if difference_N.numel() else difference_N.new_zeros(())
    return Diagnostics(
        totals={
            "loss/surrogate": parts.surrogate_loss.detach(),
            "loss/kl": parts.kl_loss.detach(),
            "zero_advantage_sequences": (advantage_S == 0.0).sum().to(advantage_S.dtype),
        },
        means=means,
        maxima={"mismatch/max": largest},
        log_ratio_N=parts.log_ratio_N.detach(),
        sequences={"drift": parts.drift_S, "masked": (~parts.mask_S).to(parts.drift_S.dtype)},
    )


def sampling_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Means over the sampled tokens of a step: the sampler's entropy in nats, and the mass that its truncation kept."""
    segments = [segment for trajectory in trajectories for segment in trajectory.segments]
    num_sampled = sum(segment.num_sampled for segment in segments)
    if not num_sampled:
        return {}
    return {
        "sampling/entropy": math.fsum(math.fsum(segment.entropies) for segment in segments) / num_sampled,
        "sampling/kept_mass": math.fsum(each.kept_mass * each.num_sampled for each in segments) / num_sampled,
        "sampling/num_tokens": float(num_sampled),
    }


def _by_sign(values: Tensor) -> tuple[Tensor, Tensor]:
    return values > 0.0, values < 0.0


def _mean(values: Tensor, chosen: Tensor | None = None) -> Tensor:
    values = values.to(torch.get_default_dtype()) if values.dtype == torch.bool else values.detach()
    if chosen is None:
        return torch.stack([values.sum(), values.new_tensor(float(values.numel()))])
    return torch.stack([torch.where(chosen, values, 0.0).sum(), chosen.sum().to(values.dtype)])


def _ratio_quantiles(log_ratio_N: Tensor) -> dict[str, float]:
    """Nearest-rank quantiles of the ratio; sorted once, since `torch.quantile` refuses more than 16 million values."""
    sorted_N = log_ratio_N.double().cpu().sort().values
    last = sorted_N.numel() - 1
    return {
        f"ratio/{name}": math.exp(min(float(sorted_N[round(share * last)]), 700.0))
        for name, share in RATIO_QUANTILES.items()
    }
