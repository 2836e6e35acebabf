"""Sparse attention for a dense model (DeepSeek-V3.2, arXiv 2512.02556, section 2.1): DSA in two stages.

    base model -> measure -> warm-up: indexers only, dense attention -> measure -> sparse: all, top-k -> measure
                                                                [control: the base, trained on as long, stays dense]

The base is a dense Hugging Face checkpoint (`checkpoint`), MLA or grouped-query, or is pre-trained here (`model`).
Every stage trains on sequences of plain text, each stage on others.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec
import torch

from rorqual.models.checkpoints import load_checkpoint
from rorqual.models.config import DSAConfig, ModelConfig
from rorqual.models.convert import with_attention, with_indexers
from rorqual.models.decoder import Decoder
from rorqual.models.hf import read_model_config
from rorqual.recipes.pretrain import TokenizerConfig, prepare_tokenizer
from rorqual.recipes.progress import Progress
from rorqual.recipes.stage import StagePlan, run_stage
from rorqual.records import Record
from rorqual.store.run import Run
from rorqual.text.corpus import Sequences, TextConfig, TextFiles
from rorqual.train.data import PackedBatch, pack_documents
from rorqual.train.indexer import IndexerLossConfig, train_indexers_only, with_indexer_loss
from rorqual.train.objectives import language_model_objective
from rorqual.train.optim import OptimizerConfig
from rorqual.train.text_loss import HeldOut, measure_held_out

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TextStageConfig(Record):
    """Length and pace of one stage. checkpoint_activations: see `models.decoder.Decoder`."""

    num_steps: int
    sequences_per_step: int
    optimizer: OptimizerConfig
    token_budget: int = 131_072
    checkpoint_every_steps: int = 100
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        """Raises: ValueError naming the field that is out of range."""
        for name in ("sequences_per_step", "token_budget", "checkpoint_every_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"TextStageConfig.{name} = {getattr(self, name)}; expected at least 1.")


class SparsifyConfig(Record):
    """Every setting of the recipe; the stages' defaults are DeepSeek's: 2.1 billion tokens of warm-up, 943.7 billion
    of sparse training.

    sequence_length: tokens of a sequence. evaluation_sequences: how many held-out ones are measured. control: train the
    dense base on the sequences of the sparse stage too, to compare at equal tokens. dtype: of weights and optimiser
    state. num_threads: of torch, 0 leaves its choice.
    """

    seed: int = 0
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    num_threads: int = 0
    model: ModelConfig | None = None
    checkpoint: str = ""
    tokenizer: TokenizerConfig = TokenizerConfig()
    text: TextConfig = TextConfig()
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
    evaluation_sequences: int = 16
    control: bool = False

    def __post_init__(self) -> None:
        """Raises: ValueError unless one of `model` and `checkpoint` is given and a sequence fits the window."""
        if self.sequence_length < 2 or self.evaluation_sequences < 1:
            raise ValueError(
                f"sequence_length = {self.sequence_length} and evaluation_sequences = {self.evaluation_sequences}; "
                "expected at least 2 tokens, and at least 1 sequence."
            )
        if (self.model is None) == (not self.checkpoint):
            raise ValueError(
                "SparsifyConfig needs either `model` (a base is pre-trained) or `checkpoint` (one is read)."
            )
        if self.model is not None and self.sequence_length > self.model.context_window:
            raise ValueError(
                f"sequence_length = {self.sequence_length} exceeds the model's window of {self.model.context_window}."
            )


Config = SparsifyConfig


def main(config: SparsifyConfig, run: Run, progress: Progress) -> None:
    """Run every stage in order; each takes up where an earlier, interrupted call left it."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    bench = _Bench(config, run, progress)
    base = bench.base()
    bench.measure("dense", base)
    dense = copy.deepcopy(base) if config.control else None

    indexed = with_indexers(base, config.dsa, torch.Generator().manual_seed(config.seed))
    train_indexers_only(indexed)
    bench.train("warmup", config.warmup, indexed)
    bench.measure("warmup", indexed)

    sparse = with_attention(indexed, "dsa").requires_grad_(True)
    bench.train("sparse", config.sparse, sparse)
    bench.measure("sparse", sparse)
    if dense is not None:
        bench.train("control", config.sparse, dense)
        bench.measure("control", dense)


