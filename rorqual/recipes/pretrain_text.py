"""A language model from random weights on plain text, with any attention: dense, or Native Sparse Attention (NSA).

    random weights -> pretrain -> measure on held-out text, and needles by depth

Two runs that differ in the model alone see the same sequences in the same order, so that one attention is compared with
another at equal tokens; so does the pre-training stage of a `sparsify` run.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rorqual.models.config import ModelConfig
from rorqual.models.decoder import Decoder
from rorqual.recipes.progress import Progress
from rorqual.recipes.text_stage import DTYPES, TextBench, TextRecipeConfig, TextStageConfig, check_text, check_window
from rorqual.store.run import Run
from rorqual.train.optim import OptimizerConfig

STAGE = "pretrain"


class PretrainTextConfig(TextRecipeConfig):
    """Every setting of the recipe."""

    model: ModelConfig
    pretrain: TextStageConfig = TextStageConfig(
        num_steps=1000, sequences_per_step=16, optimizer=OptimizerConfig(learning_rate=1e-3)
    )

    def __post_init__(self) -> None:
        """Raises: ValueError unless a sequence fits the window, and for indexers, which this stage does not train."""
        super().__post_init__()
        check_window(self, self.model.context_window)
        if self.model.dsa is not None:
            raise ValueError("Pre-training does not train indexers; leave model.dsa out, or use the recipe sparsify.")


Config = PretrainTextConfig


def main(config: PretrainTextConfig, run: Run, progress: Progress) -> None:
    """Train, and measure; takes up where an earlier, interrupted call left it."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    bench = TextBench(config, run, progress)
    model = bench.fresh_model(config.model)
    bench.train(STAGE, config.pretrain, model)
    bench.measure(STAGE, model)


def seeds(config: PretrainTextConfig) -> Mapping[str, int]:
    """The seeds that the manifest records."""
    return {"run": config.seed}


def check(config: PretrainTextConfig) -> None:
    """Find what would stop a run later: the device, the text. Raises: ValueError naming what is wrong."""
    check_text(config)


def architecture(config: PretrainTextConfig, stage: str) -> Decoder:
    """A model of the kind that the stage trains, for its checkpoint to be read into."""
    return Decoder(config.model).to(DTYPES[config.dtype])
