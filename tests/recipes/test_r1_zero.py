"""The recipe end to end: what it leaves behind, and that being killed anywhere changes none of it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rorqual.recipes import grpo
from rorqual.store.run import Run
from tests.recipes.conftest import contents, differing, run_micro

SCRIPT = "import sys, pathlib; from tests.recipes.conftest import run_micro; run_micro(pathlib.Path(sys.argv[1]))"


class Killed(BaseException):
    """Stands for SIGKILL where a process of its own would be too slow: nothing catches it."""


def test_a_run_leaves_everything_behind(uninterrupted: Path) -> None:
    run = Run.read(uninterrupted)
    assert run.stages() == ["pretrain", "rl", "control"]
    assert [line["step"] for line in run.metrics("rl")] == [1, 2, 3]
    assert list(run.eval_summaries()) == [
        f"{who}-{how}" for who in ("base", "rl", "control") for how in ("greedy", "sampled")
    ]
    rows = run.read_trajectories("rl", 2)
    assert len(rows) == 4 * 4
    assert all(row.trajectory.segments[0].weight_version == 1 for row in rows)
    assert all(row.trajectory.segments[0].routes is not None for row in rows)
    assert all(row.training.keys() == {"drift", "masked"} for row in rows)
    line = run.metrics("rl")[1]
    for key in ("reward/total", "reward/accuracy", "length/mean", "form/well_formed", "form/corrects_itself"):
        assert key in line
    for key in ("policy/kl", "policy/sequence_mask_rate/negative", "sampling/entropy", "sampling/kept_mass"):
        assert key in line


def test_replay_makes_the_first_ratio_one(uninterrupted: Path) -> None:
    """Kept routes and kept tokens: before any update, engine and trainer agree to float32 rounding on an MoE model."""
    for line in Run.read(uninterrupted).metrics("rl"):
        assert line["policy/mismatch/max"] < 1e-4
        assert line["policy/ratio/max"] != 1.0


def test_without_replay_the_first_ratio_is_not_one(tmp_path: Path) -> None:
    run_micro(
        tmp_path / "run",
        [
            "control=false",
            "grpo.num_steps=1",
            "grpo.objective.changes.keep_sampling_mask=false",
            "grpo.allow_unmatched_support=true",
        ],
    )
    assert Run.read(tmp_path / "run").metrics("rl")[0]["policy/mismatch/max"] > 0.01


def test_the_control_shuffles_rewards_and_nothing_else(uninterrupted: Path) -> None:
    run = Run.read(uninterrupted)
    real, control = run.read_trajectories("rl", 1), run.read_trajectories("control", 1)
    assert [row.trajectory for row in real] == [row.trajectory for row in control]
    assert sorted(row.score.total for row in real) == sorted(row.score.total for row in control)
    assert [row.score.total for row in real] != [row.score.total for row in control]


def test_held_out_problems_were_not_trained_on(uninterrupted: Path) -> None:
    run = Run.read(uninterrupted)
    questions = {row.trajectory.messages[0].content for row in run.read_eval("rl-greedy")}
    trained = {
        row.trajectory.messages[0].content
        for stage in ("rl", "control")
        for step in run.trajectory_steps(stage)
        for row in run.read_trajectories(stage, step)
    }
    assert len(questions) == 6 and not questions & trained


def test_a_finished_run_is_not_run_again(uninterrupted: Path) -> None:
    before = contents(uninterrupted)
    started = time.monotonic()
    run_micro(uninterrupted)
    assert not differing(contents(uninterrupted), before)
    assert time.monotonic() - started < 60


def test_killed_between_any_two_engine_steps(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Die in the middle of the rollouts of each step of each stage, after every kind of checkpoint."""
    rng = random.Random(0)
    original = grpo._Loop.checkpoint
    deaths = 0

    def fatal(self: Any, step: int, force: bool = False) -> None:
        nonlocal deaths
        original(self, step, force)
        if rng.random() < 0.12:
            deaths += 1
            raise Killed

    monkeypatch.setattr(grpo._Loop, "checkpoint", fatal)
    while True:
        try:
            run_micro(tmp_path / "run")
            break
        except Killed:
            continue
    assert deaths >= 5
    assert not differing(contents(tmp_path / "run"), contents(uninterrupted))


def sigkill_and_resume(directory: Path, rng: random.Random, longest_life: float) -> int:
    """Start the run in a process of its own and SIGKILL it at a random moment, until it ends by itself."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    kills = 0
    while True:
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(directory)], env=environment)
        while not (directory / "manifest.json").exists() and process.poll() is None:
            time.sleep(0.01)
        try:
            process.wait(timeout=rng.uniform(0.0, longest_life))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            longest_life *= 1.5
            continue
        assert process.returncode == 0
        return kills


def test_sigkill_and_resume_is_bit_equal(uninterrupted: Path, tmp_path: Path) -> None:
    kills = sigkill_and_resume(tmp_path / "run", random.Random(1), longest_life=6.0)
    assert kills >= 1
    assert not differing(contents(tmp_path / "run"), contents(uninterrupted))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_sigkill_often_and_resume_is_bit_equal(uninterrupted: Path, tmp_path: Path, seed: int) -> None:
    kills = sigkill_and_resume(tmp_path / "run", random.Random(seed), longest_life=4.0)
    assert kills >= 1
    assert not differing(contents(tmp_path / "run"), contents(uninterrupted))
