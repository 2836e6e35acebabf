"""The policy loss against plain loops over floats, its truth tables, its invariances, and what it refuses.

Suffixes: N tokens, S sequences.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rorqual.rl.diagnostics import Diagnostics, merge
from rorqual.rl.losses import LossScale, PolicyTokens, policy_loss
from rorqual.rl.objective import PRESETS, ObjectiveConfig

CONFIGS = {
    "v32": PRESETS["v32"],
    "r1": PRESETS["r1"],
    "asymmetric clip": ObjectiveConfig(clip_low=0.1, clip_high=0.4, kl_estimator="none", kl_strength=0.0),
    "gspo": ObjectiveConfig(ratio_level="sequence", clip_low=0.05, clip_high=0.1, sequence_mask_delta=0.05),
    "gspo proximal": ObjectiveConfig(ratio_level="sequence", ratio_denominator="proximal"),
    "proximal": ObjectiveConfig(ratio_denominator="proximal", kl_ratio_denominator="proximal"),
    "capped": ObjectiveConfig(ratio_denominator="proximal", importance_cap=1.05, sequence_mask_delta=0.0),
    "token mean": ObjectiveConfig(aggregation="token_mean", kl_estimator="k3"),
    "constant length": ObjectiveConfig(aggregation="constant_length", constant_length=7),
}


@dataclass(frozen=True)
class Sequence:
    """One sequence as plain floats."""

    current: list[float]
    behaviour: list[float]
    proximal: list[float]
    reference: list[float]
    advantage: float
    kl_strength: float


def random_sequences(seed: int, lengths: list[int]) -> list[Sequence]:
    generator = torch.Generator().manual_seed(seed)

    def column(length: int, base: Tensor | None, spread: float) -> Tensor:
        noise = torch.randn(length, generator=generator, dtype=torch.float64)
        return -1.5 + noise if base is None else base + spread * noise

    sequences = []
    for index, length in enumerate(lengths):
        current = column(length, None, 1.0)
        proximal = column(length, current, 0.3)
        columns = (current, column(length, proximal, 0.1), proximal, column(length, current, 0.5))
        advantage = 0.0 if index % 5 == 4 else float(torch.randn((), generator=generator))
        strength = float(torch.rand((), generator=generator))
        sequences.append(Sequence(*(values.tolist() for values in columns), advantage, strength))
    return sequences


def pack(sequences: list[Sequence], kl: bool = True) -> PolicyTokens:
    def flat(name: str) -> Tensor:
        return torch.tensor([value for each in sequences for value in getattr(each, name)], dtype=torch.float64)

    index = [i for i, each in enumerate(sequences) for _ in each.current]
    strengths = [each.kl_strength if kl else 0.0 for each in sequences]
    return PolicyTokens(
        current_N=flat("current").requires_grad_(),
        behaviour_N=flat("behaviour"),
        proximal_N=flat("proximal"),
        reference_N=flat("reference"),
        sequence_index_N=torch.tensor(index, dtype=torch.int64),
        advantage_S=torch.tensor([each.advantage for each in sequences], dtype=torch.float64),
        kl_strength_S=torch.tensor(strengths, dtype=torch.float64),
    )


def total_scale(sequences: list[Sequence]) -> LossScale:
    return LossScale(len(sequences), sum(len(each.current) for each in sequences))


def loss_and_gradient(
    sequences: list[Sequence], config: ObjectiveConfig, scale: LossScale | None = None
) -> tuple[float, list[float], Diagnostics]:
    tokens = pack(sequences, kl=config.kl_estimator != "none")
    loss, diagnostics = policy_loss(tokens, config, scale or total_scale(sequences))
    (gradient_N,) = torch.autograd.grad(loss, tokens.current_N)
    return loss.item(), gradient_N.tolist(), diagnostics


# ------------------------------------------------------------------------------------- against plain loops


def loop_loss(sequences: list[Sequence], config: ObjectiveConfig) -> float:
    """The objective of the config, token by token, in Python floats."""
    objective = 0.0
    num_tokens = sum(len(each.current) for each in sequences)
    for each in sequences:
        length = len(each.current)
        drift = sum(b - c for b, c in zip(each.behaviour, each.current, strict=True)) / length
        masked = config.sequence_mask_delta is not None and each.advantage < 0 and drift > config.sequence_mask_delta
        old = each.behaviour if config.ratio_denominator == "behaviour" else each.proximal
        product = math.prod(math.exp(c) / math.exp(o) for c, o in zip(each.current, old, strict=True))
        for t in range(length):
            ratio = math.exp(each.current[t]) / math.exp(old[t])
            if config.ratio_level == "sequence":
                ratio = product ** (1 / length)
            bounded = ratio
            if bounded > 1 + config.clip_high:
                bounded = 1 + config.clip_high
            if bounded < 1 - config.clip_low:
                bounded = 1 - config.clip_low
            gain = 0.0 if masked else min(ratio * each.advantage, bounded * each.advantage)
            if config.importance_cap is not None:
                gain *= min(math.exp(each.proximal[t]) / math.exp(each.behaviour[t]), config.importance_cap)
            if config.kl_estimator != "none":
                over = math.exp(each.reference[t]) / math.exp(each.current[t])
                estimate = over - math.log(over) - 1
                if config.kl_estimator == "unbiased_k3":
                    from_N = each.behaviour if config.kl_ratio_denominator == "behaviour" else each.proximal
                    estimate *= math.exp(each.current[t]) / math.exp(from_N[t])
                gain -= each.kl_strength * estimate
            divisor = {
                "sequence_mean": len(sequences) * length,
                "token_mean": num_tokens,
                "constant_length": len(sequences) * (config.constant_length or 0),
            }[config.aggregation]
            objective += gain / divisor
    return -objective


def loop_gradient(sequences: list[Sequence], config: ObjectiveConfig, step: float = 1e-6) -> list[float]:
    """Central differences of `loop_loss`, one token at a time."""
    gradient = []
    for i, each in enumerate(sequences):
        for t in range(len(each.current)):
            sides = []
            for sign in (1, -1):
                moved = [value + sign * step * (t == s) for s, value in enumerate(each.current)]
                changed = [*sequences[:i], replace(each, current=moved), *sequences[i + 1 :]]
                sides.append(loop_loss(changed, config))
            gradient.append((sides[0] - sides[1]) / (2 * step))
    return gradient


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("seed", range(4))
def test_loss_and_gradient_equal_plain_loops(name: str, seed: int) -> None:
    sequences = random_sequences(seed, [3, 1, 5, 2, 4, 6, 2, 3])
    loss, gradient, _ = loss_and_gradient(sequences, CONFIGS[name])
    assert loss == pytest.approx(loop_loss(sequences, CONFIGS[name]), rel=1e-12)
    assert gradient == pytest.approx(loop_gradient(sequences, CONFIGS[name]), rel=1e-6, abs=1e-8)


def test_the_loops_see_every_branch() -> None:
    """The random sequences are clipped on both sides, masked, and capped; else the comparison above would be empty."""
    sequences = [each for seed in range(4) for each in random_sequences(seed, [3, 1, 5, 2, 4, 6, 2, 3])]
    metrics = loss_and_gradient(sequences, CONFIGS["capped"])[2].metrics()
    assert 0.1 < metrics["clip_fraction/positive"] < 0.9
    assert 0.1 < metrics["clip_fraction/negative"] < 0.9
    assert 0.1 < metrics["sequence_mask_rate/negative"] < 0.9
    assert 0.1 < metrics["importance/capped_fraction"] < 0.9


# ------------------------------------------------------------------------------------- truth tables


def one_sequence(
    log_ratio: float, advantage: float, kl_strength: float = 0.0, length: int = 2, proximal_drift: float = 0.0
) -> Sequence:
    """Every number is a sum of powers of two, so that comparisons at a boundary are exact."""
    current = [-1.5] * length
    behaviour = [value - log_ratio for value in current]
    proximal = [value - proximal_drift for value in current]
    return Sequence(current, behaviour, proximal, [-2.0] * length, advantage, kl_strength)


@pytest.mark.parametrize(
    ("advantage", "drift", "kept"),
    [
        (1.0, 0.25, True),
        (1.0, 0.5, True),
        (1.0, 0.75, True),
        (0.0, 0.75, True),
        (-1.0, -0.75, True),
        (-1.0, 0.25, True),
        (-1.0, 0.5, True),
        (-1.0, 0.75, False),
    ],
)
def test_sequence_mask_truth_table(advantage: float, drift: float, kept: bool) -> None:
    """Drift is mean log(behaviour / current); delta is 0.5, and exactly at delta a sequence is kept."""
    free = {"clip_low": 100.0, "clip_high": 100.0, "kl_strength": 0.0}
    sequences = [one_sequence(-drift, advantage)]
    masked = loss_and_gradient(sequences, ObjectiveConfig(sequence_mask_delta=0.5, **free))
    plain = loss_and_gradient(sequences, ObjectiveConfig(sequence_mask_delta=None, **free))
    assert masked[:2] == (plain[:2] if kept else (0.0, [0.0, 0.0]))
    sign = {1.0: "positive", -1.0: "negative"}.get(advantage)
    if sign is not None:
        assert masked[2].metrics()[f"sequence_mask_rate/{sign}"] == float(not kept)
        assert masked[2].metrics()[f"drift/{sign}"] == drift


def test_sequence_mask_uses_the_mean_over_the_sequence() -> None:
    config = ObjectiveConfig(sequence_mask_delta=0.5, kl_strength=0.0)
    current, behaviour = [-1.5, -1.5, -1.5, -1.5], [-0.5, -0.5, -1.5, -1.5]
    at_delta = Sequence(current, behaviour, current, current, -1.0, 0.0)
    assert any(loss_and_gradient([at_delta], config)[1])
    above = replace(at_delta, behaviour=[-0.5, -0.5, -1.25, -1.5])
    assert not any(loss_and_gradient([above], config)[1])


@pytest.mark.parametrize("denominator", ["behaviour", "proximal"])
def test_sequence_mask_looks_at_the_sampler_whatever_the_ratio_looks_at(denominator: str) -> None:
    config = ObjectiveConfig(sequence_mask_delta=0.5, ratio_denominator=denominator, clip_low=0.9, kl_strength=0.0)
    far_from_sampler = one_sequence(-0.75, -1.0, proximal_drift=0.0)
    near_sampler = one_sequence(0.0, -1.0, proximal_drift=-0.75)
    assert not any(loss_and_gradient([far_from_sampler], config)[1])
    assert any(loss_and_gradient([near_sampler], config)[1])


def test_sequence_mask_leaves_the_kl_term_alone() -> None:
    config = ObjectiveConfig(sequence_mask_delta=0.5)
    masked = loss_and_gradient([one_sequence(-0.75, -1.0, kl_strength=0.5)], config)
    kl_only = loss_and_gradient([one_sequence(-0.75, 0.0, kl_strength=0.5)], config)
    assert masked[:2] == kl_only[:2]
    assert any(masked[1])


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "clipped"),
    [
        (1.0, 0.5, True),
        (1.0, 0.125, False),
        (1.0, -0.5, False),
        (-1.0, 0.5, False),
        (-1.0, -0.125, False),
        (-1.0, -0.5, True),
        (1.0, 0.0, False),
        (-1.0, 0.0, False),
    ],
)
@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_clipping_by_sign(advantage: float, log_ratio: float, clipped: bool, ratio_level: str) -> None:
    """The gradient of -min(r A, clip(r) A) / |o| is -r A / |o|, or 0 where the clip bites."""
    config = ObjectiveConfig(ratio_level=ratio_level, kl_strength=0.0)
    _, gradient, diagnostics = loss_and_gradient([one_sequence(log_ratio, advantage)], config)
    expected = 0.0 if clipped else -math.exp(log_ratio) * advantage / 2
    assert gradient == pytest.approx([expected, expected], rel=1e-12)
    assert diagnostics.metrics()["clip_fraction"] == float(clipped)


def test_r1_clip_of_ten_never_acts_from_below() -> None:
    _, gradient, _ = loss_and_gradient([one_sequence(-8.0, -1.0)], PRESETS["r1"])
    assert gradient == pytest.approx([math.exp(-8.0) / 2] * 2)


def test_aggregations_weigh_sequences_as_stated() -> None:
    """At ratio 1 the surrogate gradient of a token is -A x its weight."""
    sequences = [one_sequence(0.0, 1.0, length=1), one_sequence(0.0, 1.0, length=4)]
    weights = {}
    for aggregation, length in (("sequence_mean", None), ("token_mean", None), ("constant_length", 8)):
        config = ObjectiveConfig(aggregation=aggregation, constant_length=length, kl_strength=0.0)
        weights[aggregation] = [-value for value in loss_and_gradient(sequences, config)[1]]
    assert weights["sequence_mean"] == pytest.approx([1 / 2] + [1 / 8] * 4)
    assert weights["token_mean"] == pytest.approx([1 / 5] * 5)
    assert weights["constant_length"] == pytest.approx([1 / 16] * 5)


def test_kl_strength_is_per_sequence() -> None:
    sequences = [one_sequence(0.0, 0.0, kl_strength=strength) for strength in (0.0, 0.25, 0.5)]
    _, gradient, _ = loss_and_gradient(sequences, ObjectiveConfig())
    assert gradient[:2] == [0.0, 0.0]
    assert gradient[4] == pytest.approx(2 * gradient[2])
    assert gradient[2] == pytest.approx(0.25 * (-1.5 - -2.0) / 6), "beta r log(pi/ref) / (N |o|)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unbiased_kl_stays_finite_far_below_the_reference(dtype: torch.dtype) -> None:
    """pi_ref / pi_theta = e^299 overflows float32; its product with the ratio is tame."""
    current_N = torch.tensor([-300.0, -1.0], dtype=dtype, requires_grad=True)
    tokens = PolicyTokens(
        current_N=current_N,
        behaviour_N=torch.tensor([-2.0, -1.0], dtype=dtype),
        reference_N=torch.tensor([-1.0, -1.0], dtype=dtype),
        sequence_index_N=torch.zeros(2, dtype=torch.int64),
        advantage_S=torch.zeros(1, dtype=dtype),
        kl_strength_S=torch.ones(1, dtype=dtype),
    )
    loss, _ = policy_loss(tokens, ObjectiveConfig(), LossScale(1, 2))
    loss.backward()
    assert loss.item() == pytest.approx(math.e / 2, rel=1e-6), "pi_ref / pi_old of the first token, 0 of the second"
    assert current_N.grad is not None
    assert current_N.grad.tolist() == pytest.approx([0.0, 0.0], abs=1e-12)


# ------------------------------------------------------------------------------------- invariance

batches = st.builds(random_sequences, st.integers(0, 2**20), st.lists(st.integers(1, 5), min_size=1, max_size=7))


@pytest.mark.parametrize("name", CONFIGS)
@given(data=st.data(), sequences=batches)
def test_independent_of_the_split_into_micro_batches_and_of_the_order(
    name: str, data: st.DataObject, sequences: list[Sequence]
) -> None:
    config, scale = CONFIGS[name], total_scale(sequences)
    loss, gradient, diagnostics = loss_and_gradient(sequences, config)
    order = data.draw(st.permutations(range(len(sequences))))
    cuts = data.draw(st.lists(st.integers(1, len(sequences)), max_size=3).map(sorted))
    starts = [0, *cuts]
    micro_batches = [order[start:end] for start, end in zip(starts, [*cuts, len(order)], strict=True) if start < end]

    parts = [loss_and_gradient([sequences[i] for i in chosen], config, scale) for chosen in micro_batches]
    assert sum(part[0] for part in parts) == pytest.approx(loss, rel=1e-9, abs=1e-12)

    lengths = [len(each.current) for each in sequences]
    position = {i: sum(lengths[:i]) for i in range(len(sequences))}
    expected = [gradient[position[i] + t] for i in order for t in range(lengths[i])]
    assert [value for part in parts for value in part[1]] == pytest.approx(expected, rel=1e-9, abs=1e-12)

    merged = merge([part[2] for part in parts]).metrics()
    assert merged == pytest.approx(diagnostics.metrics(), rel=1e-5, abs=1e-9)


def test_tokens_of_a_sequence_need_not_be_neighbours() -> None:
    tokens = pack(random_sequences(0, [3, 2, 4]))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    mixed = PolicyTokens(
        current_N=tokens.current_N.detach()[order].requires_grad_(),
        behaviour_N=tokens.behaviour_N[order],
        proximal_N=tokens.proximal_N[order] if tokens.proximal_N is not None else None,
        reference_N=tokens.reference_N[order] if tokens.reference_N is not None else None,
        sequence_index_N=tokens.sequence_index_N[order],
        advantage_S=tokens.advantage_S,
        kl_strength_S=tokens.kl_strength_S,
    )
    config, scale = CONFIGS["gspo"], LossScale(3, 9)
    losses = [policy_loss(each, config, scale)[0] for each in (tokens, mixed)]
    torch.testing.assert_close(losses[0], losses[1])
    gradients = [
        torch.autograd.grad(loss, each.current_N)[0] for loss, each in zip(losses, (tokens, mixed), strict=True)
    ]
    torch.testing.assert_close(gradients[0][order], gradients[1])
