"""What recipes on plain text share: a stage of training on its own sequences, and what it did to held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch

from rorqual.models.checkpoints import load_checkpoint
from rorqual.models.config import ModelConfig
from rorqual.models.decoder import Decoder
from rorqual.recipes.pretrain import TokenizerConfig, prepare_tokenizer
from rorqual.recipes.progress import Progress
from rorqual.recipes.stage import StagePlan, run_stage
from rorqual.records import Record
from rorqual.store.run import Run
from rorqual.text.corpus import Sequences, TextConfig, TextFiles
from rorqual.text.needle import NeedleConfig, NeedleDocument, Needles
from rorqual.train.data import PackedBatch, pack_documents
from rorqual.train.indexer import IndexerLossConfig, with_indexer_loss
from rorqual.train.needle_accuracy import needle_accuracy, needle_metrics
from rorqual.train.objectives import language_model_objective
from rorqual.train.optim import OptimizerConfig
from rorqual.train.selection_map import selection_maps
from rorqual.train.text_loss import HeldOut, measure_held_out

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}

HELD_OUT: Final = "held_out_"
"""In front of a model's label: the stage of the metrics that holds what was measured of it."""


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

    @property
    def num_sequences(self) -> int:
        """Of all its steps."""
        return self.num_steps * self.sequences_per_step


class TextRecipeConfig(Record):
    """The settings that every recipe on text has.

    dtype: of weights and optimiser state. num_threads: of torch, 0 leaves its choice. sequence_length: tokens of a
    sequence. evaluation_sequences: how many held-out ones are measured. needle: mixed into what is trained on, and
    measured by depth.
    """

    seed: int = 0
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    num_threads: int = 0
    tokenizer: TokenizerConfig = TokenizerConfig()
    text: TextConfig = TextConfig()
    sequence_length: int = 2048
    evaluation_sequences: int = 16
    needle: NeedleConfig = NeedleConfig()

    def __post_init__(self) -> None:
        """Raises: ValueError for lengths that leave nothing to train on or to measure."""
        if self.sequence_length < 2 or self.evaluation_sequences < 1:
            raise ValueError(
                f"sequence_length = {self.sequence_length} and evaluation_sequences = {self.evaluation_sequences}; "
                "expected at least 2 tokens, and at least 1 sequence."
            )


def check_text(config: TextRecipeConfig) -> None:
    """Raises: ValueError for a device that is not here, and for text that is not there."""
    try:
        kind = torch.device(config.device).type
    except RuntimeError as error:
        raise ValueError(f"device = {config.device!r} is none that torch knows; set cpu or cuda. {error}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device = {config.device!r}, and torch sees no GPU here; set device = cpu, or see `rorqual doctor`."
        )
    TextFiles(config.text)


def check_window(config: TextRecipeConfig, window: int) -> None:
    """Raises: ValueError for sequences that are longer than the model's window."""
    if config.sequence_length > window:
        raise ValueError(f"sequence_length = {config.sequence_length} exceeds the model's window of {window}.")


