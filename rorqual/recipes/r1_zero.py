"""R1-Zero (DeepSeek-R1, arXiv 2501.12948, section 2.2): reinforcement learning on a base model, without any SFT.

    tokenizer -> base model -> evaluate -> RL -> evaluate -> control: the same RL with shuffled rewards -> evaluate

The base is pre-trained here on a generated corpus (`model`), or read from a Hugging Face checkpoint (`checkpoint`).
The objective is V3.2's by default: GRPO with its four repairs (arXiv 2512.02556, section 3.1).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import torch

from rorqual.contracts import Environment
from rorqual.engines.local import EngineConfig, LocalEngine
from rorqual.envs.dialogue import DialogueConfig, DialogueEnvironment, ReasoningGymConfig, ReasoningGymTasks
from rorqual.evals.fingerprint import weights_fingerprint
from rorqual.evals.runner import GREEDY, Player, Protocol, evaluate
from rorqual.models.checkpoints import load_checkpoint
from rorqual.models.config import ModelConfig
from rorqual.models.decoder import Decoder
from rorqual.recipes.grpo import GrpoConfig, GrpoParts, run_grpo
from rorqual.recipes.pretrain import PretrainConfig, TokenizerConfig, corpus_texts, prepare_tokenizer, run_pretrain
from rorqual.recipes.problems import Problems
from rorqual.recipes.progress import Bar, Progress
from rorqual.records import Record, SamplingParams, Task
from rorqual.rewards.rules import RewardConfig, load_rewards
from rorqual.store.run import Run
from rorqual.synth.worked import Corpus, CorpusConfig, train_source
from rorqual.text.encoding import Encoding, EncodingConfig


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
        """Raises: ValueError unless there is a task, one of `model` and `checkpoint`, and room to answer."""
        if not self.tasks:
            raise ValueError("R1ZeroConfig.tasks is empty; name at least one reasoning-gym data set.")
        if (self.model is None) == (not self.checkpoint):
            raise ValueError("R1ZeroConfig needs either `model` (a base is pre-trained) or `checkpoint` (one is read).")
        window = self.grpo.engine.context_window or (self.model.context_window if self.model else 0)
        if window and self.grpo.sampling.max_new_tokens >= window:
            raise ValueError(
                f"grpo.sampling.max_new_tokens = {self.grpo.sampling.max_new_tokens} leaves no room for a prompt in "
                f"the window of {window}; lower it, or raise the window."
            )


Config = R1ZeroConfig


def main(config: R1ZeroConfig, run: Run, progress: Progress) -> None:
    """Run every stage in order; each takes up where an earlier, interrupted call left it."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    held_out = problems(config).held_out(config.evaluation.num_problems)
    base, encoding = _base_model(config, run, progress)
    bench = _Bench(config, encoding, held_out, run, progress)

    bench.evaluate("base", base)
    bench.evaluate("rl", bench.train("rl", base))
    if config.control:
        bench.evaluate("control", bench.train("control", base, shuffle_rewards=True))


def seeds(config: R1ZeroConfig) -> Mapping[str, int]:
    """The seeds that the manifest records."""
    return {"run": config.seed, "corpus": config.corpus.seed}


def problems(config: R1ZeroConfig) -> Problems:
    """The tasks of a run: what it trains on and what it holds out."""
    return Problems(
        sources=[ReasoningGymTasks.from_config(each) for each in config.tasks],
        num_documents=config.pretrain.num_steps * config.pretrain.documents_per_step if config.model else 0,
        num_rl_tasks=config.grpo.num_steps * config.grpo.tasks_per_step,
    )


def check(config: R1ZeroConfig) -> None:
    """Find what would stop a run later: data sets, rewards, the device, problems to hold out. Takes a few seconds.

    Raises: ValueError naming what is wrong.
    """
    try:
        kind = torch.device(config.device).type
    except RuntimeError as error:
        raise ValueError(f"device = {config.device!r} is none that torch knows; set cpu or cuda. {error}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda', and torch sees no GPU here; set device = cpu, or see `rorqual doctor`.")
    parts = {reward.name for reward in config.rewards}
    metric = config.evaluation.protocol.metric
    if metric not in parts or GREEDY.metric not in parts:
        needed = " and ".join(sorted({metric, GREEDY.metric} - parts))
        raise ValueError(f"The evaluation averages {needed}, which is none of the rewards; add it, with weight 0 say.")
    load_rewards(config.rewards)
    problems(config).held_out(config.evaluation.num_problems)


