"""The objective as data: every choice that DeepSeek-V3.2, R1 and their relatives make differently is one field here.

`PRESETS` holds the published settings. They are values, never code paths: `losses.policy_loss` reads the fields only.
A mix that no paper defines is refused when the config is built.
"""

from __future__ import annotations

from typing import Literal, get_args

from rorqual.records import Record
from rorqual.rl.advantages import ADVANTAGES, AdvantageKind

RatioLevel = Literal["token", "sequence"]
Denominator = Literal["behaviour", "proximal"]
KLEstimator = Literal["unbiased_k3", "k3", "none"]
Aggregation = Literal["sequence_mean", "token_mean", "constant_length"]


class ObjectiveConfig(Record):
    """What the trainer maximises, in the notation of DeepSeek-V3.2 (arXiv 2512.02556, section 3.1).

    advantage: how the scores of a group become advantages; see `advantages.group_advantages`.
    clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]; above 1, `clip_low` never acts.
    ratio_level: "token", or "sequence": the geometric mean over the sequence (GSPO, arXiv 2507.18071, eq. 7). A
        sequence ratio needs no routing replay.
    ratio_denominator: pi_old of the surrogate. "behaviour" is the sampler's log-prob, so that the mismatch between
        engine and trainer is part of the ratio; "proximal" is the trainer's own, before the update.
    importance_cap: truncated importance sampling: the surrogate of each token is weighted by
        min(proximal / behaviour, cap), outside autograd. None: no weight. Needs the proximal denominator.
    kl_estimator: "unbiased_k3" is K3 times the importance ratio, with the ratio inside autograd (V3.2, eq. 7): its
        gradient is exact whatever the sampler was. "k3" is plain K3 (R1, DeepSeekMath eq. 4): biased, and without bound
        where pi_theta << pi_ref. "none": no KL term.
    kl_ratio_denominator: what was sampled from, for "unbiased_k3". "proximal" is exact only if engine and trainer
        agree.
    kl_strength: beta, for domains that `kl_strength_by_domain` does not name.
    sequence_mask_delta: drop the surrogate of a sequence with a negative advantage whose mean log(behaviour / current),
        in nats a token, exceeds this. None: never. The KL term stays.
    aggregation: "sequence_mean" is 1/N sum_i 1/|o_i| sum_t, "token_mean" is 1/T sum_i sum_t, "constant_length" is
        1/N sum_i 1/constant_length sum_t (Dr. GRPO, arXiv 2503.20783).
    keep_routing, keep_sampling_mask: whether the trainer replays the sampler's expert choice (and the keys that sparse
        attention selected, where the engine records them), and its truncated support.
    """

    advantage: AdvantageKind = "mean"
    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio_level: RatioLevel = "token"
    ratio_denominator: Denominator = "behaviour"
    importance_cap: float | None = None
    kl_estimator: KLEstimator = "unbiased_k3"
    kl_ratio_denominator: Denominator = "behaviour"
    kl_strength: float = 0.001
    kl_strength_by_domain: dict[str, float] = {}
    sequence_mask_delta: float | None = None
    aggregation: Aggregation = "sequence_mean"
    constant_length: int | None = None
    keep_routing: bool = True
    keep_sampling_mask: bool = True

    def __post_init__(self) -> None:
        """Raises: ValueError naming the fields that do not go together, or the one that is out of range."""
        self._check_ranges()
        for clash, advice in self._clashes():
            if clash:
                raise ValueError(f"ObjectiveConfig: {advice}.")

    def _check_ranges(self) -> None:
        valid = {
            "advantage": self.advantage in ADVANTAGES,
            "ratio_level": self.ratio_level in get_args(RatioLevel),
            "ratio_denominator": self.ratio_denominator in get_args(Denominator),
            "kl_estimator": self.kl_estimator in get_args(KLEstimator),
            "kl_ratio_denominator": self.kl_ratio_denominator in get_args(Denominator),
            "aggregation": self.aggregation in get_args(Aggregation),
            "clip_low": self.clip_low > 0.0,
            "clip_high": self.clip_high > 0.0,
            "importance_cap": self.importance_cap is None or self.importance_cap >= 1.0,
            "kl_strength": self.kl_strength >= 0.0,
            "kl_strength_by_domain": all(strength >= 0.0 for strength in self.kl_strength_by_domain.values()),
            "sequence_mask_delta": self.sequence_mask_delta is None or self.sequence_mask_delta >= 0.0,
            "constant_length": self.constant_length is None or self.constant_length >= 1,
        }
        for name, holds in valid.items():
            if not holds:
                raise ValueError(f"ObjectiveConfig.{name} = {getattr(self, name)!r} is out of range.")

    def _clashes(self) -> tuple[tuple[bool, str], ...]:
        sequence_ratio = self.ratio_level == "sequence"
        strengths = [self.kl_strength, *self.kl_strength_by_domain.values()]
        return (
            (
                self.importance_cap is not None and self.ratio_denominator == "behaviour",
                "importance_cap corrects a proximal ratio, but ratio_denominator is 'behaviour', which needs no "
                "correction; drop the cap or set ratio_denominator = 'proximal'",
            ),
            (
                self.importance_cap is not None and sequence_ratio,
                "importance_cap is one weight a token, ratio_level 'sequence' one ratio a sequence; drop one of them",
            ),
            (
                sequence_ratio and self.aggregation != "sequence_mean",
                f"ratio_level 'sequence' is defined for aggregation 'sequence_mean', not {self.aggregation!r}",
            ),
            (
                self.kl_ratio_denominator == "proximal" and self.kl_estimator != "unbiased_k3",
                f"kl_ratio_denominator acts on 'unbiased_k3' only, and kl_estimator is {self.kl_estimator!r}",
            ),
            (
                self.kl_estimator == "none" and any(strength > 0.0 for strength in strengths),
                "kl_estimator 'none' with a KL strength above 0; set every strength to 0 or choose an estimator",
            ),
            (
                (self.aggregation == "constant_length") != (self.constant_length is not None),
                "constant_length must be given with aggregation 'constant_length', and only with it",
            ),
        )

    @property
    def needs_proximal(self) -> bool:
        """Whether the trainer must compute its own log-probs before the update."""
        return "proximal" in (self.ratio_denominator, self.kl_ratio_denominator)

    def kl_strength_for(self, domain: str) -> float:
        """Beta of one domain. Where it is 0, no reference log-probs are needed."""
        return self.kl_strength_by_domain.get(domain, self.kl_strength)


PRESETS: dict[str, ObjectiveConfig] = {
    # The paper gives the form of every term, and that KL is weak or absent for mathematics; it gives no number. Clip
    # 0.2 is DeepSeekMath's; delta and the strengths are ours.
    "v32": ObjectiveConfig(
        advantage="mean",
        kl_estimator="unbiased_k3",
        kl_strength=0.001,
        kl_strength_by_domain={"writing": 0.01, "question_answering": 0.01, "mathematics": 0.0, "logic": 0.0},
        sequence_mask_delta=0.1,
        keep_routing=True,
        keep_sampling_mask=True,
    ),
    # Published: clip 10, beta 0.001 (arXiv 2501.12948, Nature version).
    "r1": ObjectiveConfig(
        advantage="mean_std",
        clip_low=10.0,
        clip_high=10.0,
        kl_estimator="k3",
        kl_strength=0.001,
        sequence_mask_delta=None,
        keep_routing=False,
        keep_sampling_mask=False,
    ),
}
