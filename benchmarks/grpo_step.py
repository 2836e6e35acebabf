"""One GRPO step of Rorqual beside one of TRL's GRPOTrainer: time and peak memory.

Both load the same checkpoint, sample the same prompts in groups of 8 at temperature 1, draw the same number of tokens,
reward the share of even tokens, subtract the group's mean, and minimise the clipped surrogate with the unbiased K3
term against a frozen reference and the off-policy sequence mask, by one step of AdamW. Before anything is timed, the
log-probs of both policies are compared on the same tokens.

The two take turns in one process: Rorqual's step runs when TRL's has ended, inside its callback, so each is idle while
the other works. Memory is measured in a process of its own for each side. Needs Linux and `pip install rorqual[bench]`.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import (
    SEED,
    conditions,
    markdown_table,
    memory_at_rest,
    memory_peak,
    parser,
    quiet,
    random_prompts,
    spread,
    write_checkpoint,
)
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rorqual.engines.local import EngineConfig, LocalEngine
from rorqual.models.checkpoints import load_checkpoint
from rorqual.records import Completion, GenerateRequest, SamplingParams, Score, TrainSample
from rorqual.rl.advantages import group_advantages
from rorqual.rl.objective import ObjectiveConfig
from rorqual.text.tokenizer import Tokenizer
from rorqual.train.data import PackedBatch, pack_samples
from rorqual.train.objectives import loss_scale, policy_objective
from rorqual.train.optim import OptimizerConfig, build_optimizer
from rorqual.train.step import compute_logprobs, train_step, with_reference

GROUP_SIZE = 8
WARMUP_STEPS = 2
LOGPROB_TOLERANCE = 1e-4
MEMORY_STEPS = 3

OBJECTIVE = ObjectiveConfig(advantage="mean", kl_strength=0.001, sequence_mask_delta=0.5)
OPTIMIZER = OptimizerConfig(learning_rate=1e-6, beta2=0.999, weight_decay=0.0)


@dataclass(frozen=True)
class Setting:
    """Sizes in tokens; a batch is `batch_size` completions in groups of GROUP_SIZE."""

    prompt: int
    vocabulary: int
    completion: int = 64
    batch_size: int = 16

    @property
    def title(self) -> str:
        return f"{self.prompt} / {self.completion} / {self.batch_size} / {self.vocabulary:,}"


SETTINGS = {
    "short": Setting(prompt=32, vocabulary=256),
    "long": Setting(prompt=512, vocabulary=256),
    "vocabulary": Setting(prompt=32, vocabulary=129_280),
}


@dataclass
class Times:
    """Seconds of each measured step, and the part of it spent on sampling."""

    step: list[float] = field(default_factory=list)
    generate: list[float] = field(default_factory=list)

    @property
    def rest(self) -> list[float]:
        return [step - generate for step, generate in zip(self.step, self.generate, strict=True)]


def share_of_even(token_ids: Sequence[int]) -> float:
    """The reward: a task that a policy can learn by itself."""
    return sum(token % 2 == 0 for token in token_ids) / len(token_ids)


# ------------------------------------------------------------------------------------------------------------- Rorqual


class RorqualSide:
    """The same step out of Rorqual's parts; the engine samples from the trained policy itself, as TRL does."""

    def __init__(self, directory: Path, setting: Setting) -> None:
        self.setting, self.times = setting, Times()
        self.policy = load_checkpoint(directory)
        self.reference = copy.deepcopy(self.policy)
        self.optimizer = build_optimizer(self.policy, OPTIMIZER)
        self.engine = LocalEngine(self.policy, EngineConfig(num_slots=setting.batch_size))
        self.tokenizer = Tokenizer.load(directory)
        self.num_steps = 0

    def step(self, prompts: Sequence[str]) -> None:
        """prompts: one text a completion, equal within a group."""
        started = time.perf_counter()
        prompt_ids = [self.tokenizer.encode(prompt) for prompt in prompts]
        completions = self._generate(prompt_ids)
        self.times.generate.append(time.perf_counter() - started)
        batches = self.pack(prompt_ids, completions)
        batches = with_reference(batches, compute_logprobs(self.reference, batches))
        objective = policy_objective(OBJECTIVE, loss_scale(batches))
        train_step(self.policy, self.optimizer, batches, objective, OPTIMIZER, self.num_steps)
        self.num_steps += 1
        self.engine.load_weights(self.policy, self.num_steps)
        self.times.step.append(time.perf_counter() - started)

    def _generate(self, prompt_ids: Sequence[array[int]]) -> list[Completion]:
        requests = [
            GenerateRequest(
                request_id=str(index),
                prompt_ids=ids,
                params=SamplingParams(max_new_tokens=self.setting.completion, seed=self.num_steps << 16 | index),
            )
            for index, ids in enumerate(prompt_ids)
        ]
        completions = self.engine.generate(requests)
        for completion in completions:
            self.tokenizer.decode(completion.token_ids)
        return completions

    def pack(self, prompt_ids: Sequence[array[int]], completions: Sequence[Completion]) -> list[PackedBatch]:
        """Rewards, advantages and micro-batches of one step; TRL takes the batch at once, and so does the budget."""
        scores = [Score(total=share_of_even(c.token_ids), parts={}) for c in completions]
        advantages: list[float] = []
        for start in range(0, len(scores), GROUP_SIZE):
            advantages += group_advantages(scores[start : start + GROUP_SIZE], OBJECTIVE.advantage)
        samples = [
            _sample(index, ids, completion, advantage)
            for index, (ids, completion, advantage) in enumerate(zip(prompt_ids, completions, advantages, strict=True))
        ]
        budget = self.setting.batch_size * (self.setting.prompt + self.setting.completion)
        return pack_samples(samples, budget)

    def logprobs(self, prompt_ids: Sequence[array[int]], completion_ids: Sequence[array[int]]) -> torch.Tensor:
        """Of given completions, [batch, completion tokens]."""
        completions = [
            Completion(
                request_id=str(index),
                token_ids=ids,
                logprobs=array("f", bytes(4 * len(ids))),
                entropies=array("f", bytes(4 * len(ids))),
                kept_mass=array("f", bytes(4 * len(ids))),
                finish_reason="length",
                weight_version=0,
            )
            for index, ids in enumerate(completion_ids)
        ]
        (batch,) = self.pack(prompt_ids, completions)
        (logprobs,) = compute_logprobs(self.policy, [batch])
        order = sorted(range(len(completion_ids)), key=lambda row: int(batch.sample_ids[row]))
        return logprobs.view(len(completion_ids), -1)[order]


