"""What goes wrong inside a run: a clear error or a stated behaviour, and nothing earlier is lost."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from rorqual.config import load_config
from rorqual.recipes import grpo, r1_zero
from rorqual.recipes.progress import SilentProgress
from rorqual.records import Evidence, Score, Task
from rorqual.rl.diagnostics import Diagnostics
from rorqual.store.files import StoreError
from rorqual.store.run import Run
from rorqual.train.data import PackedBatch
from rorqual.train.step import Objective, TrainingDiverged
from tests.recipes.conftest import MICRO, contents, differing, run_micro

NO_KL = "grpo.objective.changes.kl_strength_by_domain={ mathematics = 0.0 }"


def raises_always(task: Task, evidence: Evidence) -> float:
    raise RuntimeError("the judge is out")


def always_one(task: Task, evidence: Evidence) -> float:
    return 1.0


def with_reward(name: str) -> list[str]:
    return ["control=false", NO_KL, "grpo.optimizer.weight_decay=0.0", f'rewards=[{{ name = "{__name__}:{name}" }}]']


def weights(directory: Path, stage: str) -> bytes:
    checkpoint = Run.read(directory).latest_checkpoint(stage)
    assert checkpoint is not None
    return (Path(checkpoint.path) / "model.safetensors").read_bytes()


def run_training_only(directory: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the evaluations, which need the accuracy that these rewards do not give."""
    monkeypatch.setattr(r1_zero._Bench, "evaluate", lambda self, label, policy: None)
    run_micro(directory, settings)


def test_a_reward_that_raises_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_training_only(tmp_path / "run", with_reward("raises_always"), monkeypatch)
    run = Run.read(tmp_path / "run")
    assert [line["reward/errors"] for line in run.metrics("rl")] == [16, 16, 16]
    row = run.read_trajectories("rl", 1)[0]
    assert row.score.error is not None and "RuntimeError: the judge is out" in row.score.error
    assert row.trajectory.segments
    assert weights(tmp_path / "run", "rl") == weights(tmp_path / "run", "pretrain")


def test_groups_of_equal_rewards_train_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_training_only(tmp_path / "run", with_reward("always_one"), monkeypatch)
    run = Run.read(tmp_path / "run")
    assert {row.advantage for row in run.read_trajectories("rl", 1)} == {0.0}
    assert [line["policy/gradient_norm"] for line in run.metrics("rl")] == [0.0, 0.0, 0.0]
    assert weights(tmp_path / "run", "rl") == weights(tmp_path / "run", "pretrain")


def test_a_loss_that_is_not_finite_stops_the_run_and_loses_nothing(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = grpo.policy_objective
    monkeypatch.setattr(grpo, "policy_objective", lambda *given: _poisoned(objective(*given)))
    with pytest.raises(TrainingDiverged, match=r"loss is nan in step 0, micro-batch 0; no weight was changed"):
        run_micro(tmp_path / "run")
    monkeypatch.undo()
    run_micro(tmp_path / "run")
    assert not differing(contents(tmp_path / "run"), contents(uninterrupted))


def _poisoned(objective: Objective) -> Objective:
    def poisoned(current_N: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, Diagnostics]:
        loss, diagnostics = objective(current_N, batch)
        return loss * float("nan"), diagnostics

    return poisoned


def test_a_shuffled_score_never_leaves_a_failed_trajectory() -> None:
    failed = Score(total=0.0, parts={}, error="sandbox_failed: gone")
    scores = [Score(total=float(i), parts={}) if i % 3 else failed for i in range(20)]
    dealt = grpo.shuffled(scores, random.Random(0))
    assert [score.error for score in dealt] == [score.error for score in scores]
    assert sorted(score.total for score in dealt) == sorted(score.total for score in scores)
    assert dealt != scores


def test_prompts_longer_than_the_window_are_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No task fits: every trajectory says so, and nothing is trained."""
    settings = [
        *with_reward("always_one"),
        "grpo.num_steps=1",
        "grpo.engine.context_window=6",
        "grpo.sampling.max_new_tokens=4",
    ]
    run_training_only(tmp_path / "run", settings, monkeypatch)
    rows = Run.read(tmp_path / "run").read_trajectories("rl", 1)
    assert {row.trajectory.end for row in rows} == {"prompt_too_long"}
    assert weights(tmp_path / "run", "rl") == weights(tmp_path / "run", "pretrain")


def test_other_settings_do_not_go_on_with_a_run(uninterrupted: Path) -> None:
    with pytest.raises(StoreError, match=r"grpo.num_steps: 3 then, 4 now"):
        run_micro(uninterrupted, ["grpo.num_steps=4"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("grpo.group_sise=4", "did you mean .*group_size"),
        ("grpo.group_size=four", "grpo.group_size"),
        ("grpo.objective.preset=v33", "no objective preset 'v33'; there are v32, r1"),
        ("grpo.objective.changes.clip_hihg=0.3", "clip_hihg"),
        ("tasks.0.name=chain_sums", "chain_sum"),
        ("tasks.0.name=game_of_life_halting", "refused: its scorer"),
        ("checkpoint=somewhere", "either `model`"),
        ("model.vocab_size=200", "vocab_size = 200 is too small"),
        ("tokenizer.path=nowhere", "no tokenizer at nowhere"),
        ("grpo.updates_per_step=0", "updates_per_step is out of range"),
        ("grpo.group_size=1", "group_size is out of range"),
        ("grpo.sampling.temperature=0.0", "temperature is out of range"),
        ("grpo.objective.preset=r1", "different supports"),
        ("grpo.sampling.max_new_tokens=96", "no room for a prompt"),
        ("evaluation.num_problems=500", "gave 107 distinct held-out problems"),
        pytest.param(
            "device=cuda",
            "torch sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
        ),
        ("device=foo", "device = 'foo' is none that torch knows"),
        ("evaluation.protocol.metric=taste", "averages taste"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config = load_config(MICRO, r1_zero.Config, [setting])
        r1_zero.check(config)
        with Run.open(tmp_path / "run", config, r1_zero.seeds(config)) as run:
            r1_zero.main(config, run, SilentProgress())
