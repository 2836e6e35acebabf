"""R1-Zero (DeepSeek-R1, arXiv 2501.12948, section 2.2): reinforcement learning on a base model, without any SFT.

    tokenizer -> base model -> evaluate -> RL -> evaluate -> control: the same RL with shuffled rewards -> evaluate

The base is pre-trained here on a generated corpus (`model`), or read from a Hugging Face checkpoint (`checkpoint`).
The objective is V3.2's by default: GRPO with its four repairs (arXiv 2512.02556, section 3.1).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

import msgspec
import torch

from rorqual.contracts import Environment
from rorqual.engines.local import EngineConfig, LocalEngine
from rorqual.envs.dialogue import (
    DialogueConfig,
    DialogueEnvironment,
    ReasoningGymConfig,
    ReasoningGymTasks,
    held_out,
    question_of,
)
from rorqual.evals.runner import GREEDY, Player, Protocol, evaluate
from rorqual.models.checkpoints import load_checkpoint
from rorqual.models.config import ModelConfig
from rorqual.models.decoder import Decoder
from rorqual.recipes.grpo import GrpoConfig, GrpoParts, run_grpo
from rorqual.recipes.pretrain import PretrainConfig, TokenizerConfig, prepare_tokenizer, run_pretrain
from rorqual.recipes.progress import Bar, Progress
from rorqual.records import Record, SamplingParams, Task
from rorqual.rewards.rules import RewardConfig, load_rewards
from rorqual.store.run import Run
from rorqual.synth.worked import Corpus, CorpusConfig, Source
from rorqual.text.encoding import Encoding, EncodingConfig

RL_FIRST_INDEX = 2**29
"""Training tasks of RL begin here in the train split; the corpus takes those before."""


class EvaluationConfig(Record):
    """`num_problems` held-out problems of each data set, once greedily and once by `protocol`."""

    num_problems: int = 100
    protocol: Protocol = Protocol(name="sampled", num_samples=4, sampling=SamplingParams(), pass_at=(1, 4))
    engine: EngineConfig = EngineConfig(num_slots=256)


class R1ZeroConfig(Record):
    """Every setting of the recipe. Give `model` to pre-train a base here, or `checkpoint` to start from a directory.

    dtype: of the weights and the optimiser state. num_threads: of torch, 0 leaves its choice; a run is reproduced bit
    for bit with the same number only.
    """

    tasks: tuple[ReasoningGymConfig, ...]
    seed: int = 0
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    num_threads: int = 0
    model: ModelConfig | None = None
    checkpoint: str = ""
    tokenizer: TokenizerConfig = TokenizerConfig()
    encoding: EncodingConfig = EncodingConfig()
    dialogue: DialogueConfig = DialogueConfig()
    corpus: CorpusConfig = CorpusConfig()
    pretrain: PretrainConfig = PretrainConfig()
    rewards: tuple[RewardConfig, ...] = (RewardConfig(name="accuracy"), RewardConfig(name="format"))
    grpo: GrpoConfig = GrpoConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    control: bool = False

    def __post_init__(self) -> None:
        """Raises: ValueError unless there is a task, and exactly one of `model` and `checkpoint`."""
        if not self.tasks:
            raise ValueError("R1ZeroConfig.tasks is empty; name at least one reasoning-gym data set.")
        if (self.model is None) == (not self.checkpoint):
            raise ValueError("R1ZeroConfig needs either `model` (a base is pre-trained) or `checkpoint` (one is read).")


Config = R1ZeroConfig


def main(config: R1ZeroConfig, run: Run, progress: Progress) -> None:
    """Run every stage in order; each takes up where an earlier, interrupted call left it."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    sources = [ReasoningGymTasks.from_config(each) for each in config.tasks]
    corpus = Corpus(config.corpus, [_corpus_source(source) for source in sources])
    base, encoding = _base_model(config, corpus, run, progress)
    bench = _Bench(config, sources, corpus, encoding, run, progress)

    bench.evaluate("base", base)
    bench.evaluate("rl", bench.train("rl", base))
    if config.control:
        bench.evaluate("control", bench.train("control", base, shuffle_rewards=True))


def seeds(config: R1ZeroConfig) -> Mapping[str, int]:
    """The seeds that the manifest records."""
    return {"run": config.seed, "corpus": config.corpus.seed}


