"""AdamW (arXiv 1711.05101) with its parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch

from rorqual.models.decoder import Decoder
from rorqual.records import Record

ScheduleName = Literal["constant", "cosine", "linear", "wsd"]


class OptimizerConfig(Record):
    """How one optimiser step moves the weights.

    schedule: after `warmup_steps` of linear rise to `learning_rate`: "constant"; "cosine" or "linear" fall to
        `final_fraction` of it at `total_steps`; "wsd" (warm-up, stable, decay; arXiv 2404.06395) stays and falls
        linearly over the last `decay_fraction` of the steps.
    max_grad_norm: global norm above which gradients are scaled down. weight_decay: never on norms and biases, and on
        embedding and unembedding only with `decay_embeddings`.
    balance_experts: move the selection bias of each expert against its load after the step (pre-training; in RL the
        routes are the sampler's).
    Raises: ValueError naming the field that is out of range.
    """

    learning_rate: float = 1e-3
    schedule: ScheduleName = "constant"
    warmup_steps: int = 0
    total_steps: int = 0
    final_fraction: float = 0.1
    decay_fraction: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    decay_embeddings: bool = False
    max_grad_norm: float = 1.0
    balance_experts: bool = False

    def __post_init__(self) -> None:
        valid = {
            "learning_rate": self.learning_rate >= 0.0,
            "schedule": self.schedule in SCHEDULES,
            "warmup_steps": self.warmup_steps >= 0,
            "total_steps": self.schedule == "constant" or self.total_steps > self.warmup_steps,
            "final_fraction": 0.0 <= self.final_fraction <= 1.0,
            "decay_fraction": 0.0 < self.decay_fraction <= 1.0,
            "max_grad_norm": self.max_grad_norm > 0.0,
        }
        for name, holds in valid.items():
            if not holds:
                raise ValueError(f"OptimizerConfig.{name} = {getattr(self, name)!r} is out of range.")


def build_optimizer(model: Decoder, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW over two groups, with and without weight decay; frozen parameters are left out.

    Raises: ValueError when nothing is trainable.
    """
    spared = set() if config.decay_embeddings else {id(model.embed_tokens.weight), id(model.unembedding_VD)}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("no parameter of the model requires a gradient; there is nothing to optimise.")
    decayed = [parameter for parameter in trainable if parameter.dim() >= 2 and id(parameter) not in spared]
    chosen = {id(parameter) for parameter in decayed}
    rest = [parameter for parameter in trainable if id(parameter) not in chosen]
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decayed, config.weight_decay), (rest, 0.0))
        if parameters
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.epsilon, fused=True)


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Learning rate of optimiser step `step`, counted from 0. Raises: ValueError for a negative step."""
    if step < 0:
        raise ValueError(f"step = {step}; steps count from 0.")
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = min((step - config.warmup_steps) / (config.total_steps - config.warmup_steps), 1.0)
    remaining = SCHEDULES[config.schedule](progress, config)
    return config.learning_rate * (config.final_fraction + (1.0 - config.final_fraction) * remaining)


def _wsd(progress: float, config: OptimizerConfig) -> float:
    return min(1.0, (1.0 - progress) / config.decay_fraction)


SCHEDULES: dict[str, Callable[[float, OptimizerConfig], float]] = {
    "constant": lambda progress, config: 1.0,
    "cosine": lambda progress, config: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "linear": lambda progress, config: 1.0 - progress,
    "wsd": _wsd,
}
