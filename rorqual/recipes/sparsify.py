"""Sparse attention for a dense model (DeepSeek-V3.2, arXiv 2512.02556, section 2.1): DSA in two stages.

    base model -> measure -> warm-up: indexers only, dense attention -> measure -> sparse: all, top-k -> measure
                                                                [control: the base, trained on as long, stays dense]

The base is a dense Hugging Face checkpoint (`checkpoint`), MLA or grouped-query, or is pre-trained here (`model`).
Every stage trains on sequences of plain text, each stage on others.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import msgspec
import torch

from rorqual.models.checkpoints import load_checkpoint
from rorqual.models.config import DSAConfig, ModelConfig
from rorqual.models.convert import with_attention, with_indexers
from rorqual.models.decoder import Decoder
from rorqual.models.hf import read_model_config
from rorqual.recipes.progress import Progress
from rorqual.recipes.text_stage import DTYPES, TextBench, TextRecipeConfig, TextStageConfig, check_text, check_window
from rorqual.store.run import Run
from rorqual.train.indexer import IndexerLossConfig, train_indexers_only
from rorqual.train.optim import OptimizerConfig


class SparsifyConfig(TextRecipeConfig):
    """Every setting of the recipe; the stages' defaults are DeepSeek's: 2.1 billion tokens of warm-up, 943.7 billion
    of sparse training.

    control: train the dense base on the sequences of the sparse stage too, to compare at equal tokens.
    """

    model: ModelConfig | None = None
    checkpoint: str = ""
    sequence_length: int = 131_072
    dsa: DSAConfig = DSAConfig()
    indexer_loss: IndexerLossConfig = IndexerLossConfig()
    pretrain: TextStageConfig = TextStageConfig(
        num_steps=1000, sequences_per_step=16, optimizer=OptimizerConfig(learning_rate=1e-3)
    )
    warmup: TextStageConfig = TextStageConfig(
        num_steps=1000, sequences_per_step=16, optimizer=OptimizerConfig(learning_rate=1e-3)
    )
    sparse: TextStageConfig = TextStageConfig(
        num_steps=15_000, sequences_per_step=480, optimizer=OptimizerConfig(learning_rate=7.3e-6)
    )
    control: bool = False

    def __post_init__(self) -> None:
        """Raises: ValueError unless one of `model` and `checkpoint` is given and a sequence fits the window."""
        super().__post_init__()
        if (self.model is None) == (not self.checkpoint):
            raise ValueError(
                "SparsifyConfig needs either `model` (a base is pre-trained) or `checkpoint` (one is read)."
            )
        if self.model is not None:
            check_window(self, self.model.context_window)


Config = SparsifyConfig


def main(config: SparsifyConfig, run: Run, progress: Progress) -> None:
    """Run every stage in order; each takes up where an earlier, interrupted call left it."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    bench = TextBench(config, run, progress)
    base = _base(config, bench)
    bench.measure("dense", base)
    dense = copy.deepcopy(base) if config.control else None

    indexed = with_indexers(base, config.dsa, torch.Generator().manual_seed(config.seed))
    train_indexers_only(indexed)
    first = config.pretrain.num_sequences
    bench.train("warmup", config.warmup, indexed, first, config.indexer_loss, indexers_only=True)
    bench.measure("warmup", indexed)

    sparse = with_attention(indexed, "dsa").requires_grad_(True)
    first += config.warmup.num_sequences
    bench.train("sparse", config.sparse, sparse, first, config.indexer_loss)
    bench.measure("sparse", sparse)
    if dense is not None:
        bench.train("control", config.sparse, dense, first)
        bench.measure("control", dense)


def seeds(config: SparsifyConfig) -> Mapping[str, int]:
    """The seeds that the manifest records."""
    return {"run": config.seed}


def check(config: SparsifyConfig) -> None:
    """Find what would stop a run later: the device, the text, sizes that do not fit. Takes a few seconds.

    Raises: ValueError naming what is wrong.
    """
    check_text(config)
    with torch.device("meta"):
        with_indexers(Decoder(config.model or read_model_config(config.checkpoint)), config.dsa, torch.Generator())


def architecture(config: SparsifyConfig, stage: str) -> Decoder:
    """A model of the kind that a stage trains, for its checkpoint to be read into."""
    dtype = DTYPES[config.dtype]
    base = Decoder(config.model).to(dtype) if config.model is not None else load_checkpoint(config.checkpoint, dtype)
    if stage in ("pretrain", "control"):
        return base
    indexed = with_indexers(base, config.dsa, torch.Generator())
    return indexed if stage == "warmup" else with_attention(indexed, "dsa")


def _base(config: SparsifyConfig, bench: TextBench) -> Decoder:
    """The dense model, read or pre-trained."""
    if config.model is None:
        own = config.tokenizer.path or config.checkpoint
        return bench.read_model(config.checkpoint, msgspec.structs.replace(config.tokenizer, path=own))
    base = bench.fresh_model(config.model)
    bench.train("pretrain", config.pretrain, base)
    return base