def architecture(config: R1ZeroConfig, stage: str) -> Decoder:
    """A model of the kind that every stage trains, for its checkpoint to be read into."""
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    return Decoder(config.model).to(dtype) if config.model is not None else load_checkpoint(config.checkpoint, dtype)


def _base_model(config: R1ZeroConfig, run: Run, progress: Progress) -> tuple[Decoder, Encoding]:
    """The base: read from a checkpoint, or pre-trained on the corpus from random weights."""
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    corpus = Corpus(config.corpus, [train_source(source) for source in problems(config).sources])
    texts = corpus_texts(corpus, config.tokenizer.num_documents)
    if config.model is None:
        base = load_checkpoint(Path(config.checkpoint), dtype=dtype, device=torch.device(config.device))
        tokenizer_config = msgspec.structs.replace(config.tokenizer, path=config.tokenizer.path or config.checkpoint)
        tokenizer = prepare_tokenizer(tokenizer_config, base.config.vocab_size, texts, run)
        return base, Encoding(tokenizer, config.encoding)
    tokenizer = prepare_tokenizer(config.tokenizer, config.model.vocab_size, texts, run)
    encoding = Encoding(tokenizer, config.encoding)
    base = Decoder(config.model)
    base.initialize(torch.Generator().manual_seed(config.seed))
    base.to(torch.device(config.device), dtype)
    progress.say(f"A model of {base.num_parameters:,} parameters, {base.num_active_parameters:,} active for a token.")
    run_pretrain(config.pretrain, base, corpus, encoding, run, progress)
    return base, encoding


class _Bench:
    """What the stages after the base share: tasks, rewards, the environment, and the held-out problems."""

    def __init__(
        self, config: R1ZeroConfig, encoding: Encoding, held_out: Sequence[Task], run: Run, progress: Progress
    ) -> None:
        self.config, self.encoding, self.held_out = config, encoding, held_out
        self.run, self.progress = run, progress
        self.problems = problems(config)
        self.rewards = load_rewards(config.rewards)
        self.environments: Mapping[str, Environment] = {"dialogue": DialogueEnvironment(config.dialogue)}

    def train(self, stage: str, base: Decoder, shuffle_rewards: bool = False) -> Decoder:
        """A policy trained from `base`, which stays as it is and serves as reference."""
        objective = self.config.grpo.objective.resolve()
        domains = {source.domain for source in self.problems.sources}
        policy = copy.deepcopy(base)
        parts = GrpoParts(
            policy=policy,
            reference=base if any(objective.kl_strength_for(domain) > 0.0 for domain in domains) else None,
            encoding=self.encoding,
            environments=self.environments,
            task=self.problems.rl_task,
            rewards=self.rewards,
            seed=self.config.seed,
            shuffle_rewards=shuffle_rewards,
        )
        run_grpo(stage, self.config.grpo, parts, self.run, self.progress)
        return policy

    def evaluate(self, label: str, policy: Decoder) -> None:
        """Greedy and sampled, on every data set's held-out problems."""
        settings = self.config.evaluation
        sampled = settings.protocol
        limit = self.config.grpo.sampling.max_new_tokens
        greedy = msgspec.structs.replace(GREEDY, sampling=SamplingParams(temperature=0.0, max_new_tokens=limit))
        engine = LocalEngine(policy, settings.engine)
        fingerprint = weights_fingerprint(policy)
        player = Player(label, engine, self.environments, self.encoding, self.rewards, fingerprint)
        for protocol in (greedy, sampled):
            name = f"{label}-{protocol.name}"
            with self.progress.bar(f"evaluate {name}", len(self.held_out) * protocol.num_samples) as bar:
                summary = evaluate(self.run, name, self.held_out, player, protocol, self.config.seed, _reporter(bar))
            self.progress.say(f"{label}, {protocol.name}: accuracy {summary.mean:.1%}")


def _reporter(bar: Bar) -> Callable[[int, int], None]:
    return lambda done, total: bar.advance(done)
