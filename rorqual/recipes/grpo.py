"""The reinforcement-learning stage: sample groups, judge them, give credit, learn; the loop of every RL recipe.

    tasks -> rollouts -> trajectories -> scores -> advantages -> train samples -> optimiser steps -> new weights

In: a policy, a frozen reference, tasks, rewards. Out: the policy's weights moved; a Parquet file of trajectories, a
line of metrics for every step, and checkpoints that hold whatever is in flight. The one way back is
`engine.load_weights`.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from rorqual.contracts import Environment, Reward
from rorqual.engines.local import EngineConfig, LocalEngine
from rorqual.models.decoder import Decoder
from rorqual.recipes.progress import Progress
from rorqual.records import Record, SamplingParams, Score, Task, Trajectory, from_json, to_json
from rorqual.rewards.rules import score
from rorqual.rl.advantages import group_advantages
from rorqual.rl.diagnostics import merge, sampling_metrics
from rorqual.rl.objective import PRESETS, ObjectiveConfig
from rorqual.rl.samples import FAILED_ENDS, train_samples
from rorqual.rollout.episode import EpisodeConfig
from rorqual.rollout.group import Group, Rollouts
from rorqual.store.run import Run
from rorqual.store.tables import ScoredTrajectory
from rorqual.text.encoding import Encoding
from rorqual.text.reflection import corrects_itself
from rorqual.text.response import parse_response
from rorqual.train.checkpoint import load_training_state, save_training_state
from rorqual.train.data import PackedBatch, pack_samples
from rorqual.train.objectives import loss_scale, policy_objective
from rorqual.train.optim import OptimizerConfig, build_optimizer
from rorqual.train.step import (
    StepStats,
    compute_logprobs,
    train_step,
    with_proximal,
    with_reference,
)


class ObjectiveChoice(Record):
    """A preset of the RL objective ("v32" or "r1") and the fields of it to change: `changes = { clip_high = 0.28 }`.

    KL strengths of domains are added to those of the preset.
    """

    preset: str = "v32"
    changes: dict[str, Any] = {}

    def __post_init__(self) -> None:
        self.resolve()

    def resolve(self) -> ObjectiveConfig:
        """Raises: ValueError for an unknown preset or field, or for changes that do not go together."""
        if self.preset not in PRESETS:
            raise ValueError(f"There is no objective preset {self.preset!r}; there are {', '.join(PRESETS)}.")
        preset = PRESETS[self.preset]
        fields = msgspec.to_builtins(preset) | self.changes
        fields["kl_strength_by_domain"] = preset.kl_strength_by_domain | self.changes.get("kl_strength_by_domain", {})
        return msgspec.convert(fields, ObjectiveConfig)


class GrpoConfig(Record):
    """Size and pace of RL.

    updates_per_step: optimiser steps that share the rollouts of one step; from the second on they are off-policy.
    checkpoint_every_seconds: a checkpoint is written after the first optimiser step, or between two engine steps
    while rollouts
        are in flight, that comes this long after the last one; 0 writes one at each of these places.
    checkpoint_activations: train in less memory and more time, see `models.decoder.Decoder`.
    """

    num_steps: int = 40
    tasks_per_step: int = 64
    group_size: int = 8
    updates_per_step: int = 2
    token_budget: int = 16384
    checkpoint_activations: bool = False
    checkpoint_every_seconds: float = 60.0
    sampling: SamplingParams = SamplingParams()
    objective: ObjectiveChoice = ObjectiveChoice()
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    allow_unmatched_support: bool = False

    def __post_init__(self) -> None:
        """Raises: ValueError naming the field that is out of range, or settings that do not go together."""
        ranges = {
            "num_steps": self.num_steps >= 1,
            "tasks_per_step": self.tasks_per_step >= 1,
            "group_size": self.group_size >= 2,
            "updates_per_step": 1 <= self.updates_per_step <= self.tasks_per_step,
            "token_budget": self.token_budget >= 1,
            "checkpoint_every_seconds": self.checkpoint_every_seconds >= 0.0,
            "sampling.temperature": self.sampling.temperature > 0.0,
        }
        for name, valid in ranges.items():
            if not valid:
                raise ValueError(f"GrpoConfig.{name} is out of range: a group needs two members, an update one task.")
        keeps_mask = self.objective.resolve().keep_sampling_mask
        if self.sampling.truncates and not keeps_mask and not self.allow_unmatched_support:
            raise ValueError(
                "GrpoConfig.sampling truncates the distribution, and the objective does not keep the sampling mask: "
                "behaviour and current log-probs would be over different supports. Set sampling.top_p = 1, or "
                "objective.changes.keep_sampling_mask = true, or allow_unmatched_support = true to do it all the same."
            )


@dataclass(frozen=True)
class GrpoParts:
    """What the stage works with. `task(i)` is the i-th training task; rewards: name -> function and weight.

    reference: the frozen KL anchor, or None where no domain has a KL term. shuffle_rewards: the control experiment,
    in which each trajectory gets the score of a random other one of the same step.
    """

    policy: Decoder
    reference: Decoder | None
    encoding: Encoding
    environments: Mapping[str, Environment]
    task: Callable[[int], Task]
    rewards: Mapping[str, tuple[Reward, float]]
    seed: int
    shuffle_rewards: bool = False


def run_grpo(stage: str, config: GrpoConfig, parts: GrpoParts, run: Run, progress: Progress) -> None:
    """Train `parts.policy` in place; resumes from the newest checkpoint of this stage, rollouts in flight included."""
    loop = _Loop(stage, config, parts, run)
    first = loop.resume()
    with progress.bar(stage, config.num_steps) as bar:
        for step in range(first, config.num_steps):
            started = time.perf_counter()
            groups = loop.play(step)
            seconds = {"generate": time.perf_counter() - started}
            rows = loop.judge(groups, step)
            started = time.perf_counter()
            stats = loop.learn(rows, step)
            seconds["train"] = time.perf_counter() - started
            rows = [with_measures(row, stats) for row in rows]
            run.write_trajectories(stage, step + 1, rows)
            metrics = step_metrics(rows, stats, seconds)
            run.append_metrics(stage, step + 1, metrics)
            shown = {"reward": "reward/total", "length": "length/mean"}
            bar.advance(step + 1, {name: metrics[key] for name, key in shown.items() if key in metrics})
            loop.checkpoint(step + 1, force=step + 1 == config.num_steps)


class _Loop:
    """The parts of one step, and the state that a checkpoint holds."""

    def __init__(self, stage: str, config: GrpoConfig, parts: GrpoParts, run: Run) -> None:
        self.stage, self.config, self.parts, self.run = stage, config, parts, run
        self.objective = config.objective.resolve()
        parts.policy.checkpoint_activations = config.checkpoint_activations
        self.optimizer = build_optimizer(parts.policy, config.optimizer)
        self.device = parts.policy.embed_tokens.weight.device
        self.engine = LocalEngine(copy.deepcopy(parts.policy), config.engine)
        self.rollouts = Rollouts(
            self.engine,
            parts.environments,
            parts.encoding,
            EpisodeConfig(sampling=config.sampling, context_window=self.engine.context_window),
            config.group_size,
            parts.seed,
        )
        self.finished: list[Group] = []
        self.in_flight = False
        self.last_checkpoint = time.monotonic()

    def resume(self) -> int:
        """Load the newest checkpoint, if there is one; returns the number of steps that are done."""
        checkpoint = self.run.latest_checkpoint(self.stage)
        done = 0
        if checkpoint is not None:
            extra = load_training_state(Path(checkpoint.path), self.parts.policy, self.optimizer)
            done = checkpoint.step
            self.engine.load_weights(self.parts.policy, version=done)
            if extra["rollouts"] is not None:
                self.rollouts.load_state_dict(extra["rollouts"])
                self.finished = from_json(extra["finished"], list[Group])
                self.in_flight = True
        self.run.rewind(self.stage, done)
        return done

    def checkpoint(self, step: int, force: bool = False) -> None:
        """Save what the coming steps depend on, if it is time to."""
        if not force and time.monotonic() - self.last_checkpoint < self.config.checkpoint_every_seconds:
            return
        extra = {
            "rollouts": self.rollouts.state_dict() if self.in_flight else None,
            "finished": to_json(self.finished).decode(),
        }
        self.run.write_checkpoint(
            self.stage, step, lambda path: save_training_state(path, self.parts.policy, self.optimizer, extra)
        )
        self.last_checkpoint = time.monotonic()

    def play(self, step: int) -> list[Group]:
        """Sample one group for each task of the step."""
        if not self.in_flight:
            self.engine.load_weights(self.parts.policy, version=step)
            first = step * self.config.tasks_per_step
            self.rollouts.add([self.parts.task(first + i) for i in range(self.config.tasks_per_step)], step)
            self.in_flight = True
        while self.rollouts.num_unfinished:
            self.finished += self.rollouts.step()
            self.checkpoint(step)
        groups, self.finished, self.in_flight = self.finished, [], False
        return groups

    def judge(self, groups: Sequence[Group], step: int) -> list[ScoredTrajectory]:
        """Score every trajectory and compare it with its group."""
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        tasks = [group.task for group in groups for _ in group.trajectories]
        scores = [judge_trajectory(task, t, self.parts.rewards) for task, t in zip(tasks, trajectories, strict=True)]
        if self.parts.shuffle_rewards:
            scores = shuffled(scores, random.Random(f"{self.parts.seed}/shuffle/{step}"))
        rows, size = [], self.config.group_size
        for start in range(0, len(trajectories), size):
            members = scores[start : start + size]
            advantages = group_advantages(members, self.objective.advantage)
            for trajectory, each, advantage in zip(trajectories[start:], members, advantages, strict=False):
                rows.append(ScoredTrajectory(trajectory=trajectory, score=each, advantage=advantage))
        return rows

    def learn(self, rows: Sequence[ScoredTrajectory], step: int) -> list[StepStats]:
        """Optimiser steps over disjoint parts of the rollouts, whole groups together."""
        config, stats = self.config, []
        for update, part in enumerate(self._parts(rows)):
            samples = [s for row in part for s in train_samples(row.trajectory, row.score, row.advantage or 0.0)]
            if not samples:
                continue
            batches = self._annotate(
                pack_samples(
                    samples,
                    config.token_budget,
                    keep_routing=self.objective.keep_routing,
                    keep_sampling_mask=self.objective.keep_sampling_mask,
                    device=self.device,
                )
            )
            objective = policy_objective(self.objective, loss_scale(batches))
            number = step * config.updates_per_step + update
            temperature = config.sampling.temperature
            stats.append(
                train_step(self.parts.policy, self.optimizer, batches, objective, config.optimizer, number, temperature)
            )
        return stats

    def _parts(self, rows: Sequence[ScoredTrajectory]) -> list[Sequence[ScoredTrajectory]]:
        """The rows of each optimiser step: groups are dealt out in turn, so that every part sees every data set."""
        size, count = self.config.group_size, self.config.updates_per_step
        groups = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [[row for group in groups[update::count] for row in group] for update in range(count)]

    def _annotate(self, batches: list[PackedBatch]) -> list[PackedBatch]:
        """Add the log-probs that the objective needs besides the behaviour's: proximal and reference."""
        temperature = self.config.sampling.temperature
        if self.objective.needs_proximal:
            batches = with_proximal(batches, compute_logprobs(self.parts.policy, batches, temperature))
        if self.parts.reference is not None:
            batches = with_reference(batches, compute_logprobs(self.parts.reference, batches, temperature))
        return batches