def seeds(config: SparsifyConfig) -> Mapping[str, int]:
    """The seeds that the manifest records."""
    return {"run": config.seed}


def check(config: SparsifyConfig) -> None:
    """Find what would stop a run later: the device, the text, sizes that do not fit. Takes a few seconds.

    Raises: ValueError naming what is wrong.
    """
    try:
        kind = torch.device(config.device).type
    except RuntimeError as error:
        raise ValueError(f"device = {config.device!r} is none that torch knows; set cpu or cuda. {error}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device = {config.device!r}, and torch sees no GPU here; set device = cpu, or see `rorqual doctor`."
        )
    TextFiles(config.text)
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


class _Bench:
    """What the stages share: the text, and where figures go."""

    def __init__(self, config: SparsifyConfig, run: Run, progress: Progress) -> None:
        self.config, self.run, self.progress = config, run, progress
        self.files = TextFiles(config.text)
        self.device = torch.device(config.device)

    def base(self) -> Decoder:
        """The dense model, read or pre-trained, and with it the text in its tokens."""
        config, dtype = self.config, DTYPES[self.config.dtype]
        if config.model is None:
            base = load_checkpoint(Path(config.checkpoint), dtype=dtype, device=self.device)
            self._tokenize(
                msgspec.structs.replace(config.tokenizer, path=config.tokenizer.path or config.checkpoint), base
            )
            return base
        base = Decoder(config.model)
        base.initialize(torch.Generator().manual_seed(config.seed))
        base.to(self.device, dtype)
        self._tokenize(config.tokenizer, base)
        self.progress.say(
            f"A model of {base.num_parameters:,} parameters; {self.sequences.number:,} sequences of text."
        )
        self.train("pretrain", config.pretrain, base)
        return base

    def _tokenize(self, settings: TokenizerConfig, base: Decoder) -> None:
        config = self.config
        window = base.config.context_window
        if config.sequence_length > window:
            raise ValueError(f"sequence_length = {config.sequence_length} exceeds the model's window of {window}.")
        tokenizer = prepare_tokenizer(settings, base.config.vocab_size, self.files.texts("train"), self.run)
        self.sequences = Sequences(self.files.tokens("train", tokenizer), config.sequence_length, config.seed)
        held_out = Sequences(self.files.tokens("held_out", tokenizer), config.sequence_length, config.seed)
        self.held_out = [held_out[index] for index in range(min(config.evaluation_sequences, held_out.number))]

    def train(self, stage: str, settings: TextStageConfig, model: Decoder) -> None:
        """One stage on its own sequences; the control is given those of the sparse stage."""
        model.checkpoint_activations = settings.checkpoint_activations
        first = self._first_sequence(stage)
        indexed = stage in ("warmup", "sparse")

        def batches(step: int) -> list[PackedBatch]:
            start = first + step * settings.sequences_per_step
            chosen = [self.sequences[index] for index in range(start, start + settings.sequences_per_step)]
            packed = pack_documents(chosen, settings.token_budget, device=self.device)
            return with_indexer_loss(packed, self.config.indexer_loss) if indexed else packed

        objective = (lambda batches: None) if stage == "warmup" else language_model_objective
        plan = StagePlan(
            stage, settings.num_steps, settings.checkpoint_every_steps, settings.optimizer, batches, objective
        )
        run_stage(plan, model, self.run, self.progress)

    def _first_sequence(self, stage: str) -> int:
        before: Sequence[TextStageConfig] = {
            "pretrain": (),
            "warmup": (self.config.pretrain,),
            "sparse": (self.config.pretrain, self.config.warmup),
            "control": (self.config.pretrain, self.config.warmup),
        }[stage]
        return sum(each.num_steps * each.sequences_per_step for each in before)

    def measure(self, label: str, model: Decoder) -> HeldOut:
        """The held-out sequences, as the stage `held_out_LABEL` of the run's metrics."""
        found = measure_held_out(model, self.held_out, self.config.sequence_length)
        name = f"held_out_{label}"
        self.run.rewind(name, 0)
        self.run.append_metrics(name, 1, found.metrics())
        self.progress.say(f"{label}: {found.summary()}")
        return found
