"""A small training run that can be cut anywhere: `python -m tests.train.resume_script DIRECTORY FIRST LAST OUT`.

Each step draws from every random generator, so that a state that is not restored shows in the weights.
"""

from __future__ import annotations

import random
import sys
from array import array
from pathlib import Path

import numpy as np
import torch

from rorqual.models.decoder import Decoder
from rorqual.train.checkpoint import load_training_state, save_training_state
from rorqual.train.data import pack_documents
from rorqual.train.objectives import language_model_objective
from rorqual.train.optim import OptimizerConfig, build_optimizer
from rorqual.train.state import write_tensors
from rorqual.train.step import train_step
from tests.train.fakes import build_decoder

CONFIG = OptimizerConfig(learning_rate=3e-3, schedule="cosine", warmup_steps=2, total_steps=8, balance_experts=True)


def document(index: int) -> array[int]:
    generator = random.Random(index)
    return array("i", [generator.randrange(40) for _ in range(generator.randint(2, 20))])


def train(directory: Path, first: int, last: int) -> Decoder:
    """Steps `first` to `last` - 1, resumed from the directory unless first is 0, and saved there afterwards."""
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    model = build_decoder("mla_moe", torch.float32)
    optimizer = build_optimizer(model, CONFIG)
    if first:
        extra = load_training_state(directory, model, optimizer)
        assert extra["step"] == first
    for step in range(first, last):
        noise = array("i", [random.randrange(40), int(np.random.randint(40)), int(torch.randint(40, ()))])
        batches = pack_documents([*map(document, range(3 * step, 3 * step + 3)), noise], 40)
        train_step(model, optimizer, batches, language_model_objective(batches), CONFIG, step)
    save_training_state(directory, model, optimizer, {"step": last})
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_tensors(Path(sys.argv[4]), train(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])).state_dict())