def shuffled(scores: Sequence[Score], rng: random.Random) -> list[Score]:
    """The scores dealt out anew; one with an error stays with its trajectory, which must not be trained on."""
    usable = [index for index, each in enumerate(scores) if each.error is None]
    dealt = list(scores)
    for index, source in zip(usable, rng.sample(usable, len(usable)), strict=True):
        dealt[index] = scores[source]
    return dealt


def with_measures(row: ScoredTrajectory, stats: Sequence[StepStats]) -> ScoredTrajectory:
    """The row with what its update measured on it: the largest over its segments, so 1 where any was masked."""
    names = [f"{row.trajectory.trajectory_id}/{index}" for index in range(len(row.trajectory.segments))]
    measured = [each.sequences[name] for each in stats for name in names if name in each.sequences]
    keys = sorted({key for each in measured for key in each})
    return msgspec.structs.replace(row, training={key: max(each[key] for each in measured) for key in keys})


def judge_trajectory(task: Task, trajectory: Trajectory, rewards: Mapping[str, tuple[Reward, float]]) -> Score:
    """The score of one trajectory; one that failed outside the policy has an error, and trains nothing."""
    if trajectory.end in FAILED_ENDS:
        return Score(total=0.0, parts={}, error=f"{trajectory.end}: {trajectory.error}")
    return score(task, trajectory.evidence, rewards)


