"""Rotary position embedding (RoFormer, arXiv 2104.09864) with the scalings that long-context checkpoints use.

In: RopeConfig and integer positions. Out: cosines and sines that `rotate` applies to queries and keys.
Rotated vectors always come out in the half-split order, also from interleaved input: queries and keys are permuted
alike, so their products are unchanged.

Shapes: P any shape of positions, H heads, E rotary dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.models.buffers import ExactBuffers
from rorqual.models.config import RopeConfig
from rorqual.models.pointwise import rotate_halves


@dataclass(frozen=True)
class Rotation:
    """cos and sin: [P, 1, E] (the 1 broadcasts over heads), each angle twice; sin is negative in its first half."""

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def rotate(self, x_PHE: Tensor) -> Tensor:
        """Turn each pair of dimensions by its position's angle."""
        if self.interleaved:
            x_PHE = torch.cat((x_PHE[..., 0::2], x_PHE[..., 1::2]), dim=-1)
        return rotate_halves(x_PHE, self.cos, self.sin)


class Rope(ExactBuffers):
    """Angles for one rotary dimension; float32 whatever the model's dtype.

    The frequencies are in no checkpoint, so they are computed even where the model is built on the meta device.
    """

    inverse_frequency: Tensor

    def __init__(self, config: RopeConfig, dim: int) -> None:
        super().__init__()
        self.interleaved = config.interleaved
        with torch.device("cpu"):
            frequency, self.attention_factor = SCALINGS[config.scaling](config, dim)
        self.register_buffer("inverse_frequency", frequency, persistent=False)

    def forward(self, positions_P: Tensor, dtype: torch.dtype) -> Rotation:
        """Rotation at `positions_P` (int64), computed in float32 and cast to `dtype`."""
        angles = (positions_P.unsqueeze(-1).float() * self.inverse_frequency).unsqueeze(-2)
        cos, sin = angles.cos(), angles.sin()
        if self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return Rotation(cos.to(dtype), sin.to(dtype), self.interleaved)


def yarn_temperature(factor: float, mscale: float = 1.0) -> float:
    """YaRN's attention temperature (arXiv 2309.00071, eq. 22): 0.1 * mscale * ln(factor) + 1, or 1 without
    extension."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(config: RopeConfig, query_dim: int) -> float:
    """1/sqrt(query_dim), times DeepSeek's squared temperature where `mscale_all_dim` is set."""
    scale = query_dim**-0.5
    if config.scaling == "yarn" and config.mscale_all_dim:
        scale *= yarn_temperature(config.factor, config.mscale_all_dim) ** 2
    return scale


def _plain(config: RopeConfig, dim: int) -> tuple[Tensor, float]:
    exponent = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    return 1.0 / (config.theta**exponent), 1.0


def _linear(config: RopeConfig, dim: int) -> tuple[Tensor, float]:
    frequency, _ = _plain(config, dim)
    return frequency / config.factor, 1.0


def _llama3(config: RopeConfig, dim: int) -> tuple[Tensor, float]:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    frequency, _ = _plain(config, dim)
    rotations = config.original_max_position_embeddings * frequency / (2 * math.pi)
    blend = (rotations - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequency / config.factor + blend * frequency, 1.0


def _yarn(config: RopeConfig, dim: int) -> tuple[Tensor, float]:
    """YaRN, NTK by parts: dimensions that turn more than beta_fast times keep their frequency, under beta_slow none
    do."""
    frequency, _ = _plain(config, dim)

    def dimension_of(rotations: float) -> float:
        wavelength_ratio = config.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(wavelength_ratio) / (2 * math.log(config.theta))

    low, high = dimension_of(config.beta_fast), dimension_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low if high != low else 1e-3
    ramp = ((torch.arange(dim // 2).float() - low) / span).clamp(0.0, 1.0)
    return frequency / config.factor * ramp + frequency * (1 - ramp), _yarn_attention_factor(config)


def _yarn_attention_factor(config: RopeConfig) -> float:
    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return yarn_temperature(config.factor, config.mscale) / yarn_temperature(config.factor, config.mscale_all_dim)
    return yarn_temperature(config.factor)


SCALINGS = {"none": _plain, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
