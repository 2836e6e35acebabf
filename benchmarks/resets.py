"""Is training across resets worth it? A message is lost with the context, unless the policy learned to write it down.

A key (one of four letters) is told in the second user turn. The context overflows before the question for the key
comes, so nothing answers it without a reset; the reset leaves what the policy wrote into its summary. The base policy
mostly writes a random letter there, and answers with the letter of its summary. Only the summary has to be learned, and
the reward comes two turns and one segment later. Three ways from the same base, with the same tasks and seeds:

    no reset       context management "none": the episode ends before the question is asked
    last segment   "summary"; only the last segment of each trajectory is trained
    all segments   "summary"; the advantage holds for the sampled tokens of every segment

Needs `pip install rorqual[bench]`.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Sequence
from typing import Literal, cast

import msgspec
import torch
from common import conditions, markdown_table, parser

from rorqual.engines.local import EngineConfig, LocalEngine
from rorqual.models.config import ModelConfig
from rorqual.models.decoder import Decoder
from rorqual.records import (
    EndReason,
    Evidence,
    Message,
    SamplingParams,
    Score,
    Segment,
    Task,
    ToolCall,
    ToolSpec,
    TrainSample,
    Trajectory,
)
from rorqual.rl.advantages import group_advantages
from rorqual.rl.objective import ObjectiveConfig
from rorqual.rl.samples import train_samples
from rorqual.rollout.compaction import SUMMARY_HEADING, ask_for_summary, with_summary
from rorqual.rollout.context import ContextConfig
from rorqual.rollout.episode import EpisodeConfig
from rorqual.rollout.group import Rollouts
from rorqual.text.encoding import Encoding, EncodingConfig
from rorqual.text.tokenizer import train_tokenizer
from rorqual.train.data import pack_documents, pack_samples
from rorqual.train.objectives import language_model_objective, loss_scale, policy_objective
from rorqual.train.optim import OptimizerConfig, build_optimizer
from rorqual.train.step import train_step

Way = Literal["no reset", "last segment", "all segments"]
WAYS: tuple[Way, ...] = ("no reset", "last segment", "all segments")
KEYS = "ABCD"
INSTRUCTION = "note"
BEGIN, KEY_PADDING, FIRST_FILLER, SECOND_FILLER = "-", "-" * 8, "+" * 4, "?" * 24
BUDGET = 1 << 16

KNOWN = 0.3
"""How often the base writes the key into its summary on purpose."""


class Courier:
    """Tells a key, talks of something else, and asks for it. Implements `contracts.Environment`."""

    def start(self, task: Task) -> tuple[Message, ...]:
        return (user(BEGIN),)

    def respond(self, task: Task, messages: Sequence[Message]) -> tuple[Message, ...]:
        turns = [KEY_PADDING + task.payload["key"], FIRST_FILLER, SECOND_FILLER]
        spoken = sum(message.role == "assistant" for message in messages)
        return (user(turns[spoken - 1]),) if spoken <= len(turns) else ()

    def tools(self, task: Task) -> tuple[ToolSpec, ...]:
        return ()

    async def call(self, task: Task, messages: Sequence[Message], call: ToolCall) -> str:
        raise ValueError("There are no tools.")

    def evidence(self, task: Task, messages: Sequence[Message], segments: Sequence[Segment], end: str) -> Evidence:
        said = messages[-1].content if end == "stop" else ""
        num_sampled = sum(segment.num_sampled for segment in segments)
        return Evidence(
            response=said, thinking=None, answer=said, num_sampled_tokens=num_sampled, end=cast(EndReason, end)
        )


def user(text: str) -> Message:
    return Message(role="user", content=text)


def say(text: str) -> Message:
    return Message(role="assistant", content=text)


def build_encoding() -> Encoding:
    texts = [SUMMARY_HEADING, INSTRUCTION] * 9
    return Encoding(train_tokenizer(texts, 300, split_words=False), EncodingConfig(retention="all"))


def conversation(key: str, letters: str) -> list[Message]:
    """All up to the question, in which the policy says `letters`."""
    told = [user(BEGIN), say(letters[0]), user(KEY_PADDING + key), say(letters[1]), user(FIRST_FILLER)]
    return [*told, say(letters[2]), user(SECOND_FILLER)]


def episode_config(encoding: Encoding, way: Way) -> EpisodeConfig:
    """A window that the question does not fit into, and a threshold that the first filler crosses."""
    whole = conversation("A", "AAA")
    window, told = len(encoding.prompt(whole)), len(encoding.prompt(whole[:-2]))
    context = ContextConfig(
        strategy="none" if way == "no reset" else "summary",
        threshold=(told - 0.5) / window,
        max_resets=1,
        summary_tokens=3,
        summary_instruction=INSTRUCTION,
    )
    sampling = SamplingParams(max_new_tokens=3)
    return EpisodeConfig(sampling=sampling, context_window=window, max_turns=4, context=context)


def base_policy(encoding: Encoding, steps: int, batch: int, seed: int) -> Decoder:
    """Writes random letters, mostly as its summary too, and answers with the letter of its summary."""
    model = Decoder(
        ModelConfig(
            family="qwen3",
            vocab_size=encoding.tokenizer.vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            context_window=128,
            qk_norm=True,
            tie_embeddings=True,
        )
    )
    model.initialize(torch.Generator().manual_seed(seed))
    config = OptimizerConfig(learning_rate=3e-3, warmup_steps=10)
    optimizer, draw = build_optimizer(model, config), random.Random(seed)
    for step in range(steps):
        documents, weights = [], []
        for _ in range(batch):
            key = draw.choice(KEYS)
            note = key if draw.random() < KNOWN else draw.choice(KEYS)
            told = conversation(key, "".join(draw.choices(KEYS, k=3)))
            asked = [*ask_for_summary(told[:-2], INSTRUCTION), say(note)]
            for messages in (asked, [*with_summary(told[:-2], note), *told[-2:], say(note)]):
                rendered = encoding.render(messages)
                documents.append(rendered.token_ids)
                weights.append(rendered.sampled)
        batches = pack_documents(documents, BUDGET, weights=weights)
        train_step(model, optimizer, batches, language_model_objective(batches), config, step)
    return model


def reward(task: Task, trajectory: Trajectory) -> float:
    return float(trajectory.evidence.answer == task.payload["key"])


def learn(way: Way, base: Decoder, encoding: Encoding, steps: int, seed: int) -> list[float]:
    """Mean reward of each step of RL, before its update."""
    policy = copy.deepcopy(base)
    config = OptimizerConfig(learning_rate=1e-3, weight_decay=0.0)
    objective = ObjectiveConfig(kl_estimator="none", kl_strength=0.0)
    optimizer, draw = build_optimizer(policy, config), random.Random(seed)
    engine = LocalEngine(copy.deepcopy(policy), EngineConfig(num_slots=128))
    rollouts = Rollouts(engine, {"courier": Courier()}, encoding, episode_config(encoding, way), 8, seed)
    curve = []
    for step in range(steps):
        engine.load_weights(policy, version=step)
        tasks = [
            Task(task_id=str(i), environment="courier", domain="x", messages=(), payload={"key": draw.choice(KEYS)})
            for i in range(16)
        ]
        samples: list[TrainSample] = []
        rewards: list[float] = []
        for group in rollouts.run(tasks, step):
            scores = [Score(total=reward(group.task, each), parts={}) for each in group.trajectories]
            rewards += [score.total for score in scores]
            credits_ = group_advantages(scores, objective.advantage)
            for trajectory, score, advantage in zip(group.trajectories, scores, credits_, strict=True):
                samples += trained(way, train_samples(trajectory, score, advantage))
        curve.append(statistics.fmean(rewards))
        batches = pack_samples(samples, BUDGET)
        train_step(policy, optimizer, batches, policy_objective(objective, loss_scale(batches)), config, step)
    return curve


def trained(way: Way, samples: Sequence[TrainSample]) -> list[TrainSample]:
    """Those of a trajectory's samples that are trained; the last one alone counts as a trajectory of its own."""
    if way != "last segment":
        return list(samples)
    return [msgspec.structs.replace(each, trajectory_id=None, trajectory_length=None) for each in samples[-1:]]