def step_metrics(
    rows: Sequence[ScoredTrajectory], stats: Sequence[StepStats], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """One flat line: rewards and their parts, lengths, forms, what the sampler did, what each loss term did."""
    judged = [row for row in rows if row.score.error is None]
    parts = sorted({name for row in judged for name in row.score.parts})
    texts = [row.trajectory.evidence.response for row in rows]
    lengths = [row.trajectory.evidence.num_sampled_tokens for row in rows]
    metrics: dict[str, Any] = {
        "reward/errors": len(rows) - len(judged),
        "length/mean": statistics.fmean(lengths),
        "length/max": max(lengths),
        "length/truncated": statistics.fmean(row.trajectory.end == "length" for row in rows),
        "form/well_formed": statistics.fmean(parse_response(text).well_formed for text in texts),
        "form/corrects_itself": statistics.fmean(corrects_itself(text) for text in texts),
        **sampling_metrics([row.trajectory for row in rows]),
        **{f"seconds/{name}": value for name, value in seconds.items()},
    }
    if judged:
        metrics["reward/total"] = statistics.fmean(row.score.total for row in judged)
        metrics |= {f"reward/{name}": statistics.fmean(row.score.parts[name] for row in judged) for name in parts}
    return metrics | (update_metrics(stats) if stats else {})


def update_metrics(stats: Sequence[StepStats]) -> dict[str, float]:
    """What the optimiser steps of one rollout batch did, over all their tokens and sequences.

    Before the first of them the trainer's weights are the engine's, so the mismatch between the two is taken there:
    later it would hold the policy's own movement.
    """
    first = stats[0].diagnostics.metrics()
    together = merge([each.diagnostics for each in stats]).metrics()
    together |= {name: value / len(stats) for name, value in together.items() if name.startswith("loss/")}
    metrics = {f"policy/{name}": value for name, value in together.items() if not name.startswith("mismatch/")}
    metrics |= {f"policy/{name}": value for name, value in first.items() if name.startswith("mismatch/")}
    metrics |= {f"first_update/{name}": value for name, value in first.items() if name.startswith("ratio/")}
    metrics["policy/gradient_norm"] = statistics.fmean(each.gradient_norm for each in stats)
    metrics["policy/learning_rate"] = stats[-1].learning_rate
    return metrics