def _base_model(config: R1ZeroConfig, corpus: Corpus, run: Run, progress: Progress) -> tuple[Decoder, Encoding]:
    """The base: read from a checkpoint, or pre-trained on the corpus from random weights."""
    if config.model is None:
        dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
        base = load_checkpoint(Path(config.checkpoint), dtype=dtype, device=torch.device(config.device))
        tokenizer_config = msgspec.structs.replace(config.tokenizer, path=config.tokenizer.path or config.checkpoint)
        tokenizer = prepare_tokenizer(tokenizer_config, base.config.vocab_size, corpus, run)
        return base, Encoding(tokenizer, config.encoding)
    tokenizer = prepare_tokenizer(config.tokenizer, config.model.vocab_size, corpus, run)
    encoding = Encoding(tokenizer, config.encoding)
    base = Decoder(config.model)
    base.initialize(torch.Generator().manual_seed(config.seed))
    base.to(config.device)
    run_pretrain(config.pretrain, base, corpus, encoding, run, progress)
    return base, encoding


class _Bench:
    """What the stages after the base share: tasks, rewards, the environment, and the held-out problems."""

    def __init__(
        self,
        config: R1ZeroConfig,
        sources: Sequence[ReasoningGymTasks],
        corpus: Corpus,
        encoding: Encoding,
        run: Run,
        progress: Progress,
    ) -> None:
        self.config, self.sources, self.corpus, self.encoding = config, sources, corpus, encoding
        self.run, self.progress = run, progress
        self.rewards = load_rewards(config.rewards)
        self.environments: Mapping[str, Environment] = {"dialogue": DialogueEnvironment(config.dialogue)}

    def train(self, stage: str, base: Decoder, shuffle_rewards: bool = False) -> Decoder:
        """A policy trained from `base`, which stays as it is and serves as reference."""
        objective = self.config.grpo.objective.resolve()
        domains = {source.domain for source in self.sources}
        policy = copy.deepcopy(base)
        parts = GrpoParts(
            policy=policy,
            reference=base if any(objective.kl_strength_for(domain) > 0.0 for domain in domains) else None,
            encoding=self.encoding,
            environments=self.environments,
            task=self.train_task,
            rewards=self.rewards,
            seed=self.config.seed,
            shuffle_rewards=shuffle_rewards,
        )
        run_grpo(stage, self.config.grpo, parts, self.run, self.progress)
        return policy

    def train_task(self, index: int) -> Task:
        """Training task `index`; the data sets take turns."""
        number, source = divmod(index, len(self.sources))
        return self.sources[source].task("train", RL_FIRST_INDEX + number)

    def evaluate(self, label: str, policy: Decoder) -> None:
        """Greedy and sampled, on every data set's held-out problems."""
        settings = self.config.evaluation
        sampled = settings.protocol
        limit = self.config.grpo.sampling.max_new_tokens
        greedy = msgspec.structs.replace(GREEDY, sampling=SamplingParams(temperature=0.0, max_new_tokens=limit))
        engine = LocalEngine(policy, settings.engine)
        player = Player(label, engine, self.environments, self.encoding, self.rewards)
        tasks = self.held_out_tasks()
        for protocol in (greedy, sampled):
            name = f"{label}-{protocol.name}"
            with self.progress.bar(f"evaluate {name}", len(tasks) * protocol.num_samples) as bar:
                summary = evaluate(self.run, name, tasks, player, protocol, self.config.seed, _reporter(bar))
            self.progress.say(f"{label}, {protocol.name}: accuracy {summary.mean:.1%}")

    def held_out_tasks(self) -> list[Task]:
        """Problems of the test split whose question occurs nowhere in the corpus or among the RL tasks."""
        trained = self.trained_questions()
        count = self.config.evaluation.num_problems
        chosen: list[Task] = []
        for source in self.sources:
            fresh = held_out(source.tasks("test"), trained)
            chosen += islice(fresh, count)
        return chosen

    def trained_questions(self) -> set[str]:
        """Every question that pre-training or RL shows."""
        grpo, pretrain = self.config.grpo, self.config.pretrain
        questions = {question_of(self.train_task(index)) for index in range(grpo.num_steps * grpo.tasks_per_step)}
        if self.config.model is not None:
            num_documents = pretrain.num_steps * pretrain.documents_per_step
            questions |= {self.corpus.question(index) for index in range(num_documents)}
        return questions


def _reporter(bar: Bar) -> Callable[[int, int], None]:
    return lambda done, total: bar.advance(done)


def _corpus_source(tasks: ReasoningGymTasks) -> Source:
    return Source(dataset=tasks.name, entry=lambda index: tasks.task("train", index).payload["entry"])