class TextBench:
    """What the stages of a run share: the text in the model's tokens, and where figures go."""

    def __init__(self, config: TextRecipeConfig, run: Run, progress: Progress) -> None:
        self.config, self.run, self.progress = config, run, progress
        self.files = TextFiles(config.text)
        self.device, self.dtype = torch.device(config.device), DTYPES[config.dtype]

    def fresh_model(self, config: ModelConfig) -> Decoder:
        """A model of random weights, and with it the text in the tokens of the run's tokenizer."""
        model = Decoder(config)
        model.initialize(torch.Generator().manual_seed(self.config.seed))
        model.to(self.device, self.dtype)
        self._tokenize(self.config.tokenizer, config)
        self.progress.say(
            f"A model of {model.num_parameters:,} parameters; {self.sequences.number:,} sequences of text."
        )
        return model

    def read_model(self, checkpoint: str, tokenizer: TokenizerConfig) -> Decoder:
        """A model in Hugging Face's layout, and with it the text in its tokens."""
        model = load_checkpoint(Path(checkpoint), dtype=self.dtype, device=self.device)
        self._tokenize(tokenizer, model.config)
        return model

    def _tokenize(self, settings: TokenizerConfig, model: ModelConfig) -> None:
        config = self.config
        check_window(config, model.context_window)
        tokenizer = prepare_tokenizer(settings, model.vocab_size, self.files.texts("train"), self.run)
        self.sequences = Sequences(self.files.tokens("train", tokenizer), config.sequence_length, config.seed)
        held_out = Sequences(self.files.tokens("held_out", tokenizer), config.sequence_length, config.seed)
        self.held_out = [held_out[index] for index in range(min(config.evaluation_sequences, held_out.number))]
        self.needles = Needles(config.needle, tokenizer, config.seed)

    def train(
        self,
        stage: str,
        settings: TextStageConfig,
        model: Decoder,
        first_sequence: int = 0,
        indexer_loss: IndexerLossConfig | None = None,
        indexers_only: bool = False,
    ) -> None:
        """One stage on the sequences from `first_sequence` on; the indexers learn where they are given a loss."""
        model.checkpoint_activations = settings.checkpoint_activations

        def batches(step: int) -> list[PackedBatch]:
            start = first_sequence + step * settings.sequences_per_step
            documents, weights = self._documents(range(start, start + settings.sequences_per_step))
            packed = pack_documents(documents, settings.token_budget, weights=weights, device=self.device)
            return packed if indexer_loss is None else with_indexer_loss(packed, indexer_loss)

        objective = (lambda batches: None) if indexers_only else language_model_objective
        plan = StagePlan(
            stage, settings.num_steps, settings.checkpoint_every_steps, settings.optimizer, batches, objective
        )
        run_stage(plan, model, self.run, self.progress)

    def _documents(self, indices: Sequence[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Token ids and loss weights of the sequences at `indices`, some of them with a needle."""
        documents, weights = [], []
        for index in indices:
            text = self.sequences[index]
            if self.needles.chosen(index):
                needle = self.needles.training(text, index)
                documents.append(needle.ids)
                weights.append(needle.weights(1.0, self.config.needle.answer_weight))
            else:
                documents.append(text)
                weights.append(np.ones(len(text), dtype=np.float32))
        return documents, weights

    def measure(self, label: str, model: Decoder) -> HeldOut:
        """The held-out sequences, and needles in them, as the stage `held_out_LABEL` of the run's metrics; of a model
        with indexers also the selection maps of the first sequence."""
        found = measure_held_out(model, self.held_out, self.config.sequence_length)
        accuracy = needle_accuracy(model, self._needle_documents(), self.config.sequence_length)
        if model.config.dsa is not None:
            self.run.write_selection_maps(label, selection_maps(model, self.held_out[0]).to_json())
        name = f"{HELD_OUT}{label}"
        self.run.rewind(name, 0)
        self.run.append_metrics(name, 1, {**found.metrics(), **needle_metrics(accuracy)})
        self.progress.say(f"{label}: {found.summary()}")
        if accuracy:
            by_depth = ", ".join(f"{each:.0%} at {depth}%" for depth, each in accuracy.items())
            self.progress.say(f"{label}: needles recalled by depth: {by_depth}")
        return found

    def _needle_documents(self) -> dict[int, list[NeedleDocument]]:
        """Those to be measured, by depth; every depth has the same texts, and other keys and values."""
        config, texts = self.config.needle, self.held_out
        if not config.documents_per_depth:
            return {}
        return {
            depth: [
                self.needles.measured(texts[number % len(texts)], row * config.documents_per_depth + number, depth)
                for number in range(config.documents_per_depth)
            ]
            for row, depth in enumerate(config.depths)
        }
