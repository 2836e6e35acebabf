"""The digest of weights: the same for the same values, another for any change of value, name, shape or type."""

from __future__ import annotations

import copy

import torch
from torch import nn

from rorqual.evals.fingerprint import weights_fingerprint


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_equal_weights_have_equal_fingerprints_wherever_they_lie() -> None:
    model = small()
    other = copy.deepcopy(model)
    other[0].weight = nn.Parameter(other[0].weight.detach().t().contiguous().t())
    assert not other[0].weight.is_contiguous()
    assert weights_fingerprint(model) == weights_fingerprint(other) == weights_fingerprint(small())


def test_any_change_changes_it() -> None:
    def last_bit(model: nn.Module) -> nn.Module:
        model[0].weight.data[1, 2] = torch.nextafter(model[0].weight.data[1, 2], torch.tensor(9.0))
        return model

    def buffer(model: nn.Module) -> nn.Module:
        model[1].running_mean[0] = 1.0
        return model

    changed = [
        last_bit(small()),
        buffer(small()),
        small().bfloat16(),
        small().double(),
        nn.Sequential(*small(), nn.ReLU()),
    ]
    digests = [weights_fingerprint(model) for model in [small(), *changed]]
    assert len(set(digests)) == 5, "all differ but the last, whose added layer has no weight"
    assert digests[0] == digests[-1]
    assert len(digests[0]) == 64
