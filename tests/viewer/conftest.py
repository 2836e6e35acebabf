"""A synthetic run with everything a report shows: two stages and a control, groups of rollouts, evaluations."""

from __future__ import annotations

import math
import random
from array import array
from pathlib import Path

import msgspec
import pytest

from rorqual.evals.runner import Protocol, summarize
from rorqual.records import (
    Evidence,
    KeptTokens,
    Message,
    Record,
    SamplingParams,
    Score,
    Segment,
    Trajectory,
)
from rorqual.store.run import Run
from rorqual.store.tables import ScoredTrajectory
from rorqual.text.tokenizer import Tokenizer, train_tokenizer

PROTOCOLS = (
    Protocol(name="greedy", num_samples=1, sampling=SamplingParams(temperature=0.0)),
    Protocol(name="sampled", num_samples=4, sampling=SamplingParams(temperature=0.6, top_p=0.95), pass_at=(1, 4)),
)


class Inner(Record):
    learning_rate: float = 5e-5


class Settings(Record):
    recipe: str = "r1_zero"
    optimizer: Inner = Inner()


def make_rollout(
    dice: random.Random, tokenizer: Tokenizer, name: str, group: str, task: str, skill: float
) -> ScoredTrajectory:
    a, b = dice.randint(1, 40), dice.randint(1, 40)
    right = dice.random() < skill
    answer = a + b if right else a + b + dice.choice([-10, 1, 2])
    doubt = "\nwait, 9 carries\n" if dice.random() < skill / 2 else "\n"
    text = f"<think>{a}+{b}\n{a} + {b} = {answer}{doubt}</think> <answer>{answer}</answer>"
    prompt, response = tokenizer.encode(f"{a} + {b} ="), tokenizer.encode(text, allow_special=True)
    count = len(response)
    logprobs = [-dice.expovariate(3.0) for _ in range(count)]
    entropies = [min(5.0, -value * 1.7) for value in logprobs]
    kept = [1 + int(8 * entropy) for entropy in entropies]
    offsets = [0]
    for size in kept:
        offsets.append(offsets[-1] + size)
    segment = Segment(
        token_ids=prompt + response,
        sampled=array("b", [0] * len(prompt) + [1] * count),
        logprobs=array("f", [0.0] * len(prompt) + logprobs),
        entropies=array("f", [0.0] * len(prompt) + entropies),
        weight_version=3,
        kept=KeptTokens(offsets=array("q", offsets), ids=array("i", range(offsets[-1]))),
        kept_mass=0.97,
    )
    end = "length" if dice.random() < 0.05 else "stop"
    trajectory = Trajectory(
        trajectory_id=name,
        task_id=task,
        group_id=group,
        domain="mathematics",
        segments=(segment,),
        messages=(Message(role="user", content=f"{a} + {b} = ?"), Message(role="assistant", content=text)),
        evidence=Evidence(response=text, thinking="", answer=str(answer), num_sampled_tokens=count, end=end),
        end=end,
    )
    parts = {"accuracy": float(right), "format": 1.0}
    score = Score(total=parts["accuracy"] + 0.1, parts=parts)
    return ScoredTrajectory(trajectory=trajectory, score=score, advantage=parts["accuracy"] - skill)


def write_stage(run: Run, tokenizer: Tokenizer, stage: str, gain: float, num_steps: int) -> None:
    dice = random.Random(stage)
    for step in range(1, num_steps + 1):
        skill = 0.15 + gain * (1 - math.exp(-step / 15))
        rows = []
        for task in range(6):
            group = f"{step}/chain_sum/train/{task}"
            for i in range(8):
                row = make_rollout(dice, tokenizer, f"{group}#{i}", group, f"chain_sum/train/{task}", skill)
                training = {"masked": float(row.advantage < 0 and dice.random() < 0.2), "mean_log_ratio": 0.01}
                rows.append(msgspec.structs.replace(row, training=training))
        if step % 10 == 1:
            run.write_trajectories(stage, step, rows)
        noise = dice.gauss(0, 0.02)
        run.append_metrics(
            stage,
            step,
            {
                "reward/total": skill + 0.1 + noise,
                "reward/accuracy": skill + noise,
                "reward/format": 0.9 + noise,
                "length/mean": 20 + 30 * skill + 20 * noise,
                "length/truncated": 0.05,
                "form/well_formed": min(1.0, 0.8 + skill / 5),
                "form/corrects_itself": skill / 2,
                "sampling/entropy": 1.2 - skill + noise,
                "policy/kl": skill / 8,
                "policy/clip_fraction": 0.02 + abs(noise),
                "policy/clip_fraction/negative": 0.02 + abs(noise),
                "policy/sequence_mask_rate/negative": abs(noise),
                "policy/sequence_mask_rate/positive": 0.0,
                **{f"policy/ratio/{name}": math.exp(z * 0.03) for name, z in {"p01": -2, "p50": 0, "p99": 2}.items()},
                "policy/gradient_norm": float("nan") if step == 3 else 0.4 + noise,
                "seconds/generate": 1.5 + noise,
                "elsewhere": step,
            },
        )


def write_evaluation(run: Run, tokenizer: Tokenizer, label: str, skill: float, protocol: Protocol) -> None:
    dice = random.Random(f"{label}{protocol.name}")
    rows = []
    for task in range(50):
        name = f"chain_sum/test/{task}"
        for number in range(protocol.num_samples):
            group = f"{number}/{name}"
            rows.append(make_rollout(dice, tokenizer, f"{group}#0", group, name, skill))
    name = f"{label}_{protocol.name}"
    run.finish_eval(name, rows, msgspec.to_builtins(summarize(name, label, protocol, rows)))


@pytest.fixture(scope="session")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "r1-zero-tiny"
    tokenizer = train_tokenizer(["<think>12+7\n12 + 7 = 19\nwait, 9 carries</think> <answer>19</answer>"] * 9, 300)
    with Run.open(path, Settings(), {"run": 7}, ["rorqual", "run", "configs/r1_zero/tiny.toml"]) as run:
        tokenizer.save(path / "tokenizer")
        for step in range(1, 40):
            run.append_metrics("pretrain", step * 10, {"loss": 5 * math.exp(-step / 10) + 1})
        write_stage(run, tokenizer, "rl", 0.6, 41)
        write_stage(run, tokenizer, "control", 0.0, 41)
        for label, skill in {"base": 0.15, "trained": 0.72, "control": 0.14}.items():
            for protocol in PROTOCOLS:
                write_evaluation(run, tokenizer, label, skill, protocol)
    return path