def main() -> None:
    options = parser(__doc__ or "", rounds=3)
    options.add_argument("--base-steps", type=int, default=400, help="supervised steps (default: %(default)s)")
    options.add_argument("--steps", type=int, default=30, help="steps of RL (default: %(default)s)")
    options.set_defaults(threads=1)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    started, encoding = time.perf_counter(), build_encoding()
    rows = []
    for seed in range(chosen.rounds):
        base = base_policy(encoding, chosen.base_steps, 16, seed)
        for way in WAYS:
            curve = learn(way, base, encoding, chosen.steps, seed)
            quarters = [statistics.fmean(curve[at : at + 5]) for at in range(0, len(curve), max(len(curve) // 4, 5))]
            last = statistics.fmean(curve[-5:])
            rows.append([way, str(seed), *(f"{value:.1%}" for value in (*quarters[:4], last))])
    rows.sort(key=lambda row: (WAYS.index(cast(Way, row[0])), row[1]))
    starts = [f"from step {at}" for at in range(0, chosen.steps, max(chosen.steps // 4, 5))][:4]
    print(markdown_table(["trained", "seed", *starts, "last 5"], rows))
    seconds = time.perf_counter() - started
    print(
        f"\nAnswers that were right, over 5 steps of 128 episodes; chance is {1 / len(KEYS):.0%}. {chosen.base_steps} "
        f"supervised steps, {chosen.steps} of RL; {seconds / 60:.1f} min. "
        f"{conditions(chosen.threads, chosen.rounds, ('torch', 'rorqual'))}"
    )


if __name__ == "__main__":
    main()
