"""The diagnostics against figures worked out by hand."""

import math
from array import array

import pytest
import torch

from rorqual.records import Evidence, Segment, Trajectory
from rorqual.rl.diagnostics import Diagnostics, merge, sampling_metrics
from rorqual.rl.losses import LossScale, PolicyTokens, policy_loss
from rorqual.rl.objective import ObjectiveConfig


def measure(config: ObjectiveConfig, *, proximal: bool = False, reference: bool = True) -> Diagnostics:
    """Two tokens of a good sequence, two of a bad one, one of an indifferent one."""
    current_N = torch.tensor([-1.0, -1.0, -2.0, -2.0, -1.0], requires_grad=True)
    tokens = PolicyTokens(
        current_N=current_N,
        behaviour_N=torch.tensor([-1.0, -2.0, -1.0, -1.5, -1.0]),
        proximal_N=torch.tensor([-1.0, -1.75, -1.0, -1.5, -0.75]) if proximal else None,
        reference_N=torch.tensor([-1.0, -1.0, -1.0, -2.0, -1.0]) if reference else None,
        sequence_index_N=torch.tensor([0, 0, 1, 1, 2]),
        advantage_S=torch.tensor([2.0, -1.0, 0.0]),
        kl_strength_S=torch.full((3,), 0.5 if reference else 0.0),
    )
    return policy_loss(tokens, config, LossScale(3, 5))[1]


def test_figures() -> None:
    metrics = measure(ObjectiveConfig(sequence_mask_delta=0.5)).metrics()
    assert metrics["ratio/min"] == pytest.approx(math.exp(-1.0))
    assert metrics["ratio/p50"] == 1.0
    assert metrics["ratio/max"] == pytest.approx(math.e), "raw, though the clip is at 1.2"
    assert metrics["clip_fraction"] == pytest.approx(3 / 5)
    assert metrics["clip_fraction/positive"] == 0.5
    assert metrics["clip_fraction/negative"] == 1.0
    assert metrics["drift/positive"] == -0.5
    assert metrics["drift/negative"] == 0.75
    assert (metrics["sequence_mask_rate/positive"], metrics["sequence_mask_rate/negative"]) == (0.0, 1.0)
    assert metrics["zero_advantage_sequences"] == 1.0
    kl = math.exp(-1.0) * (math.e - 1.0 - 1.0)
    assert metrics["kl"] == pytest.approx(kl / 5)
    assert (metrics["kl/positive"], metrics["kl/negative"]) == (0.0, pytest.approx(kl / 2))
    assert metrics["loss/kl"] == pytest.approx(0.5 * kl / 2 / 3)
    assert metrics["loss/surrogate"] == pytest.approx(-(2.0 + 1.2 * 2.0) / 2 / 3)


def test_mismatch_is_current_against_behaviour_without_proximal() -> None:
    metrics = measure(ObjectiveConfig()).metrics()
    assert metrics["mismatch/mean"] == pytest.approx((1.0 + 1.0 + 0.5) / 5)
    assert metrics["mismatch/max"] == 1.0
    expected = (math.e - 2.0) + (math.exp(-1.0) - 1.0 + 1.0) + (math.exp(-0.5) - 1.0 + 0.5)
    assert metrics["mismatch/kl"] == pytest.approx(expected / 5, rel=1e-5)


def test_mismatch_is_proximal_against_behaviour_when_given() -> None:
    metrics = measure(ObjectiveConfig(ratio_denominator="proximal", importance_cap=1.25), proximal=True).metrics()
    assert metrics["mismatch/mean"] == pytest.approx((0.25 + 0.25) / 5)
    assert metrics["mismatch/max"] == 0.25
    assert metrics["mismatch/kl"] == pytest.approx(2 * (math.exp(0.25) - 1.25) / 5, rel=1e-5)
    assert metrics["importance/mean"] == pytest.approx((3.0 + 2 * 1.25) / 5)
    assert metrics["importance/capped_fraction"] == pytest.approx(2 / 5)


def test_what_was_not_measured_is_absent() -> None:
    metrics = measure(ObjectiveConfig(), reference=False).metrics()
    assert not [name for name in metrics if name.startswith("kl")]
    assert not [name for name in metrics if name.startswith("importance")]
    assert all(math.isfinite(value) for value in metrics.values())


def test_micro_batches_without_a_reference_merge_with_those_that_have_one() -> None:
    config = ObjectiveConfig()
    alone, merged = measure(config), merge([measure(config, reference=False), measure(config)])
    assert merged.metrics()["kl"] == pytest.approx(alone.metrics()["kl"])
    assert merged.metrics()["zero_advantage_sequences"] == 2.0
    assert merged.log_ratio_N.numel() == 10
    assert not merged.log_ratio_N.requires_grad


def test_nothing_to_merge_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one micro-batch"):
        merge([])


def sampled(entropies: list[float], kept_mass: float) -> Trajectory:
    """One prompt token, then one sampled token for each entropy."""
    size = len(entropies)
    segment = Segment(
        token_ids=array("i", [1] * (size + 1)),
        sampled=array("b", [0] + [1] * size),
        logprobs=array("f", [0.0] + [-1.0] * size),
        entropies=array("f", [0.0, *entropies]),
        weight_version=0,
        kept_mass=kept_mass,
    )
    evidence = Evidence(response="", thinking=None, answer=None, num_sampled_tokens=size, end="stop")
    return Trajectory(
        trajectory_id="t",
        task_id="t",
        group_id="t",
        domain="mathematics",
        segments=(segment,),
        messages=(),
        evidence=evidence,
        end="stop",
    )


def test_sampling_metrics_are_means_over_sampled_tokens() -> None:
    metrics = sampling_metrics([sampled([1.0, 2.0, 3.0], 0.5), sampled([2.0], 0.9), sampled([], 1.0)])
    assert metrics == pytest.approx({"sampling/entropy": 2.0, "sampling/kept_mass": 0.6, "sampling/num_tokens": 4.0})
    assert sampling_metrics([sampled([], 1.0)]) == {}
