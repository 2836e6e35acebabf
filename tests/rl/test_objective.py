"""The objective config: what the presets say, and which mixes are refused."""

import dataclasses
import math

import msgspec
import pytest

from rorqual.rl.objective import PRESETS, ObjectiveConfig


def test_v32_preset_is_the_whole_published_set() -> None:
    v32 = PRESETS["v32"]
    assert v32.advantage == "mean"
    assert (v32.ratio_level, v32.ratio_denominator, v32.aggregation) == ("token", "behaviour", "sequence_mean")
    assert (v32.kl_estimator, v32.kl_ratio_denominator) == ("unbiased_k3", "behaviour")
    assert v32.sequence_mask_delta is not None
    assert v32.keep_routing and v32.keep_sampling_mask
    assert v32.kl_strength_for("mathematics") < v32.kl_strength_for("code_agent") < v32.kl_strength_for("writing")


def test_r1_preset_is_the_published_one() -> None:
    r1 = PRESETS["r1"]
    assert (r1.advantage, r1.kl_estimator, r1.kl_strength) == ("mean_std", "k3", 0.001)
    assert (r1.clip_low, r1.clip_high, r1.sequence_mask_delta) == (10.0, 10.0, None)
    assert not r1.keep_routing and not r1.keep_sampling_mask


def test_presets_are_plain_data() -> None:
    for preset in PRESETS.values():
        assert msgspec.convert(msgspec.to_builtins(preset), ObjectiveConfig) == preset


REFUSED = {
    "cap with a behaviour ratio": ({"importance_cap": 2.0}, "needs no correction"),
    "cap with a sequence ratio": (
        {"importance_cap": 2.0, "ratio_denominator": "proximal", "ratio_level": "sequence"},
        "one weight a token",
    ),
    "sequence ratio over tokens": ({"ratio_level": "sequence", "aggregation": "token_mean"}, "sequence_mean"),
    "sequence ratio over a constant": (
        {"ratio_level": "sequence", "aggregation": "constant_length", "constant_length": 8},
        "sequence_mean",
    ),
    "denominator of plain k3": ({"kl_estimator": "k3", "kl_ratio_denominator": "proximal"}, "unbiased_k3"),
    "strength without an estimator": ({"kl_estimator": "none", "kl_strength": 0.1}, "KL strength above 0"),
    "domain strength without an estimator": (
        {"kl_estimator": "none", "kl_strength": 0.0, "kl_strength_by_domain": {"writing": 0.1}},
        "KL strength above 0",
    ),
    "constant length without its value": ({"aggregation": "constant_length"}, "constant_length"),
    "length without its aggregation": ({"constant_length": 8}, "constant_length"),
    "cap below 1": ({"importance_cap": 0.5, "ratio_denominator": "proximal"}, "importance_cap = 0.5 is out of range"),
    "no clip range": ({"clip_low": 0.0}, "clip_low"),
    "negative clip": ({"clip_high": -0.1}, "clip_high"),
    "clip that is not a number": ({"clip_high": math.nan}, "clip_high"),
    "negative strength": ({"kl_strength": -1.0}, "kl_strength"),
    "negative domain strength": ({"kl_strength_by_domain": {"writing": -1.0}}, "kl_strength_by_domain"),
    "negative delta": ({"sequence_mask_delta": -0.1}, "sequence_mask_delta"),
    "empty constant length": ({"aggregation": "constant_length", "constant_length": 0}, "constant_length = 0"),
    "misspelt choice": ({"ratio_level": "tokens"}, "ratio_level = 'tokens'"),
    "misspelt advantage": ({"advantage": "std"}, "advantage = 'std'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_undefined_mixes_are_refused(name: str) -> None:
    fields, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**fields)


def test_needs_proximal_says_when_the_trainer_must_compute_it() -> None:
    assert not PRESETS["v32"].needs_proximal
    assert ObjectiveConfig(ratio_denominator="proximal").needs_proximal
    assert ObjectiveConfig(kl_ratio_denominator="proximal").needs_proximal


def test_config_is_frozen() -> None:
    with pytest.raises((AttributeError, dataclasses.FrozenInstanceError)):
        PRESETS["v32"].clip_low = 0.3