def _sample(index: int, prompt_ids: array[int], completion: Completion, advantage: float) -> TrainSample:
    num_prompt, num_drawn = len(prompt_ids), len(completion.token_ids)
    return TrainSample(
        sample_id=str(index),
        group_id=str(index // GROUP_SIZE),
        domain="benchmark",
        token_ids=prompt_ids + completion.token_ids,
        sampled=array("b", bytes(num_prompt) + b"\1" * num_drawn),
        behaviour_logprobs=array("f", bytes(4 * num_prompt)) + completion.logprobs,
        prompt_length=num_prompt,
        advantage=advantage,
        weight_version=completion.weight_version,
    )


# ----------------------------------------------------------------------------------------------------------------- TRL


class TimedTrainer(GRPOTrainer):  # type: ignore[misc]
    """TRL's trainer, with a clock around the call that samples."""

    times: Times

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = super()._generate_single_turn(*args, **kwargs)
        self.times.generate.append(time.perf_counter() - started)
        return result


class Turns(TrainerCallback):  # type: ignore[misc]
    """Times TRL's step from its begin to its end, then hands over to `after_step` with the prompts of that step."""

    def __init__(self, times: Times, after_step: Callable[[Sequence[str]], None]) -> None:
        self.times, self.after_step = times, after_step
        self.prompts: list[str] = []
        self.started = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.step.append(time.perf_counter() - self.started)
        self.after_step(self.prompts)

    def reward(self, prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        self.prompts = prompts
        return [share_of_even(ids) for ids in completion_ids]


def build_trainer(
    directory: Path, setting: Setting, num_steps: int, after_step: Callable[[Sequence[str]], None]
) -> TimedTrainer:
    """The settings of TRL that state the same objective, without its defaults for GPUs."""
    disable_progress_bar()
    times = Times()
    turns = Turns(times, after_step)
    config = GRPOConfig(
        output_dir=str(directory / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        use_vllm=False,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        per_device_train_batch_size=setting.batch_size,
        gradient_accumulation_steps=1,
        num_generations=GROUP_SIZE,
        max_completion_length=setting.completion,
        generation_kwargs={"min_new_tokens": setting.completion},
        temperature=1.0,
        top_p=1.0,
        beta=OBJECTIVE.kl_strength,
        use_bias_correction_kl=True,
        off_policy_mask_threshold=OBJECTIVE.sequence_mask_delta,
        loss_type="grpo",
        scale_rewards="none",
        epsilon=OBJECTIVE.clip_low,
        num_iterations=1,
        learning_rate=OPTIMIZER.learning_rate,
        max_steps=num_steps,
        optim="adamw_torch",
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        dataloader_num_workers=0,
        seed=SEED,
    )
    texts = random_prompts(num_steps * setting.batch_size // GROUP_SIZE, setting.prompt, setting.vocabulary)
    trainer = TimedTrainer(
        model=str(directory),
        processing_class=AutoTokenizer.from_pretrained(directory),
        reward_funcs=turns.reward,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        args=config,
        callbacks=[turns],
    )
    trainer.times = times
    return trainer


# ---------------------------------------------------------------------------------------------------------- comparison


def check_logprobs(trainer: GRPOTrainer, ours: RorqualSide, setting: Setting) -> float:
    """Largest difference of the two policies' log-probs on the same random tokens.

    Raises: ValueError when it exceeds LOGPROB_TOLERANCE: the two sides would then not do the same work.
    """
    generator = torch.Generator().manual_seed(SEED)
    num_tokens = setting.prompt + setting.completion
    ids = torch.randint(setting.vocabulary, (setting.batch_size, num_tokens), generator=generator)
    ids[:, : setting.prompt] = ids[::GROUP_SIZE, : setting.prompt].repeat_interleave(GROUP_SIZE, dim=0)
    with torch.no_grad():
        theirs = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, torch.ones_like(ids), logits_to_keep=setting.completion
        )[0]
    rows = [array("i", row) for row in ids.tolist()]
    mine = ours.logprobs([row[: setting.prompt] for row in rows], [row[setting.prompt :] for row in rows])
    difference = float((theirs - mine).abs().max())
    if not difference <= LOGPROB_TOLERANCE:
        raise ValueError(
            f"The log-probs differ by {difference:.2g}, more than {LOGPROB_TOLERANCE}: the two sides do not hold the "
            "same model, so their times cannot be compared."
        )
    return difference


def compare(setting: Setting, rounds: int) -> tuple[Times, Times, float]:
    """Times of TRL and of Rorqual, in turn, and the largest difference of their log-probs before the first step."""
    with tempfile.TemporaryDirectory() as name:
        directory = write_checkpoint(Path(name), setting.vocabulary, 2 * (setting.prompt + setting.completion))
        ours = RorqualSide(directory, setting)
        trainer = build_trainer(directory, setting, WARMUP_STEPS + rounds, ours.step)
        difference = check_logprobs(trainer, ours, setting)
        with quiet():
            trainer.train()
        return trainer.times, ours.times, difference


# -------------------------------------------------------------------------------------------------------------- memory


def memory_of(side: str, setting: Setting) -> tuple[float, float]:
    """Resident memory of this process in MiB: at rest after a first step, and the most above that in later steps.

    At rest it holds libraries, weights, reference and optimiser state; freed memory is given back to the system first.
    """
    rest: list[float] = []

    def after_step(prompts: Sequence[str]) -> None:
        if not rest:
            rest.append(memory_at_rest())

    with tempfile.TemporaryDirectory() as name, quiet():
        directory = write_checkpoint(Path(name), setting.vocabulary, 2 * (setting.prompt + setting.completion))
        if side == "trl":
            build_trainer(directory, setting, MEMORY_STEPS, after_step).train()
        else:
            ours, per_step = RorqualSide(directory, setting), setting.batch_size // GROUP_SIZE
            texts = random_prompts(MEMORY_STEPS * per_step, setting.prompt, setting.vocabulary)
            for start in range(0, len(texts), per_step):
                ours.step([text for text in texts[start : start + per_step] for _ in range(GROUP_SIZE)])
                after_step(texts)
    return rest[0], memory_peak() - rest[0]


def memory_in_own_process(side: str, setting_name: str, threads: int) -> tuple[float, float]:
    command = [sys.executable, __file__, "--memory-of", side, "--setting", setting_name, "--threads", str(threads)]
    rest, extra = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:]
    return float(rest), float(extra)


# ---------------------------------------------------------------------------------------------------------------- main


def time_row(setting: Setting, trl: Times, ours: Times) -> list[str]:
    return [
        setting.title,
        spread(trl.step),
        spread(ours.step),
        f"{median(trl.step) / median(ours.step):.1f}",
        f"{1e3 * median(trl.generate):.1f} / {1e3 * median(trl.rest):.1f}",
        f"{1e3 * median(ours.generate):.1f} / {1e3 * median(ours.rest):.1f}",
    ]


def options() -> argparse.Namespace:
    result = parser("Time a GRPO step of Rorqual beside one of TRL.", rounds=20)
    result.add_argument("--setting", choices=[*SETTINGS, "all"], default="all")
    result.add_argument("--memory-of", choices=["trl", "rorqual"], help=argparse.SUPPRESS)
    return result.parse_args()


def main() -> None:
    chosen = options()
    torch.set_num_threads(chosen.threads)
    if chosen.memory_of:
        print(*memory_of(chosen.memory_of, SETTINGS[chosen.setting]))
        return
    times, memory, differences = [], [], []
    for name in SETTINGS if chosen.setting == "all" else [chosen.setting]:
        trl, ours, difference = compare(SETTINGS[name], chosen.rounds)
        for each in (trl, ours):
            del each.step[:WARMUP_STEPS], each.generate[:WARMUP_STEPS]
        times.append(time_row(SETTINGS[name], trl, ours))
        differences.append(difference)
        usage = [memory_in_own_process(side, name, chosen.threads) for side in ("trl", "rorqual")]
        ratio = usage[0][1] / usage[1][1]
        memory.append([SETTINGS[name].title, *(f"{rest:.0f} + {extra:.0f}" for rest, extra in usage), f"{ratio:.1f}"])
    print("Milliseconds a step, min / median; sampling / rest are medians.\n")
    sizes = "prompt / completion / batch / vocabulary"
    print(markdown_table([sizes, "TRL", "Rorqual", "ratio", "TRL: sampling / rest", "Rorqual"], times))
    print("\nResident memory in MiB, at rest + most above it during a step.\n")
    print(markdown_table([sizes, "TRL", "Rorqual", "ratio of the second"], memory))
    packages = ("torch", "transformers", "trl", "rorqual", "numba")
    print(f"\n{conditions(chosen.threads, chosen.rounds, packages)}")
    print(f"Largest difference of the two policies' log-probs before the first step: {max(differences):.1e}.")


if __name__ == "__main__":
    main()
