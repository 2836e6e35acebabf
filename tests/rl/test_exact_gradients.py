"""The expected gradient of the real `policy_loss` against that of what it estimates, by enumeration in float64.

Every outcome of a toy sampler is one sequence, and its probability under the sampler is the weight of that sequence (in
`kl_strength_S` or `advantage_S`): the loss is then the exact expectation, with no sampling noise. The gradient is with
respect to the logits of the toy policy. Estimators known to be wrong must come out wrong, by about the amount they are
known for, so that these tests can tell right from wrong.

Suffixes: V vocabulary, N tokens, S sequences, B prefixes (states of the tabular policy).
"""

import itertools
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rorqual.records import Score
from rorqual.rl.advantages import group_advantages
from rorqual.rl.losses import LossScale, PolicyTokens, policy_loss
from rorqual.rl.objective import ObjectiveConfig

VOCABULARY = 64
SEEDS = range(40)
NO_CLIP = 1e6
EXACT = 1e-10


# ------------------------------------------------------------------------------------- the KL term, one token


class Categorical:
    """Four distributions over one token: current (logits with a gradient), behaviour, proximal, reference."""

    def __init__(self, seed: int, drift: float, mismatch: float, kept_size: int = VOCABULARY) -> None:
        generator = torch.Generator().manual_seed(seed)

        def noise() -> Tensor:
            return torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)

        self.logits_V = noise()
        self.reference_logits_V = self.logits_V + noise()
        self.proximal_logits_V = self.logits_V + drift * noise()
        self.behaviour_logits_V = self.proximal_logits_V + mismatch * noise()
        self.logits_V.requires_grad_()
        self.kept_V = self.behaviour_logits_V >= self.behaviour_logits_V.sort().values[-kept_size]

    def on_support(self, logits_V: Tensor) -> Tensor:
        """Log-probs of the kept tokens, renormalised over them."""
        return logits_V[self.kept_V].log_softmax(0)

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self.logits_V)[0]

    def true_gradient(self) -> Tensor:
        """Of KL(pi || pi_ref) = sum_v pi(v) (log pi(v) - log pi_ref(v)) on the support."""
        current_N, reference_N = self.on_support(self.logits_V), self.on_support(self.reference_logits_V)
        return self.gradient((current_N.exp() * (current_N - reference_N)).sum())

    def loss(
        self,
        estimator: str,
        denominator: str = "behaviour",
        reference_N: Tensor | None = None,
        current_full: bool = False,
    ) -> Tensor:
        """E over the behaviour distribution of the KL term of `policy_loss`."""
        current_N = self.on_support(self.logits_V)
        if current_full:
            current_N = self.logits_V.log_softmax(0)[self.kept_V]
        behaviour_N = self.on_support(self.behaviour_logits_V)
        size = current_N.numel()
        tokens = PolicyTokens(
            current_N=current_N,
            behaviour_N=behaviour_N,
            proximal_N=self.on_support(self.proximal_logits_V),
            reference_N=self.on_support(self.reference_logits_V) if reference_N is None else reference_N,
            sequence_index_N=torch.arange(size),
            advantage_S=torch.zeros(size, dtype=torch.float64),
            kl_strength_S=behaviour_N.exp() * size,
        )
        config = ObjectiveConfig(kl_estimator=estimator, kl_ratio_denominator=denominator, kl_strength=1.0)
        return policy_loss(tokens, config, LossScale(num_trajectories=size, num_tokens=size))[0]

    def expectation(self, estimate: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """E over the behaviour distribution of any estimate(current_N, behaviour_N, reference_N)."""
        behaviour_N = self.on_support(self.behaviour_logits_V)
        estimate_N = estimate(self.on_support(self.logits_V), behaviour_N, self.on_support(self.reference_logits_V))
        return (behaviour_N.exp() * estimate_N).sum()


def relative_error(estimated: Tensor, true: Tensor) -> float:
    return float((estimated - true).norm() / true.norm())


def median_error(
    loss: Callable[[Categorical], Tensor], drift: float, mismatch: float, kept_size: int = VOCABULARY
) -> float:
    toys = [Categorical(seed, drift, mismatch, kept_size) for seed in SEEDS]
    return statistics.median(relative_error(toy.gradient(loss(toy)), toy.true_gradient()) for toy in toys)


def detached_ratio(toy: Categorical) -> Tensor:
    def estimate(current_N: Tensor, behaviour_N: Tensor, reference_N: Tensor) -> Tensor:
        log_reference_ratio_N = reference_N - current_N
        k3_N = log_reference_ratio_N.exp() - log_reference_ratio_N - 1.0
        return (current_N - behaviour_N).exp().detach() * k3_N

    return toy.expectation(estimate)


def straight_through_k2(toy: Categorical) -> Tensor:
    return toy.expectation(lambda current_N, _, reference_N: 0.5 * (current_N - reference_N) ** 2)


SITUATIONS = {"on-policy": (0.0, 0.0), "drift": (0.3, 0.0), "drift and mismatch": (0.3, 0.1)}


@pytest.mark.parametrize("kept_size", [VOCABULARY, 12])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_unbiased_kl_has_the_true_gradient_whatever_the_sampler(situation: str, kept_size: int) -> None:
    drift, mismatch = SITUATIONS[situation]
    for seed in SEEDS:
        toy = Categorical(seed, drift, mismatch, kept_size)
        assert relative_error(toy.gradient(toy.loss("unbiased_k3")), toy.true_gradient()) < EXACT


@pytest.mark.parametrize("seed", range(5))
def test_unbiased_kl_has_the_true_value(seed: int) -> None:
    toy = Categorical(seed, drift=0.3, mismatch=0.1, kept_size=12)
    current_N, reference_N = toy.on_support(toy.logits_V), toy.on_support(toy.reference_logits_V)
    true = (current_N.exp() * (current_N - reference_N)).sum()
    torch.testing.assert_close(toy.loss("unbiased_k3"), true, rtol=EXACT, atol=0.0)


WRONG_ESTIMATORS = [
    # name, loss, and the median relative error (lowest, highest) in each situation
    (
        "plain K3",
        lambda toy: toy.loss("k3"),
        {"on-policy": (0.4, 0.6), "drift": (0.45, 0.75), "drift and mismatch": (0.45, 0.75)},
    ),
    (
        "K3 x detached ratio",
        detached_ratio,
        {"on-policy": (0.4, 0.6), "drift": (0.4, 0.6), "drift and mismatch": (0.4, 0.6)},
    ),
    (
        "K2 straight through",
        straight_through_k2,
        {"on-policy": (0.0, EXACT), "drift": (0.18, 0.4), "drift and mismatch": (0.18, 0.4)},
    ),
    (
        "K3 x ratio to proximal",
        lambda toy: toy.loss("unbiased_k3", denominator="proximal"),
        {"on-policy": (0.0, EXACT), "drift": (0.0, EXACT), "drift and mismatch": (0.05, 0.13)},
    ),
]


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize(("name", "loss", "errors"), WRONG_ESTIMATORS, ids=[row[0] for row in WRONG_ESTIMATORS])
def test_wrong_estimators_are_seen_to_be_wrong(
    name: str, loss: Callable[[Categorical], Tensor], errors: dict[str, tuple[float, float]], situation: str
) -> None:
    lowest, highest = errors[situation]
    error = median_error(loss, *SITUATIONS[situation])
    assert lowest <= error <= highest, f"{name}, {situation}: {error:.3f}"


# ------------------------------------------------------------------------------------- truncated supports


def full_reference(toy: Categorical) -> Tensor:
    return toy.reference_logits_V.log_softmax(0)[toy.kept_V]


def kept_reference_mass(toy: Categorical) -> Tensor:
    return full_reference(toy).exp().sum()


def test_a_current_policy_on_the_full_vocabulary_gives_a_wrong_gradient() -> None:
    error = median_error(lambda toy: toy.loss("unbiased_k3", current_full=True), 0.3, 0.1, kept_size=12)
    assert error > 0.2, error


def test_a_reference_on_the_full_vocabulary_falsifies_the_kl_but_not_its_expected_gradient() -> None:
    """With kept mass Z of the reference, the estimate is off by the constant Z - 1 - log Z."""
    for seed in SEEDS:
        toy = Categorical(seed, drift=0.3, mismatch=0.1, kept_size=12)
        mass = kept_reference_mass(toy)
        right, wrong = toy.loss("unbiased_k3"), toy.loss("unbiased_k3", reference_N=full_reference(toy))
        torch.testing.assert_close(wrong - right, mass - 1.0 - mass.log(), rtol=1e-9, atol=1e-12)
        assert float((wrong - right).detach()) > 0.02
        assert relative_error(toy.gradient(wrong), toy.true_gradient()) < EXACT


def test_a_reference_on_the_full_vocabulary_makes_the_unbiased_kl_noisier() -> None:
    """Where policy and reference agree on the support, only the wrong estimate has noise."""
    toy = Categorical(0, drift=0.3, mismatch=0.1, kept_size=12)
    toy.reference_logits_V = toy.logits_V.detach().clone()
    current_N = toy.on_support(toy.logits_V).detach().requires_grad_()
    for reference_N, noisy in ((toy.on_support(toy.reference_logits_V), False), (full_reference(toy), True)):
        size = current_N.numel()
        tokens = PolicyTokens(
            current_N=current_N,
            behaviour_N=toy.on_support(toy.behaviour_logits_V),
            reference_N=reference_N,
            sequence_index_N=torch.arange(size),
            advantage_S=torch.zeros(size, dtype=torch.float64),
            kl_strength_S=torch.ones(size, dtype=torch.float64),
        )
        loss, _ = policy_loss(tokens, ObjectiveConfig(), LossScale(size, size))
        gradient_N = torch.autograd.grad(loss, current_N)[0] * size
        assert (float(gradient_N.abs().max()) > 0.1) == noisy


def test_a_reference_on_the_full_vocabulary_shrinks_the_gradient_of_plain_k3() -> None:
    for seed in SEEDS:
        toy = Categorical(seed, drift=0.0, mismatch=0.0, kept_size=12)
        right = toy.gradient(toy.loss("k3"))
        wrong = toy.gradient(toy.loss("k3", reference_N=full_reference(toy)))
        torch.testing.assert_close(wrong, right * kept_reference_mass(toy), rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------- sequences of several tokens

STOP, LETTERS, LONGEST = 0, (0, 1, 2), 3


class Tabular:
    """A policy with its own logits for every prefix. A sequence ends with STOP or at three tokens: 15 in all."""

    def __init__(self, seed: int, drift: float, mismatch: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.sequences = [
            sequence
            for length in range(1, LONGEST + 1)
            for sequence in itertools.product(LETTERS, repeat=length)
            if STOP not in sequence[:-1] and (sequence[-1] == STOP or length == LONGEST)
        ]
        self.prefixes = sorted({sequence[:t] for sequence in self.sequences for t in range(len(sequence))})

        def noise() -> Tensor:
            return torch.randn(len(self.prefixes), len(LETTERS), generator=generator, dtype=torch.float64)

        self.logits_BV = noise()
        self.reference_BV = self.logits_BV + noise()
        self.proximal_BV = self.logits_BV + drift * noise()
        self.behaviour_BV = self.proximal_BV + mismatch * noise()
        self.logits_BV.requires_grad_()
        self.reward_S = torch.randn(len(self.sequences), generator=generator, dtype=torch.float64)

    def token_logprobs(self, logits_BV: Tensor, sequences: list[tuple[int, ...]]) -> Tensor:
        logprobs_BV = logits_BV.log_softmax(-1)
        rows = [self.prefixes.index(sequence[:t]) for sequence in sequences for t in range(len(sequence))]
        columns = [token for sequence in sequences for token in sequence]
        return logprobs_BV[rows, columns]

    def probability(self, logits_BV: Tensor) -> Tensor:
        """Of each sequence, as a product written out token by token."""
        table_BV = logits_BV.softmax(-1)
        probabilities = []
        for sequence in self.sequences:
            probability = table_BV.new_ones(())
            for t, token in enumerate(sequence):
                probability = probability * table_BV[self.prefixes.index(sequence[:t]), token]
            probabilities.append(probability)
        return torch.stack(probabilities)

    def tokens(self, sequences: list[tuple[int, ...]], advantage_S: Tensor, kl_strength_S: Tensor) -> PolicyTokens:
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        return PolicyTokens(
            current_N=self.token_logprobs(self.logits_BV, sequences),
            behaviour_N=self.token_logprobs(self.behaviour_BV, sequences),
            proximal_N=self.token_logprobs(self.proximal_BV, sequences),
            reference_N=self.token_logprobs(self.reference_BV, sequences),
            sequence_index_N=torch.repeat_interleave(torch.arange(len(sequences)), lengths),
            advantage_S=advantage_S,
            kl_strength_S=kl_strength_S,
        )

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self.logits_BV)[0]

    def expected_loss_gradient(self, config: ObjectiveConfig, weight_S: Tensor, *, advantage: bool) -> Tensor:
        """Gradient of sum_i weight_i x (the surrogate for advantage 1, or the KL term), one sequence i at a time."""
        zeros_S = torch.zeros_like(weight_S)
        tokens = self.tokens(self.sequences, weight_S if advantage else zeros_S, zeros_S if advantage else weight_S)
        total = int(tokens.current_N.numel())
        return self.gradient(policy_loss(tokens, config, LossScale(num_trajectories=1, num_tokens=total))[0])


UNSCALED = {"aggregation": "constant_length", "constant_length": 1, "clip_low": NO_CLIP, "clip_high": NO_CLIP}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("denominator", ["behaviour", "proximal"])
def test_on_policy_surrogate_has_the_gradient_of_the_expected_reward(seed: int, denominator: str) -> None:
    toy = Tabular(seed, drift=0.0, mismatch=0.0)
    config = ObjectiveConfig(ratio_denominator=denominator, kl_strength=0.0, **UNSCALED)
    true = toy.gradient((toy.probability(toy.logits_BV) * toy.reward_S).sum())
    weight_S = toy.probability(toy.behaviour_BV) * toy.reward_S
    assert relative_error(-toy.expected_loss_gradient(config, weight_S, advantage=True), true) < EXACT


@pytest.mark.parametrize("seed", range(5))
def test_on_policy_sequence_mean_divides_each_sequence_by_its_length(seed: int) -> None:
    toy = Tabular(seed, drift=0.0, mismatch=0.0)
    length_S = torch.tensor([len(sequence) for sequence in toy.sequences], dtype=torch.float64)
    true = toy.gradient((toy.probability(toy.logits_BV) * toy.reward_S / length_S).sum())
    weight_S = toy.probability(toy.behaviour_BV) * toy.reward_S
    for ratio_level in ("token", "sequence"):
        config = ObjectiveConfig(ratio_level=ratio_level, clip_low=NO_CLIP, clip_high=NO_CLIP, kl_strength=0.0)
        assert relative_error(-toy.expected_loss_gradient(config, weight_S, advantage=True), true) < EXACT


@pytest.mark.parametrize(("kind", "factor"), [("leave_one_out", 1.0), ("mean", 0.5)])
def test_leave_one_out_is_unbiased_and_the_mean_baseline_is_short_by_one_gth(kind: str, factor: float) -> None:
    """All groups of two sequences, each with its probability: the expected gradient is `factor` x the true one."""
    toy = Tabular(seed=3, drift=0.0, mismatch=0.0)
    true = toy.gradient((toy.probability(toy.logits_BV) * toy.reward_S).sum())
    probability_S = toy.probability(toy.behaviour_BV).detach()
    weight_S = torch.zeros_like(toy.reward_S)
    for i, j in itertools.product(range(len(toy.sequences)), repeat=2):
        scores = [Score(total=float(toy.reward_S[member]), parts={}) for member in (i, j)]
        advantages = group_advantages(scores, kind)
        for member, advantage in zip((i, j), advantages, strict=True):
            weight_S[member] += probability_S[i] * probability_S[j] * advantage / 2
    config = ObjectiveConfig(kl_strength=0.0, **UNSCALED)
    estimated = -toy.expected_loss_gradient(config, weight_S, advantage=True)
    assert relative_error(estimated, factor * true) < EXACT


@pytest.mark.parametrize("seed", range(5))
def test_unbiased_kl_is_exact_at_every_prefix_that_the_sampler_reached(seed: int) -> None:
    toy = Tabular(seed, drift=0.3, mismatch=0.1)
    behaviour_S = toy.probability(toy.behaviour_BV)
    reached_B = torch.stack(
        [
            sum(
                behaviour_S[i]
                for i, sequence in enumerate(toy.sequences)
                if sequence[: len(p)] == p and len(sequence) > len(p)
            )
            for p in toy.prefixes
        ]
    )
    current_BV, reference_BV = toy.logits_BV.log_softmax(-1), toy.reference_BV.log_softmax(-1)
    kl_B = (current_BV.exp() * (current_BV - reference_BV)).sum(-1)
    true = toy.gradient((reached_B * kl_B).sum())
    config = ObjectiveConfig(kl_strength=1.0, **UNSCALED)
    assert relative_error(toy.expected_loss_gradient(config, behaviour_S, advantage=False), true) < EXACT


# ------------------------------------------------------------------------------------- surrogate, off-policy, one token


def surrogate_gradient_error(seed: int, config: ObjectiveConfig) -> float:
    toy = Categorical(seed, drift=0.3, mismatch=0.1)
    generator = torch.Generator().manual_seed(1000 + seed)
    reward_V = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
    true = toy.gradient((toy.logits_V.softmax(0) * reward_V).sum())
    behaviour_N = toy.on_support(toy.behaviour_logits_V)
    tokens = PolicyTokens(
        current_N=toy.on_support(toy.logits_V),
        behaviour_N=behaviour_N,
        proximal_N=toy.on_support(toy.proximal_logits_V),
        sequence_index_N=torch.arange(VOCABULARY),
        advantage_S=behaviour_N.exp() * reward_V,
        kl_strength_S=torch.zeros(VOCABULARY, dtype=torch.float64),
    )
    loss, _ = policy_loss(tokens, config, LossScale(num_trajectories=1, num_tokens=VOCABULARY))
    return relative_error(-toy.gradient(loss), true)


@pytest.mark.parametrize("seed", range(10))
def test_off_policy_surrogate_is_exact_against_the_sampler_or_with_an_uncapped_correction(seed: int) -> None:
    free = {"clip_low": NO_CLIP, "clip_high": NO_CLIP, "kl_strength": 0.0}
    assert surrogate_gradient_error(seed, ObjectiveConfig(**free)) < EXACT
    corrected = ObjectiveConfig(ratio_denominator="proximal", importance_cap=NO_CLIP, **free)
    assert surrogate_gradient_error(seed, corrected) < EXACT
    assert surrogate_gradient_error(seed, ObjectiveConfig(ratio_denominator="proximal", **free)) > 0.03
