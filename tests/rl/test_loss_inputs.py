"""What the policy loss refuses: tensors that do not fit together, and tensors that are missing."""

import pytest
import torch
from torch import Tensor

from rorqual.rl.losses import LossScale, PolicyTokens, policy_loss
from rorqual.rl.objective import ObjectiveConfig

PROXIMAL_CONFIGS = [
    ObjectiveConfig(ratio_denominator="proximal"),
    ObjectiveConfig(ratio_denominator="proximal", importance_cap=2.0),
    ObjectiveConfig(ratio_denominator="proximal", ratio_level="sequence"),
    ObjectiveConfig(kl_ratio_denominator="proximal"),
]


def float_tokens(**changes: Tensor | None) -> PolicyTokens:
    tensors: dict[str, Tensor | None] = {
        "current_N": torch.full((3,), -1.0, requires_grad=True),
        "behaviour_N": torch.full((3,), -1.0),
        "reference_N": torch.full((3,), -1.0),
        "sequence_index_N": torch.tensor([0, 0, 1]),
        "advantage_S": torch.tensor([1.0, -1.0]),
        "kl_strength_S": torch.tensor([0.1, 0.1]),
    }
    return PolicyTokens(**(tensors | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"behaviour_N": torch.zeros(2)}, "behaviour_N"),
        ({"behaviour_N": torch.zeros(3, dtype=torch.float64)}, "behaviour_N is torch.float64"),
        ({"reference_N": torch.zeros(3, requires_grad=True)}, "reference_N requires a gradient"),
        ({"proximal_N": torch.zeros(3, 1)}, "proximal_N"),
        ({"kl_strength_S": torch.zeros(3)}, "kl_strength_S"),
        ({"advantage_S": torch.zeros(2, requires_grad=True)}, "advantage_S requires a gradient"),
        ({"sequence_index_N": torch.zeros(3, dtype=torch.int32)}, "sequence_index_N is torch.int32"),
        ({"current_N": torch.zeros(3, dtype=torch.bfloat16)}, "16-bit"),
        ({"current_N": torch.zeros(3, 1)}, "one dimension"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        float_tokens(**changes)


@pytest.mark.parametrize("config", PROXIMAL_CONFIGS)
def test_a_proximal_denominator_needs_proximal_logprobs(config: ObjectiveConfig) -> None:
    with pytest.raises(ValueError, match="proximal_N is None"):
        policy_loss(float_tokens(), config, LossScale(2, 3))


def test_kl_needs_a_reference_where_its_strength_is_above_zero() -> None:
    with pytest.raises(ValueError, match="reference_N is None"):
        policy_loss(float_tokens(reference_N=None), ObjectiveConfig(), LossScale(2, 3))
    with pytest.raises(ValueError, match="kl_estimator is 'none'"):
        policy_loss(float_tokens(), ObjectiveConfig(kl_estimator="none", kl_strength=0.0), LossScale(2, 3))
    without = float_tokens(reference_N=None, kl_strength_S=torch.zeros(2))
    assert policy_loss(without, ObjectiveConfig(), LossScale(2, 3))[0].isfinite()


@pytest.mark.parametrize(("num_sequences", "num_tokens"), [(0, 0), (1, 0)])
def test_an_empty_step_is_refused(num_sequences: int, num_tokens: int) -> None:
    with pytest.raises(ValueError, match="skip a step that has none"):
        LossScale(num_sequences, num_tokens)


def test_a_sequence_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sequences \[1\] have no sampled token"):
        policy_loss(float_tokens(sequence_index_N=torch.tensor([0, 0, 0])), ObjectiveConfig(), LossScale(2, 3))
